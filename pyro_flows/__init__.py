"""pyro_flows: normalizing flows for Pyro. Fit a model, get a posterior, and know when to distrust it."""

from . import distributions, errors, flows, guides, nets, transforms, univariate
from .distributions import Flow, FlowDistribution
from .guides import AutoFlow

__version__ = "0.1.0"
__all__ = ["AutoFlow", "Flow", "FlowDistribution", "distributions", "errors", "flows", "guides", "nets", "transforms", "univariate"]
