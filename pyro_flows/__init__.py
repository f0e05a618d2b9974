"""pyro_flows: normalizing flows for Pyro. Fit a model, get a posterior, and know when to distrust it."""

from . import distributions, errors, flows, nets, transforms, univariate
from .distributions import Flow, FlowDistribution

__version__ = "0.1.0"
__all__ = ["Flow", "FlowDistribution", "distributions", "errors", "flows", "nets", "transforms", "univariate"]
