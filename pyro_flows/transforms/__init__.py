"""Bijections of R^D as Pyro transform modules, one family a file; :mod:`~pyro_flows.transforms.base` holds the contract."""

from .affine import Affine
from .autoregressive import Autoregressive
from .base import Conditioned, FlowTransform, Inverse
from .compose import Compose
from .coupling import Coupling
from .elementwise import Elementwise
from .low_rank import LowRankLinear
from .lu import LULinear
from .permutation import Permutation
from .triangular import Standardize, TriangularLinear

__all__ = [
    "FlowTransform",
    "Conditioned",
    "Inverse",
    "Affine",
    "Elementwise",
    "Coupling",
    "Autoregressive",
    "TriangularLinear",
    "Standardize",
    "LULinear",
    "LowRankLinear",
    "Permutation",
    "Compose",
]
