"""The joint distribution of a guide's blocks, as one vector: its base distribution, its support, its transform."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ..transforms import FlowTransform
from .block import Block

__all__ = ["JointBase", "JointTransform"]


class _Support(constraints.Constraint):
    """Vectors whose blocks lie where they should. It has no bijection from the reals."""

    event_dim = 1

    def __init__(self, blocks: Sequence[Block]) -> None:
        self.blocks = tuple(blocks)

    def check(self, value: Tensor) -> Tensor:
        inside = (value == value).all(-1)
        for b in self.blocks:
            inside = inside & b.contains(value.index_select(-1, b.index.to(value.device)))
        return inside

    def __repr__(self) -> str:
        return f"Joint({', '.join(str(b) for b in self.blocks)})"


class _JointDistribution(dist.TorchDistribution):
    """Independent blocks of coordinates, each with its own distribution of event dimension 1."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, blocks: Sequence[Block], parts: Sequence[dist.TorchDistribution], back: Tensor) -> None:
        self.blocks, self.parts, self.back = tuple(blocks), tuple(parts), back
        super().__init__(parts[0].batch_shape, torch.Size([len(back)]), validate_args=False)

    @property
    def has_rsample(self) -> bool:
        return all(p.has_rsample for p in self.parts)

    @property
    def support(self) -> constraints.Constraint:
        return _Support(self.blocks)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _JointDistribution:
        return _JointDistribution(self.blocks, [p.expand(torch.Size(batch_shape)) for p in self.parts], self.back)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return torch.cat([p.rsample(torch.Size(sample_shape)) for p in self.parts], -1).index_select(-1, self.back)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return torch.cat([p.sample(torch.Size(sample_shape)) for p in self.parts], -1).index_select(-1, self.back)

    def log_prob(self, value: Tensor) -> Tensor:
        runs = [value.index_select(-1, b.index.to(value.device)) for b in self.blocks]
        total = value.new_zeros(torch.broadcast_shapes(value.shape[:-1], self.batch_shape))
        for part, run in zip(self.parts, runs, strict=True):
            total = total + part.log_prob(run)
        return total


class _Order(nn.Module):
    """The order of the coordinates in the vector, from that in the blocks laid end to end, and back."""

    back: Tensor

    def __init__(self, blocks: Sequence[Block]) -> None:
        super().__init__()
        self.sizes = [len(b.index) for b in blocks]
        order = torch.cat([b.index for b in blocks])
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", order.argsort(), persistent=False)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        return vector.index_select(-1, self.order).split(self.sizes, -1)  # type: ignore[arg-type]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), -1).index_select(-1, self.back)


class JointBase(nn.Module):
    """Independent blocks, each with a base of its own.

    Args:
        blocks: the blocks.
        bases: their base modules.
    """

    def __init__(self, blocks: Sequence[Block], bases: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks, self.dim = tuple(blocks), sum(len(b.index) for b in blocks)
        self.parts = nn.ModuleList(bases)
        self.order = _Order(blocks)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return _JointDistribution(self.blocks, [p() for p in self.parts], self.order.back)


class JointTransform(FlowTransform):
    """Moves each block by a transform of its own, which sees the base points of the blocks before it as its context.

    Args:
        blocks: the blocks, in the order in which they depend on each other.
        parts: a transform for each, whose context, if it takes one, are the features of all earlier blocks.

    Cost: that of the parts in both directions. The log-determinant is that of the product of the blocks' measures.
    """

    def __init__(self, blocks: Sequence[Block], parts: Sequence[FlowTransform]) -> None:
        super().__init__(sum(len(b.index) for b in blocks))
        self.blocks, self.parts, self.order = tuple(blocks), nn.ModuleList(parts), _Order(blocks)
        self.domain = self.codomain = _Support(blocks)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, forward=True)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, forward=False)

    def _map(self, vector: Tensor, forward: bool) -> tuple[Tensor, Tensor]:
        total = vector.new_zeros(vector.shape[:-1])
        moved: list[Tensor] = []
        seen: list[Tensor] = []
        parts = cast(Iterable[FlowTransform], self.parts)
        for block, part, run in zip(self.blocks, parts, self.order.split(vector), strict=True):
            context = torch.cat(seen, -1) if part.context_dim else None
            out, ladj = (part.forward_and_ladj if forward else part.inverse_and_ladj)(run, context)
            seen.append(block.features(run if forward else out))
            moved.append(out)
            total = total + ladj
        return self.order.join(moved), total
