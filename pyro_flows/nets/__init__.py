"""Conditioners: networks that turn some coordinates, and a context, into the parameters of a map."""

from .lipschitz import LipschitzMLP, LipSwish
from .lwta import LWTA
from .masked import MaskedMLP
from .mlp import MLP, Hypernetwork
from .potential import PotentialNet
from .velocity import AutoregressiveVelocity, VelocityMLP

__all__ = ["MLP", "MaskedMLP", "Hypernetwork", "LWTA", "LipschitzMLP", "LipSwish", "VelocityMLP", "PotentialNet", "AutoregressiveVelocity"]
