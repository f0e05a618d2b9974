"""What transforms and distributions ask of a manifold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from pyro.distributions import TorchDistribution, constraints
from torch import Tensor
from torch.distributions import Distribution

from ..errors import OptionError, ShapeError, SupportError
from ..numerics.introspection import is_traced

__all__ = ["Manifold"]


def can_look(x: Tensor) -> bool:
    """Whether values can be looked at: not while a graph is being made."""
    return not is_traced() and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def tolerance(dtype: torch.dtype) -> float:
    """How far off its manifold rounding may leave a point: in double precision what single precision does, from which many points are converted."""
    return max(1e-6, 1e3 * torch.finfo(dtype).eps)


class Manifold:
    """What transforms and distributions ask of a manifold. Points are vectors of shape ``(*batch, size)``.

    ``size`` is the number of coordinates, ``intrinsic_dim`` the dimension, ``measure`` says in words what densities refer to, ``kind`` what its
    points are. ``period`` is the length after which a coordinate repeats: infinite but for angles. A start of inference may be ``start_tolerance``
    off the manifold; where that is ``None``, the site's support decides.
    """

    measure: str = ""
    kind: str = "points"
    period: float = math.inf
    start_tolerance: float | None = None

    @property
    def size(self) -> int:
        """Number of coordinates of a point."""
        raise NotImplementedError

    @property
    def intrinsic_dim(self) -> int:
        """Dimension of the manifold."""
        return self.size

    @property
    def support(self) -> constraints.Constraint:
        """The constraint that points obey."""
        raise NotImplementedError

    @property
    def log_volume(self) -> float:
        """Logarithm of the whole manifold's measure."""
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """The point of the manifold that a vector stands for."""
        raise NotImplementedError

    def distance(self, x: Tensor) -> Tensor:
        """How far points ``(*batch, size)`` are from the manifold, ``(*batch,)``."""
        raise NotImplementedError

    def tangent_basis(self, x: Tensor) -> Tensor:
        """An orthonormal basis of the tangent space at each point, ``(*batch, size, intrinsic_dim)``."""
        raise NotImplementedError

    def tangent_noise(self, x: Tensor) -> Tensor:
        """A standard normal vector of the tangent space at each point, the shape of ``x``: a probe for traces."""
        noise = torch.randn(*x.shape[:-1], self.intrinsic_dim, 1, dtype=x.dtype, device=x.device)
        return (self.tangent_basis(x) @ noise).squeeze(-1)

    def geodesic(self, start: Tensor, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the shortest path between points is at times ``t (*batch, 1)`` from 0 to 1, and its velocity there."""
        raise OptionError(f"{self!r} has no formula for geodesics: spheres and tori have one")

    def radius(self, z: Tensor) -> Tensor:
        """Coordinatewise factor ``r`` that makes ``z -> r(z) f(z / r(z))`` a homogeneous extension of a map, the shape of ``z``."""
        raise NotImplementedError

    def random_uniform(self, shape: Sequence[int] = (), dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """Independent uniform points, ``(*shape, size)``."""
        raise NotImplementedError

    def quadrature(self, resolution: int = 200) -> tuple[Tensor, Tensor]:
        """Points ``(N, size)`` and weights ``(N,)`` of a rule for integrals over the manifold's measure, in double precision."""
        raise OptionError(f"{self!r} has no quadrature rule: circles, the sphere of R^3, the simplex of three parts and products of these have one")

    def contains(self, x: Tensor) -> Tensor:
        """Whether points ``(*batch, size)`` lie on the manifold, ``(*batch,)``, but for rounding: see :func:`tolerance`. NaN lies off it."""
        return self.distance(x) <= tolerance(x.dtype)

    def complaint(self, x: Tensor) -> str:
        """What is to be said of points ``(*batch, size)`` of which some lie off the manifold: how many, which is worst, how far, what to do."""
        far, outside = self.distance(x), ~self.contains(x)
        worst = int(far.nan_to_num(torch.inf).flatten().argmax())
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), far.shape)) if far.dim() else ()
        away, point = far.flatten()[worst].item(), x.expand(*far.shape, self.size).reshape(-1, self.size)[worst, :5].tolist()
        how = f"{away:.3g} away" if math.isfinite(away) else f"({', '.join(f'{v:.3g}' for v in point)}{', ...' * (self.size > 5)})"
        return (
            f"{int(outside.sum())} of {far.numel()} points do not lie on {self!r}; the worst, at index {index}, is {how}: {self._remedy(x)}"
        )

    def check(self, x: Tensor, name: str) -> None:
        """Raise a ``SupportError`` for points that do not lie on the manifold; silent inside traced graphs, which cannot look."""
        if can_look(x) and x.numel() and not bool(self.contains(x.detach()).all()):
            raise SupportError(f"{name}: {self.complaint(x.detach())}")

    def validate(self, value: Tensor, distribution: Distribution) -> None:
        """What a distribution on the manifold asks of a point before it gives the density there."""
        name, shape = type(distribution).__name__, distribution.batch_shape
        if value.dim() == 0 or value.shape[-1] != self.size:
            raise ShapeError(f"{name} expects points of shape (*batch, {self.size}), got {tuple(value.shape)}")
        try:
            torch.broadcast_shapes(value.shape[:-1], shape)
        except RuntimeError:
            raise ShapeError(f"{name} of batch shape {tuple(shape)} does not broadcast with points of shape {tuple(value.shape)}") from None
        self.check(value, name)

    # What inference asks. A new manifold overrides what differs.

    @property
    def single(self) -> Manifold:
        """The manifold of one direction or one angle: the coordinates that belong together. The manifold itself, but for tori."""
        return self

    def latent(self, name: str) -> Manifold | None:
        """The manifold that inference keeps a latent site on; ``None`` where it takes a bijection from the reals instead.

        Args:
            name: the site's name, for errors.
        """
        return self

    def uniform(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> TorchDistribution:
        """The uniform distribution, for flows to start from."""
        raise OptionError(f"Uniform: give a Sphere, a Simplex or a Torus, got {self!r}")

    def start(self, fn: TorchDistribution) -> Tensor | None:
        """A value of a site with prior ``fn`` to start inference at; ``None`` where a median of draws will do."""
        return None

    def unwrap(self, draws: Tensor) -> Tensor:
        """Draws ``(N, ...)`` as numbers whose means and quantiles are right; most manifolds' are."""
        return draws

    def features(self, points: Tensor) -> Tensor:
        """What a net sees of points, ``(*batch, size) -> (*batch, feature_dim)``: smooth, without a seam."""
        return points

    @property
    def feature_dim(self) -> int:
        """Size of :meth:`features`."""
        return self.size

    def all_round(self, point: Tensor, count: int) -> Tensor:
        """A point and uniform ones all round the manifold, ``(size,) -> (count, size)``."""
        return torch.cat([point[None], self.random_uniform((count - 1,)).to(point)])

    def normal_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the standard normal vectors that values of a shape are made of, see :meth:`from_normal`."""
        raise OptionError(f"{self!r} is not made of normal vectors: spheres and tori are")

    def from_normal(self, z: Tensor) -> Tensor:
        """The values that normal vectors stand for; standard normal vectors give uniform values."""
        raise OptionError(f"{self!r} is not made of normal vectors: spheres and tori are")

    def to_normal(self, value: Tensor) -> Tensor:
        """Vectors that :meth:`from_normal` takes to values."""
        raise OptionError(f"{self!r} is not made of normal vectors: spheres and tori are")

    def _remedy(self, x: Tensor) -> str:
        return f"{self!r}.project(x) gives the points that they stand for"
