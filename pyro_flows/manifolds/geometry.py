"""Spheres, simplices and tori as sets of points in coordinates, each with the one measure that densities on it refer to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pyro.distributions import Dirichlet, TorchDistribution, constraints
from torch import Tensor

from ..errors import ShapeError, SupportError
from .distribution import UniformOn
from .grids import circle_grid, simplex_grid, sphere_grid
from .manifold import Manifold, can_look

__all__ = ["Sphere", "Simplex", "Torus"]


def _check_size(name: str, size: int, least: int) -> None:
    if not isinstance(size, int) or size < least:
        raise ShapeError(f"{name}: the number of coordinates must be an integer, at least {least}, got {size!r}")


def unit(x: Tensor) -> Tensor:
    """``x / |x|``, for vectors whose squares neither overflow nor vanish."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


@dataclass(frozen=True)
class Sphere(Manifold):
    r"""The unit sphere :math:`S^{n-1}` of :math:`\mathbb{R}^n`, with its surface measure.

    Args:
        n: number of coordinates, at least 2: ``Sphere(2)`` is the circle, ``Sphere(3)`` the sphere of directions in space.

    Example:
        >>> round(math.exp(Sphere(3).log_volume) / math.pi, 6)
        4.0
    """

    n: int
    measure = "surface measure"
    kind = "directions"
    start_tolerance = 1e-3  # a start may be given to a few digits

    def __post_init__(self) -> None:
        _check_size("Sphere", self.n, 2)

    @property
    def size(self) -> int:
        return self.n

    @property
    def intrinsic_dim(self) -> int:
        return self.n - 1

    @property
    def support(self) -> constraints.Constraint:
        return constraints.sphere

    @property
    def log_volume(self) -> float:
        return math.log(2) + self.n / 2 * math.log(math.pi) - math.lgamma(self.n / 2)

    def project(self, x: Tensor) -> Tensor:
        """``x / |x|``, for vectors of any length but zero: a ``SupportError``, and NaN inside traced graphs, which cannot look."""
        size = x.detach().abs().amax(-1, keepdim=True)
        if can_look(size) and bool((size == 0).any()):
            raise SupportError(f"{self!r}.project: {int((size == 0).sum())} of {size.numel()} vectors are zero and have no direction: leave them out")
        return unit(x / size)

    def distance(self, x: Tensor) -> Tensor:
        return (torch.linalg.vector_norm(x, dim=-1) - 1).abs()

    def tangent_basis(self, x: Tensor) -> Tensor:
        """All but the first column of the Householder reflection that takes ``x`` to plus or minus the first axis: it never cancels."""
        first = torch.zeros_like(x)
        first[..., 0] = 1
        v = x + torch.where(x[..., :1] >= 0, 1.0, -1.0) * first
        reflection = torch.eye(self.n, dtype=x.dtype, device=x.device) - 2 * v.unsqueeze(-1) * (v / (v * v).sum(-1, keepdim=True)).unsqueeze(-2)
        return reflection[..., 1:]

    def geodesic(self, start: Tensor, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Along the great circle; between opposite points, of which there are many, along any."""
        cosine = (start * end).sum(-1, keepdim=True)
        toward = end - cosine * start
        size = torch.linalg.vector_norm(toward, dim=-1, keepdim=True)
        angle = torch.atan2(size, cosine)
        rounding = size < 16 * torch.finfo(start.dtype).eps
        toward = torch.where(rounding, self.tangent_basis(start)[..., 0], toward / torch.where(rounding, 1.0, size))
        toward = unit(toward - (start * toward).sum(-1, keepdim=True) * start)  # once more, for points that are nearly opposite
        cos, sin = (t * angle).cos(), (t * angle).sin()
        return cos * start + sin * toward, angle * (cos * toward - sin * start)

    def radius(self, z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z, dim=-1, keepdim=True).expand_as(z)

    def random_uniform(self, shape: Sequence[int] = (), dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        return unit(torch.randn(*shape, self.n, dtype=dtype, device=device))

    def quadrature(self, resolution: int = 200) -> tuple[Tensor, Tensor]:
        if self.n > 3:
            return super().quadrature(resolution)
        if self.n == 3:
            return sphere_grid(resolution)
        angle, weight = circle_grid(resolution)
        return torch.stack([angle.cos(), angle.sin()], -1), weight

    def uniform(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> TorchDistribution:
        return UniformOn(self, dtype, device, validate_args=False)

    def start(self, fn: TorchDistribution) -> Tensor:
        """A draw: a median of coordinates is no direction."""
        try:
            return fn.sample().detach()
        except NotImplementedError:  # an ImproperUniform cannot be sampled
            return self.random_uniform(fn.shape()[:-1])

    def all_round(self, point: Tensor, count: int) -> Tensor:
        """The point, its antipode, and random ones."""
        return torch.cat([point[None], -point[None], self.random_uniform((count - 2,)).to(point)])

    def normal_shape(self, shape: torch.Size) -> torch.Size:
        return shape

    def from_normal(self, z: Tensor) -> Tensor:
        return unit(z)

    def to_normal(self, value: Tensor) -> Tensor:
        return value


def helmert(n: int, like: Tensor) -> Tensor:
    """Orthonormal columns that span the vectors of sum zero, ``(n, n - 1)``: the directions of the simplex, and its ILR coordinates.

    Made where ``like`` is, in each call: nothing is copied between devices, so a CUDA graph can hold it.
    """
    row, j = torch.arange(n, device=like.device)[:, None], torch.arange(1, n, device=like.device)
    size = j.to(like.dtype)
    return ((row < j) / size - (row == j).to(like.dtype)) * (size / (size + 1)).sqrt()


@dataclass(frozen=True)
class Simplex(Manifold):
    r"""Compositions: :math:`n` positive parts of sum one, with the Lebesgue measure of the first :math:`n - 1` parts.

    This is the convention of torch's ``Dirichlet``. The surface measure of the simplex in :math:`\mathbb{R}^n` is :math:`\sqrt n` times it, so a
    log density that refers to that one is smaller by :math:`\frac12\log n`. Parts are positive: the edges do not belong to it.

    Args:
        n: number of parts, at least 2.
    """

    n: int
    measure = "Lebesgue measure of the first n - 1 parts"
    kind = "compositions"

    def __post_init__(self) -> None:
        _check_size("Simplex", self.n, 2)

    @property
    def size(self) -> int:
        return self.n

    @property
    def intrinsic_dim(self) -> int:
        return self.n - 1

    @property
    def support(self) -> constraints.Constraint:
        return constraints.simplex

    @property
    def log_volume(self) -> float:
        return -math.lgamma(self.n)

    def project(self, x: Tensor) -> Tensor:
        """The closure ``x / sum(x)`` of positive amounts."""
        return x / x.sum(-1, keepdim=True)

    def distance(self, x: Tensor) -> Tensor:
        """The sum's distance from one; infinite where a part is not positive."""
        off = (x.sum(-1) - 1).abs()
        return torch.where((x > 0).all(-1), off, torch.full_like(off, torch.inf))

    def _remedy(self, x: Tensor) -> str:
        if bool((x == 0).any()) and bool((x >= 0).all()):
            share = "x.clamp_min(delta), divided by its sum, with delta below the smallest amount that was measurable"
            return f"parts that are exactly zero have no logarithm, and density there is 0 or infinite. Replace them by a small share: {share}"
        return f"parts must be positive and sum to one; {self!r}.project(x) divides positive amounts by their sum"

    def tangent_basis(self, x: Tensor) -> Tensor:
        """Helmert's, the same everywhere."""
        return helmert(self.n, x).expand(*x.shape, self.n - 1)

    def radius(self, z: Tensor) -> Tensor:
        return z.sum(-1, keepdim=True).expand_as(z)

    def random_uniform(self, shape: Sequence[int] = (), dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        return self.project(torch.empty(*shape, self.n, dtype=dtype, device=device).exponential_())

    def quadrature(self, resolution: int = 200) -> tuple[Tensor, Tensor]:
        return simplex_grid(resolution) if self.n == 3 else super().quadrature(resolution)

    def latent(self, name: str) -> None:
        """The reals have a bijection onto it."""

    def uniform(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> TorchDistribution:
        return Dirichlet(torch.ones(self.n, dtype=dtype, device=device), validate_args=False)


@dataclass(frozen=True)
class Torus(Manifold):
    r""":math:`d` angles in :math:`[-\pi, \pi]`, both ends the same point, with the measure :math:`d\theta_1 \cdots d\theta_d`.

    Args:
        d: number of angles.

    Example:
        >>> Torus(1).project(torch.tensor([4.0]))
        tensor([-2.2832])
    """

    d: int
    measure = "Lebesgue measure of the angles"
    kind = "angles"
    period = 2 * math.pi

    def __post_init__(self) -> None:
        _check_size("Torus", self.d, 1)

    @property
    def size(self) -> int:
        return self.d

    @property
    def support(self) -> constraints.Constraint:
        return angles

    @property
    def log_volume(self) -> float:
        return self.d * math.log(2 * math.pi)

    def project(self, x: Tensor) -> Tensor:
        """Angles wrapped into ``[-pi, pi)``."""
        return torch.remainder(x + math.pi, 2 * math.pi) - math.pi

    def distance(self, x: Tensor) -> Tensor:
        """How far outside the farthest angle lies."""
        return torch.where(x.isnan(), x, (x.abs() - math.pi).clamp(min=0)).amax(-1)

    def _remedy(self, x: Tensor) -> str:
        return f"angles are in radians, between -pi and pi; {self!r}.project(x) wraps them"

    def tangent_basis(self, x: Tensor) -> Tensor:
        return torch.eye(self.d, dtype=x.dtype, device=x.device).expand(*x.shape, self.d)

    def geodesic(self, start: Tensor, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Each angle the shorter way round."""
        turn = self.project(end - start)
        return self.project(start + t * turn), turn

    def radius(self, z: Tensor) -> Tensor:
        return torch.ones_like(z)

    def random_uniform(self, shape: Sequence[int] = (), dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        return (2 * torch.rand(*shape, self.d, dtype=dtype, device=device) - 1) * math.pi

    def quadrature(self, resolution: int = 200) -> tuple[Tensor, Tensor]:
        if self.d > 2:
            return super().quadrature(resolution)
        angle, weight = circle_grid(resolution)
        return torch.cartesian_prod(*[angle] * self.d).view(-1, self.d), torch.cartesian_prod(*[weight] * self.d).view(-1, self.d).prod(-1)

    @property
    def single(self) -> Torus:
        return Torus(1)

    def uniform(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> TorchDistribution:
        return UniformOn(self, dtype, device, validate_args=False)

    def unwrap(self, draws: Tensor) -> Tensor:
        """Angles counted from their mean direction, so that means and quantiles are right on both sides of the seam."""
        mean = torch.atan2(draws.sin().mean(0), draws.cos().mean(0))
        return mean + self.project(draws - mean)

    def features(self, points: Tensor) -> Tensor:
        """Points of the circle, one after the other: cosine and sine of each angle."""
        return torch.stack([points.cos(), points.sin()], -1).flatten(-2)

    @property
    def feature_dim(self) -> int:
        return 2 * self.d

    def all_round(self, point: Tensor, count: int) -> Tensor:
        """Evenly, for one angle."""
        if self.d > 1:
            return super().all_round(point, count)
        return self.project(point + torch.arange(count).to(point).unsqueeze(-1) * (2 * math.pi / count))

    def normal_shape(self, shape: torch.Size) -> torch.Size:
        """Two numbers for each angle."""
        return shape + torch.Size([2])

    def from_normal(self, z: Tensor) -> Tensor:
        return torch.atan2(z[..., 1], z[..., 0])

    def to_normal(self, value: Tensor) -> Tensor:
        return torch.stack([value.cos(), value.sin()], -1)


angles = constraints.independent(constraints.interval(-math.pi, math.pi), 1)  # of every torus: the same object, so that supports compare equal
angles.ends_meet = True  # which a copy and a pickle keep, and the same interval of a Uniform does not have
