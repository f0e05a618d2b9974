"""pyro_flows: normalizing flows for Pyro. Fit a model, get a posterior, and know when to distrust it."""

from . import diagnostics, distributions, errors, flows, guides, infer, manifolds, nets, numerics, stochastic, transforms, univariate
from .distributions import Flow, FlowDistribution
from .guides import AutoFlow, AutoManifoldFlow, AutoStochasticFlow
from .infer import FlowVI, Posterior, distill, fit, fit_density

__version__ = "0.1.0"
__all__ = [
    "AutoFlow",
    "AutoManifoldFlow",
    "AutoStochasticFlow",
    "Flow",
    "FlowDistribution",
    "FlowVI",
    "Posterior",
    "distill",
    "fit",
    "fit_density",
    "diagnostics",
    "distributions",
    "errors",
    "flows",
    "guides",
    "infer",
    "manifolds",
    "nets",
    "numerics",
    "stochastic",
    "transforms",
    "univariate",
]
