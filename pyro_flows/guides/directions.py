"""The blocks of a guide that live on spheres: location and spread of the directions of a site, and a flow of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..manifolds import AxisFlow, NormalizedAffine, Sphere
from ..manifolds.sphere_maps import mobius, pulled_back, unit
from ..manifolds.transform import widened
from ..model.sites import LatentSite
from ..nets import Hypernetwork
from ..numerics import triangle
from ..transforms import Compose, FlowTransform
from ..transforms.linear import times
from .block import Block, Layers, Start, UniformPoints, index_of
from .modes import OtherModes, circle_variances, other_modes

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["DirectionBlock", "DirectionCentres", "DirectionShapes"]

_FEATURES, _WIDTH = 16, 64  # of one direction; of the hidden layer
_QUARTILE = 0.6745  # upper, of a standard normal variable
_LENGTHS = 0.1  # variance of the log length of a lifted direction, times its number of coordinates
_NARROW = 0.25  # radians: below it training from an even start would take long, and Laplace's approximation of one mode is trusted


class DirectionCentres(FlowTransform):
    r"""Gathers each of several uniform directions around a centre of its own, or around it and its antipode.

    Three maps in turn. The first moves points towards both ends of the first axis: the height :math:`c` along it becomes :math:`\pm|c|^s`, and the
    angle around it stays. For small :math:`s`, uniform directions then have nearly a normal distribution around each end. The second, a Möbius map,
    moves points towards one of the ends. The last, linear and fixed, rotates the axis to the centre and scales the coordinates across it.

    Args:
        n: number of coordinates of one direction.
        count: number of directions.
        context_dim: size of the context that the maps depend on (linearly); 0 for none.

    Points are ``(*batch, count * n)``, one direction after the other. The linear maps are buffers, identities until :meth:`start_at`; the
    others start at the identity.
    """

    frames: Tensor

    def __init__(self, n: int, count: int, context_dim: int) -> None:
        super().__init__(n * count, context_dim)
        self.n, self.count = n, count
        self.params = Hypernetwork((count, n + 1), context_dim)  # the pull, and log s
        self.register_buffer("frames", torch.eye(n).repeat(count, 1, 1))

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, params, frames = widened(x.unflatten(-1, (self.count, self.n)), self.params(context), self.frames)
        halves, first = _to_both_ends(wide, _power(params[..., -1]))
        one, second = mobius(halves, -params[..., :-1])
        y, third = pulled_back(times(frames, one))
        return y.flatten(-2).to(x), (first + second + third).sum(-1).to(x)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        wide, params, frames = widened(y.unflatten(-1, (self.count, self.n)), self.params(context), self.frames)
        one, third = pulled_back(times(torch.linalg.inv(frames), wide))
        halves, second = mobius(one, params[..., :-1])
        x, first = _to_both_ends(halves, 1 / _power(params[..., -1]))
        return x.flatten(-2).to(y), (first + second + third).sum(-1).to(y)

    @property
    def poles(self) -> Tensor:
        """The centres, ``(count, n)``."""
        return self.frames[..., 0]

    @torch.no_grad()
    def start_at(self, poles: Tensor, root: Tensor | None = None, others: OtherModes | None = None) -> Tensor:
        """Start as directions around some points, with given covariances.

        Args:
            poles: the points, ``(count, n)``.
            root: Cholesky factors of the covariances there, in radians along the sphere's ``tangent_basis``, ``(count, n - 1, n - 1)``.
            others: which other modes there are.

        Returns:
            Which directions start uniform on the whole sphere, ``(count,)``: all of them without a ``root``; with one, those with a large spread, and
            those with modes elsewhere than at their point and its antipode.
        """
        poles = unit(poles)
        self.frames.copy_(torch.cat([poles.unsqueeze(-1), Sphere(self.n).tangent_basis(poles)], -1))
        for parameter in self.params.parameters():
            parameter.zero_()
        if root is None:
            return torch.ones_like(poles[:, 0], dtype=torch.bool)
        k = self.n - 1
        log_size = root.diagonal(dim1=-2, dim2=-1).log().mean(-1)
        none = torch.zeros_like(log_size, dtype=torch.bool)
        two, elsewhere = others or (none, none)
        narrow = (root.square().sum((-1, -2)) < k * _NARROW**2) & ~elsewhere
        shape = torch.where(narrow[:, None, None], root / log_size.exp()[:, None, None], torch.eye(k).to(root))
        self.frames[..., 1:] = self.frames[..., 1:] @ shape
        # The median angle to the pole of a normal distribution, by Wilson and Hilferty's formula for chi-squared variables.
        median = (log_size.exp() * math.sqrt(k) * (1 - 2 / (9 * k)) ** 1.5).clamp(min=1e-6, max=1.5)
        shrink = (median / 2).tan()  # the Möbius map that takes a right angle, the median of uniform directions, to that angle
        height = _QUARTILE / math.sqrt(self.n - 1.15)  # about the median height of uniform directions in a hemisphere
        power = median.cos().log() / math.log(height)  # takes that height to the cosine of the angle
        self.params.bias[:, 0] = torch.where(narrow & ~two, (1 - shrink) / (2 * shrink.sqrt()), 0.0)
        self.params.bias[:, -1] = torch.where(narrow & two, power.log(), 0.0)
        return ~narrow


def _power(raw: Tensor) -> Tensor:
    """A power between 0 and e: with higher ones, small heights would all become zero."""
    return torch.where(raw < 0, raw, raw.tanh()).exp()


def _to_both_ends(x: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Points with their heights along the first axis raised to a power, and the log ratio of volumes. The inverse power gives the inverse map."""
    n, flat, square = x.shape[-1], x[..., 1:].square().sum(-1).clamp(min=1e-60), x[..., 0].square().clamp(min=1e-60)
    near = flat < 0.5  # to an end, where the height is known by what lies across
    log_square = torch.where(near, (-torch.where(near, flat, 0.5)).log1p(), square.log())
    ratio = -(power * log_square).expm1() / flat  # of squares of what lies across
    height = x[..., 0].sign() * (0.5 * power * log_square).exp()
    y = torch.cat([height.unsqueeze(-1), ratio.sqrt().unsqueeze(-1) * x[..., 1:]], -1)
    return y, power.log() + 0.5 * (power - 1) * log_square + 0.5 * (n - 3) * ratio.log()


