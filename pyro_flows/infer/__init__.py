"""Inference: :class:`FlowVI`, which fits a model, and :class:`Posterior`, what it returns."""

from .flow_vi import FlowVI, fit
from .log_joint import LogJoint
from .posterior import Posterior

__all__ = ["FlowVI", "LogJoint", "Posterior", "fit"]
