"""Conditioners: networks that turn some coordinates, and a context, into the parameters of a map."""

from .lipschitz import LipschitzMLP, LipSwish
from .masked import MaskedMLP
from .mlp import MLP, Hypernetwork

__all__ = ["MLP", "MaskedMLP", "Hypernetwork", "LipschitzMLP", "LipSwish"]
