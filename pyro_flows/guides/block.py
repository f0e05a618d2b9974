"""What a guide asks of a block: some coordinates of its vector that live in one place and share layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..manifolds import Manifold, Uniform
from ..model.sites import LatentSite
from ..transforms import Compose, FlowTransform

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Block", "Start", "UniformPoints", "index_of"]

Layers = list[FlowTransform]


@dataclass(frozen=True)
class Start:
    """A Gaussian that a guide is to start at, over the points of its ``lift``.

    Attributes:
        loc: the mean, ``(d,)``.
        scale_tril: Cholesky factor of the covariance, ``(d, d)``.
        log_density: the density to look for other modes of, ``(N, d) -> (N,)``; ``None`` to look for none.
    """

    loc: Tensor
    scale_tril: Tensor
    log_density: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def precision(self) -> Tensor:
        """The inverse of the covariance, ``(d, d)``."""
        return torch.cholesky_inverse(self.scale_tril)


@dataclass(frozen=True)
class Block:
    """Some coordinates of a guide's vector on one manifold, and what a guide does with them. Each kind of block is a subclass.

    The layers of a block are the list of its transforms from the base to the sites: at first those that only a flow has, then ``num_outer`` that hold
    location and spread.

    Attributes:
        index: positions of the coordinates in the vector, ``(k,)``.
        manifold: where each of ``count`` points lies; ``None`` for plain numbers.
        count: number of points.
    """

    index: Tensor
    manifold: Manifold | None = None
    count: int = 1

    num_outer: ClassVar[int] = 1

    @classmethod
    def of(cls, sites: Sequence[LatentSite]) -> list[Self]:
        """The blocks of this kind that some sites make; none where no site is of the kind."""
        raise NotImplementedError

    def __str__(self) -> str:
        return str(self.manifold)

    # What the joint distribution of all blocks asks.

    @property
    def space(self) -> Manifold:
        """The manifold, where there is one."""
        assert self.manifold is not None
        return self.manifold

    @property
    def feature_dim(self) -> int:
        """Size of :meth:`features`."""
        return self.count * self.space.feature_dim

    def features(self, noise: Tensor) -> Tensor:
        """The block's base point as later blocks see it, ``(*batch, k) -> (*batch, feature_dim)``."""
        return self.space.features(noise.unflatten(-1, (self.count, -1))).flatten(-2)

    def contains(self, run: Tensor) -> Tensor:
        """Whether the block's coordinates ``(*batch, k)`` lie on the manifold, ``(*batch,)``."""
        return self.space.contains(run.unflatten(-1, (self.count, -1))).all(-1)

    # What the guide asks.

    def build(self, sites: Sequence[LatentSite], loc: Tensor, context_dim: int, config: Mapping[str, Any]) -> tuple[nn.Module, Compose]:
        """The block's base and its layers.

        Args:
            sites: all sites of the guide.
            loc: where the block's coordinates start, ``(k,)``.
            context_dim: size of the features of all blocks before.
            config: the guide's options.
        """
        raise NotImplementedError

    @property
    def log_length(self) -> float:
        """Logarithm of the length of the interval that a coordinate of a lifted point lives on: infinite but for angles."""
        return math.log(math.inf if self.manifold is None else self.manifold.period)

    def lift(self, run: Tensor) -> tuple[Tensor, Tensor | float]:
        """The block's point that numbers ``(*batch, k)`` stand for, and the log density that the numbers have beyond that of the point."""
        return run, 0.0

    def loc(self, layers: Layers) -> Tensor:
        """The point that the outer layers put the block around, ``(k,)``."""
        raise NotImplementedError

    def start_at(self, layers: Layers, start: Start, before: Tensor) -> bool:
        """Set the outer layers to a start, given the coordinates at ``before`` of the blocks before.

        Returns:
            Whether some points start evenly everywhere.
        """
        raise NotImplementedError

    def foldable(self, layers: Layers) -> bool:
        """Whether :meth:`fold` can move all that the outer layers learn."""
        return True

    def fold(self, layers: Layers) -> None:
        """Move what the learned outer layer has learned into the fixed one; nothing where there is only one."""


def index_of(sites: Sequence[LatentSite]) -> Tensor:
    """Positions of some sites' coordinates in the vector."""
    return torch.cat([torch.arange(s.start, s.stop) for s in sites])


class UniformPoints(nn.Module):
    """A base of several uniform points of a manifold, one after the other."""

    def __init__(self, manifold: Manifold, count: int) -> None:
        super().__init__()
        self.uniform, self.count = Uniform(manifold), count

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        one = self.uniform()
        return one if self.count == 1 else _EndToEnd(one, self.count)


class _EndToEnd(dist.TorchDistribution):
    """``count`` independent draws of a distribution of vectors, as one vector."""

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, one: dist.TorchDistribution, count: int, batch_shape: Sequence[int] = ()) -> None:
        self.one, self.count = one, count
        super().__init__(torch.Size(batch_shape), torch.Size([count * one.event_shape[0]]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> _EndToEnd:
        return _EndToEnd(self.one, self.count, batch_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.one.rsample(torch.Size([*sample_shape, *self.batch_shape, self.count])).flatten(-2)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        return self.one.sample(torch.Size([*sample_shape, *self.batch_shape, self.count])).flatten(-2)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.one.log_prob(value.unflatten(-1, (self.count, -1))).sum(-1)
