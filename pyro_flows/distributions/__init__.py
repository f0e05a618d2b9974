"""Flows as distributions, and the bases they start from."""

from .augmented import AugmentedDistribution, AugmentedFlow
from .bases import BoxUniform, Gaussian, StudentT
from .flow import Flow, FlowDistribution
from .mixture import GaussianMixture
from .resampled import Resampled, ResampledDistribution

__all__ = [
    "Flow",
    "FlowDistribution",
    "AugmentedDistribution",
    "AugmentedFlow",
    "BoxUniform",
    "Gaussian",
    "GaussianMixture",
    "Resampled",
    "ResampledDistribution",
    "StudentT",
]
