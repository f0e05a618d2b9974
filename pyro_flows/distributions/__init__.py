"""Flows as distributions, and the bases they start from."""

from .bases import Gaussian, StudentT
from .flow import Flow, FlowDistribution

__all__ = ["Flow", "FlowDistribution", "Gaussian", "StudentT"]
