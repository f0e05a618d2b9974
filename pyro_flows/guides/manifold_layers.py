"""The blocks of an AutoManifoldFlow that live on spheres and circles: where the points of a site lie, and how they are spread around there."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..manifolds import AxisFlow, ManifoldTransform, NormalizedAffine, Sphere, Torus, TorusCoupling, TorusElementwise
from ..manifolds.sphere_maps import mobius, unit
from ..manifolds.transform import widened
from ..nets import Hypernetwork
from ..transforms import Compose, FlowTransform
from ..univariate import CircularSpline

__all__ = ["DirectionPlaces", "DirectionShapes", "AnglePlaces", "angle_shapes"]

_FEATURES, _WIDTH = 16, 64
_NARROW = 0.25  # radians: below it training from an even start would take long, and Laplace's approximation of one mode is trusted


class DirectionPlaces(FlowTransform):
    r"""Gathers each of several uniform directions around a place of its own: a Möbius map towards the first axis, then a fixed rotation.

    Args:
        n: number of coordinates of one direction.
        count: number of directions.
        context_dim: size of the context that the maps depend on (linearly); 0 for none.

    Points are ``(*batch, count * n)``, one direction after the other. The rotations are buffers, identities until :meth:`place`; the maps start at
    the identity.
    """

    frames: Tensor

    def __init__(self, n: int, count: int, context_dim: int) -> None:
        super().__init__(n * count, context_dim)
        self.n, self.count = n, count
        self.pull = Hypernetwork((count, n), context_dim)
        self.register_buffer("frames", torch.eye(n).repeat(count, 1, 1))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, pull, frames = widened(x.unflatten(-1, (self.count, self.n)), self.pull(context), self.frames)
        y, ladj = mobius(wide, -pull)
        return unit((frames @ y.unsqueeze(-1)).squeeze(-1)).flatten(-2).to(x), ladj.sum(-1).to(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, pull, frames = widened(y.unflatten(-1, (self.count, self.n)), self.pull(context), self.frames)
        x, ladj = mobius(unit((frames.mT @ wide.unsqueeze(-1)).squeeze(-1)), pull)
        return x.flatten(-2).to(y), ladj.sum(-1).to(y)

    @property
    def poles(self) -> Tensor:
        """The places, ``(count, n)``."""
        return self.frames[..., 0]

    @torch.no_grad()
    def place(self, poles: Tensor, spread: Tensor | None = None) -> None:
        """Put directions around ``poles (count, n)``, with ``spread (count,)``, their standard deviations there in radians.

        Where that is wide they start evenly everywhere, as without it: there may be other modes.
        """
        sphere, poles = Sphere(self.n), unit(poles)
        others = sphere.tangent_basis(poles)
        self.frames.copy_(torch.cat([poles.unsqueeze(-1), others], -1))
        for parameter in self.pull.parameters():
            parameter.zero_()
        if spread is not None:
            k = self.n - 1
            median = spread * math.sqrt(k) * (1 - 2 / (9 * k)) ** 1.5  # of the angle to the pole, for a normal distribution around it
            shrink = (median.clamp(min=1e-6, max=math.pi / 2) / 2).tan()  # half of a uniform distribution lies within a right angle
            self.pull.bias[:, 0] = torch.where(spread < _NARROW, (1 - shrink) / (2 * shrink.sqrt()), 0.0)


class DirectionShapes(FlowTransform):
    """Reshapes each of several uniform directions by layers that they share, given features that each has of its own.

    Args:
        n, count, context_dim: as those of :class:`DirectionPlaces`.
        layers: number of pairs of an affine map and a spline of heights; the last spline is around the first axis, where the places are.

    Starts at the identity.
    """

    def __init__(self, n: int, count: int, context_dim: int, layers: int = 3) -> None:
        super().__init__(n * count, context_dim)
        self.n, self.count = n, count
        self.features = nn.Parameter(torch.randn(count, _FEATURES))
        self.net = None
        if context_dim:
            self.net = nn.Sequential(nn.Linear(context_dim, _WIDTH), nn.SiLU(), nn.Linear(_WIDTH, count * _FEATURES))
        parts = [layer(n, _FEATURES) for _ in range(layers) for layer in (NormalizedAffine, AxisFlow)]
        with torch.no_grad():
            parts[-1].params.bias[-n:] = torch.eye(n)[0]  # type: ignore[union-attr]
        self.layers = Compose(parts)  # type: ignore[arg-type]

    def _features(self, context: Tensor | None) -> Tensor:
        if self.net is None or context is None:
            return self.features
        return self.features + self.net(context).unflatten(-1, self.features.shape)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.layers.forward_and_ladj(x.unflatten(-1, (self.count, self.n)), self._features(context))
        return y.flatten(-2), ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.layers.inverse_and_ladj(y.unflatten(-1, (self.count, self.n)), self._features(context))
        return x.flatten(-2), ladj.sum(-1)


class AnglePlaces(ManifoldTransform):
    """:class:`DirectionPlaces` of angles, which are directions of the plane.

    Args:
        dim: number of angles.
        context_dim: size of the context; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int) -> None:
        super().__init__(Torus(dim), context_dim)
        self.directions = DirectionPlaces(2, dim, context_dim)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.directions.forward_and_ladj(around(x), context)
        return _angle(y), ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.directions.inverse_and_ladj(around(y), context)
        return _angle(x), ladj

    @property
    def poles(self) -> Tensor:
        """The places, angles ``(dim,)``."""
        return _angle(self.directions.poles.flatten())

    def place(self, poles: Tensor, spread: Tensor | None = None) -> None:
        """Put angles around ``poles (dim,)``; see :meth:`DirectionPlaces.place`."""
        self.directions.place(around(poles).unflatten(-1, (-1, 2)), spread)


def around(angles: Tensor) -> Tensor:
    """Points of the circle, one after the other: ``(*batch, d) -> (*batch, 2 d)``."""
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(-2)


def _angle(points: Tensor) -> Tensor:
    x, y = points.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.atan2(y, x)


def angle_shapes(dim: int, context_dim: int) -> FlowTransform:
    """Couplings of all angles by circular splines, then three splines for each. Starts at the identity.

    One spline's slopes are bounded, and the wrapped Cauchy distribution that a place makes has heavy tails: it takes several to thin them.
    """
    layers: list[FlowTransform] = []
    if dim > 1:
        even = torch.arange(dim) % 2 == 0
        layers = [TorusCoupling(CircularSpline(), dim, moved, context_dim) for moved in (even, ~even, even, ~even)]
    return Compose([*layers, *(TorusElementwise(CircularSpline(), dim, context_dim) for _ in range(3))])
