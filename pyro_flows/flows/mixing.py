"""The recipes whose single layers mix all coordinates: planar, radial, Sylvester and residual flows, and block autoregressive networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from ..distributions import Flow
from ..errors import OptionError
from ..transforms import BlockAutoregressive, ContractiveResidual, FlowTransform, Planar, Radial, Sylvester
from .stacks import alternating, check_sizes, flow_of

__all__ = ["planar", "radial", "sylvester", "bnaf", "residual"]


def planar(
    dim: int,
    context_dim: int = 0,
    transforms: int = 16,
    activation: Literal["tanh", "leaky_relu"] = "tanh",
    base: nn.Module | None = None,
) -> Flow:
    """Planar layers: each bends space along one direction.

    Args:
        activation: the shape of the bend, ``"tanh"`` or ``"leaky_relu"``.

    Cost: samples take one pass; densities one scalar equation a layer for tanh, one pass for leaky ReLU. Reference: Variational inference with
    normalizing flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
    """
    return flow_of([Planar(dim, context_dim, activation) for _ in range(check_sizes(dim, transforms))], dim, base)


def radial(
    dim: int,
    context_dim: int = 0,
    transforms: int = 16,
    base: nn.Module | None = None,
) -> Flow:
    """Radial layers: each pushes points away from a centre, or pulls them to it.

    Cost: one pass for samples and for densities. Reference: Variational inference with normalizing flows (Rezende & Mohamed, 2015),
    https://arxiv.org/abs/1505.05770
    """
    return flow_of([Radial(dim, context_dim) for _ in range(check_sizes(dim, transforms))], dim, base)


def sylvester(
    dim: int,
    context_dim: int = 0,
    transforms: int = 4,
    rank: int | None = None,
    basis: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
    base: nn.Module | None = None,
) -> Flow:
    """Sylvester layers: each bends space along several directions at once.

    Args:
        rank: directions of each layer; all ``dim`` by default.
        basis: how the directions are made; ``"triangular"`` takes the coordinates themselves, reversed in every second layer.

    Cost: samples take one pass, densities of given points ``rank`` dependent scalar equations a layer. Reference: Sylvester normalizing flows for
    variational inference (van den Berg et al., 2018), https://arxiv.org/abs/1803.05649
    """
    layers: list[FlowTransform] = [Sylvester(dim, rank, context_dim, basis) for _ in range(check_sizes(dim, transforms))]
    return flow_of(alternating(layers, dim) if basis == "triangular" else layers, dim, base)


def bnaf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 2,
    hidden_factors: Sequence[int] = (8, 8),
    direction: Literal["density", "sampling"] = "density",
    base: nn.Module | None = None,
) -> Flow:
    """Block autoregressive networks, in an order and its reverse (BNAF).

    Args:
        hidden_factors: units of each hidden layer, per coordinate.
        direction: ``"density"`` or ``"sampling"``: which takes one pass.

    Cost: one pass in the named direction; ``dim`` dependent scalar equations a network in the other. Reference: Block neural autoregressive flow
    (De Cao et al., 2019), https://arxiv.org/abs/1904.04676
    """
    if direction not in ("density", "sampling"):
        raise OptionError(f'bnaf: direction must be "density" or "sampling", got {direction!r}')
    layers = [BlockAutoregressive(dim, hidden_factors, context_dim) for _ in range(check_sizes(dim, transforms))]
    return flow_of(alternating([f.inv if direction == "density" else f for f in layers], dim), dim, base)


def residual(
    dim: int,
    context_dim: int = 0,
    transforms: int = 8,
    hidden_features: Sequence[int] = (64, 64),
    lipschitz: float = 0.97,
    direction: Literal["density", "sampling"] = "density",
    base: nn.Module | None = None,
) -> Flow:
    """Contractive residual layers, whose Jacobians are full (i-ResNet, Residual Flow); above 8 coordinates the density is estimated.

    Args:
        lipschitz: bound of each net's Lipschitz constant, below 1.

    Cost: one pass and a log-det in the direction named, ``"density"`` or ``"sampling"``; a fixed point of 10 to 40 passes a layer in the other.
    Reference: Residual flows (Chen et al., 2019), https://arxiv.org/abs/1906.02735
    """
    layers: list[FlowTransform] = [
        ContractiveResidual(dim, context_dim, direction, hidden_features, lipschitz) for _ in range(check_sizes(dim, transforms))
    ]
    return flow_of(layers, dim, base)
