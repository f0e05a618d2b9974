"""pyro_flows: normalizing flows for Pyro. Fit a model, get a posterior, and know when to distrust it."""

from . import (
    density,
    diagnostics,
    distributions,
    errors,
    flows,
    guides,
    manifolds,
    model,
    nets,
    numerics,
    posterior,
    stochastic,
    training,
    transforms,
    univariate,
    vi,
)
from .density import distill, fit_density
from .distributions import Flow, FlowDistribution
from .guides import AutoFlow, AutoManifoldFlow, AutoStochasticFlow
from .posterior import Posterior
from .vi import FlowVI, fit

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
    "density",
    "diagnostics",
    "distributions",
    "errors",
    "flows",
    "guides",
    "manifolds",
    "model",
    "nets",
    "numerics",
    "posterior",
    "stochastic",
    "training",
    "transforms",
    "univariate",
    "vi",
]
