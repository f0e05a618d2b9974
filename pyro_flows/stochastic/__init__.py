"""Flows whose layers draw an index (a winner, a component, noise): they can separate what one bijection cannot; densities are sums or bounds."""

from .annealed import Langevin, Metropolis
from .ar_lwta import ARLWTA
from .bounds import lower_bound, upper_bound
from .continuous import ContinuouslyIndexed
from .density_model import DensityModel
from .distribution import StochasticFlowDistribution
from .flow import StochasticFlow
from .layer import Branches, Deterministic, DiscreteLayer, Move, StochasticLayer
from .lwta import LWTACoupling
from .mixture_of_flows import MixtureOfFlows
from .path_model import Path
from .surjection import Abs, Max, Partition, Sort

__all__ = [
    "ARLWTA",
    "Abs",
    "Branches",
    "ContinuouslyIndexed",
    "DensityModel",
    "Deterministic",
    "DiscreteLayer",
    "LWTACoupling",
    "Langevin",
    "Max",
    "Metropolis",
    "MixtureOfFlows",
    "Move",
    "Partition",
    "Path",
    "Sort",
    "StochasticFlow",
    "StochasticFlowDistribution",
    "StochasticLayer",
    "lower_bound",
    "upper_bound",
]
