"""Conditioners: networks that turn some coordinates, and a context, into the parameters of a map."""

from .lipschitz import LipSwish, LipschitzMLP
from .masked import MaskedMLP
from .mlp import MLP, Hypernetwork

__all__ = ["MLP", "MaskedMLP", "Hypernetwork", "LipschitzMLP", "LipSwish"]
