"""What recipes share: stacks of layers in which every coordinate moves, and the flow that stands on its base."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from ..distributions import Flow
from ..errors import OptionError, ShapeError
from ..transforms import Autoregressive, Compose, Coupling, FlowTransform, LULinear, Permutation
from ..univariate import Univariate

__all__ = ["alternating", "autoregressions", "check_sizes", "couplings", "flow_of", "flow_towards_base"]


def check_sizes(dim: int, transforms: int) -> int:
    """The number of transforms; raises an error unless both are positive integers."""
    if not isinstance(dim, int) or dim < 1:
        raise ShapeError(f"dim must be a positive integer, got {dim!r}")
    if not isinstance(transforms, int) or transforms < 1:
        raise OptionError(f"transforms must be a positive integer, got {transforms!r}")
    return transforms


def couplings(
    univariate: Univariate, dim: int, context_dim: int, transforms: int, hidden_features: Sequence[int], mix: bool = False
) -> list[FlowTransform]:
    """Couplings of the first half and the second in turn, with a riffle after each round and the original order at the end.

    A riffle (even places, then odd ones) puts any two coordinates in different halves after a few rounds, so that each can depend on each; and
    contiguous halves are slices, which cost nothing to take apart and join. With ``mix`` a linear layer stands between two rounds.
    """
    transforms = check_sizes(dim, transforms)
    first = torch.arange(dim) < (dim + 1) // 2
    riffle = torch.cat([torch.arange(0, dim, 2), torch.arange(1, dim, 2)])
    order = torch.arange(dim)
    layers: list[FlowTransform] = []
    for i in range(transforms):
        layers.append(Coupling(univariate, dim, first if i % 2 == 0 or dim == 1 else ~first, context_dim, hidden_features))
        if i % 2 == 1 and i + 1 < transforms and dim > 1:
            if mix:
                layers.append(LULinear(dim))
            if dim > 2:
                layers.append(Permutation(riffle))
                order = order[riffle]
    if not torch.equal(order, torch.arange(dim)):
        layers.append(Permutation(order.argsort()))
    return layers


def autoregressions(
    univariate: Univariate,
    direction: Literal["density", "sampling"],
    dim: int,
    context_dim: int,
    transforms: int,
    hidden_features: Sequence[int],
) -> list[FlowTransform]:
    """Autoregressive layers, every second one on the coordinates in reverse order."""
    transforms = check_sizes(dim, transforms)
    order = torch.arange(dim)
    return [
        Autoregressive(univariate, dim, direction, order if i % 2 == 0 else order.flip(0), context_dim, hidden_features) for i in range(transforms)
    ]


def alternating(layers: Sequence[FlowTransform], dim: int) -> list[FlowTransform]:
    """The same layers, every second one on the coordinates in reverse order."""
    flip = torch.arange(dim).flip(0)
    return [part for i, layer in enumerate(layers) for part in ((Permutation(flip), layer, Permutation(flip)) if i % 2 else (layer,))]


def flow_of(layers: Sequence[FlowTransform], dim: int, base: nn.Module | None) -> Flow:
    """The layers, base to target, on a base: standard normal where none is given."""
    return Flow(dim if base is None else base, Compose(layers))


def flow_towards_base(layers: Sequence[FlowTransform], dim: int, base: nn.Module | None) -> Flow:
    """A flow whose densities run through the layers' formulas, first layer first."""
    return Flow(dim if base is None else base, Compose(layers).inv)
