"""Flows as distributions, and the bases they start from."""

from .bases import BoxUniform, Gaussian, StudentT
from .flow import Flow, FlowDistribution
from .mixture import GaussianMixture
from .resampled import Resampled, ResampledDistribution

__all__ = [
    "Flow",
    "FlowDistribution",
    "BoxUniform",
    "Gaussian",
    "GaussianMixture",
    "Resampled",
    "ResampledDistribution",
    "StudentT",
]