class DirectionShapes(FlowTransform):
    """A flow of each of several directions: they share the layers, whose context are learned features of each direction.

    Args:
        n, count, context_dim: as those of :class:`DirectionCentres`.
        layers: number of pairs of an affine map and a spline of heights; the last spline is around the first axis, where the centres are.

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
            parts[-1].params.bias[-n:] = torch.eye(n)[0]
        self.inner = Compose(parts)

    def _features(self, context: Tensor | None) -> Tensor:
        if self.net is None or context is None:
            return self.features
        return self.features + self.net(context).unflatten(-1, self.features.shape)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, ladj = self.inner.forward_and_ladj(x.unflatten(-1, (self.count, self.n)), self._features(context))
        return y.flatten(-2), ladj.sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = self.inner.inverse_and_ladj(y.unflatten(-1, (self.count, self.n)), self._features(context))
        return x.flatten(-2), ladj.sum(-1)


@dataclass(frozen=True)
class DirectionBlock(Block):
    """The directions of one site."""

    @classmethod
    def of(cls, sites: Sequence[LatentSite]) -> list[Self]:
        own = [(s, s.manifold) for s in sites if s.manifold is not None and s.manifold.kind == Sphere.kind]
        return [cls(index_of([s]), sphere, s.size // sphere.size) for s, sphere in own]

    def build(self, sites: Sequence[LatentSite], loc: Tensor, context_dim: int, config: Mapping[str, Any]) -> tuple[nn.Module, Compose]:
        n = self.space.size
        centres = DirectionCentres(n, self.count, context_dim)
        centres.start_at(loc.unflatten(-1, (self.count, n)).to(centres.frames))
        shapes = [DirectionShapes(n, self.count, context_dim)] if config["flow"] is not None else []
        return UniformPoints(self.space, self.count), Compose([*shapes, centres])

    def lift(self, run: Tensor) -> tuple[Tensor, Tensor]:
        """Divided by their lengths, which are log-normal and independent."""
        n = self.space.size
        run = run.unflatten(-1, (-1, n))
        length = torch.linalg.vector_norm(run, dim=-1, keepdim=True)
        variance = _LENGTHS / n  # of log length: lengths stay near 1 in any dimension
        log = length.squeeze(-1).log()
        extra = (-(log**2) / (2 * variance) - n * log - 0.5 * math.log(2 * math.pi * variance)).sum(-1)
        return (run / length).flatten(-2), extra

    def loc(self, layers: Layers) -> Tensor:
        return _centres(layers).poles.flatten()

    def start_at(self, layers: Layers, start: Start, before: Tensor) -> bool:
        n = self.space.size
        index = self.index.to(start.loc.device).unflatten(0, (-1, n))
        centre, rows = start.loc[index], start.scale_tril[index]
        length = centre.norm(dim=-1, keepdim=True)
        poles = centre / length
        basis = self.space.tangent_basis(poles)
        root, others = triangle(basis.mT @ rows / length.unsqueeze(-1)), None
        if start.log_density is not None:
            root = torch.stack([_with_measured_variances(start.log_density, start, *at) for at in zip(index, poles, basis, root, strict=True)])
            others = other_modes(start.log_density, start.loc, index.flatten(), poles, root.norm(dim=(-1, -2)) / math.sqrt(n - 1))
        return bool(_centres(layers).start_at(poles, root, others).any())


def _centres(layers: Layers) -> DirectionCentres:
    return cast(DirectionCentres, layers[-1])


def _with_measured_variances(
    log_density: Callable[[Tensor], Tensor], start: Start, index: Tensor, pole: Tensor, basis: Tensor, root: Tensor
) -> Tensor:
    """The Cholesky factor of a direction's covariance with variances measured along its axes, where ``root`` has those of a curvature."""
    variances, axes = torch.linalg.eigh(root @ root.mT)
    along = basis @ axes * start.loc[index].norm()
    stiffness = (along * (start.precision[index][:, index] @ along)).sum(0)
    measured = circle_variances(log_density, start.loc, index, pole, basis @ axes, (1 / (stiffness * variances)).clamp(max=1.0))
    return triangle(axes * torch.where(measured.isfinite(), measured, variances).sqrt())
