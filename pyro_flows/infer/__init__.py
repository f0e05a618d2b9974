"""Inference: :class:`FlowVI` fits a model and returns a :class:`Posterior`; :func:`fit_density` and :func:`distill` fit a flow."""

from .distill import distill
from .fit_density import fit_density
from .flow_fit import FlowFit
from .flow_vi import FlowVI, fit
from .log_joint import LogJoint
from .posterior import Posterior

__all__ = ["FlowFit", "FlowVI", "LogJoint", "Posterior", "distill", "fit", "fit_density"]
