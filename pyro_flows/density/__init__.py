"""Densities: :func:`fit_density` fits a flow to rows of data, :func:`distill` to another flow; both give a :class:`FlowFit`."""

from .distill import distill
from .fit_density import fit_density
from .flow_fit import FlowFit
from .objective import Objective

__all__ = ["FlowFit", "Objective", "distill", "fit_density"]
