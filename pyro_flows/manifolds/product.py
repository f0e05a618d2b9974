"""Points on several manifolds at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from ..errors import OptionError, SupportError
from .manifold import Manifold

__all__ = ["Product"]


class ProductConstraint(constraints.Constraint):
    """Consecutive coordinates, each run with its own constraint."""

    event_dim = 1

    def __init__(self, parts: Sequence[Manifold]) -> None:
        self.parts = tuple(parts)

    def check(self, value: Tensor) -> Tensor:
        runs = value.split([p.size for p in self.parts], -1)
        return torch.stack([p.support.check(run) for p, run in zip(self.parts, runs, strict=True)]).all(0)

    def __repr__(self) -> str:
        return f"Product({', '.join(map(repr, self.parts))})"  # with the word sphere in it, which Pyro's guides look for


@dataclass(frozen=True, init=False)
class Product(Manifold):
    """The product of manifolds: their coordinates one after the other, with the product of their measures.

    Args:
        parts: the manifolds.

    Raises:
        OptionError: no parts, or one that is not a manifold.

    Example:
        >>> from pyro_flows.manifolds import Sphere, Torus
        >>> Product(Sphere(3), Torus(2)).random_uniform((7,)).shape
        torch.Size([7, 5])
    """

    parts: tuple[Manifold, ...]

    def __init__(self, *parts: Manifold) -> None:
        if not parts or not all(isinstance(p, Manifold) for p in parts):
            raise OptionError(f"Product: give manifolds, such as Product(Sphere(3), Torus(2)); got {parts!r}")
        object.__setattr__(self, "parts", parts)

    @property
    def measure(self) -> str:  # type: ignore[override]
        return " x ".join(p.measure for p in self.parts)

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parts)

    @property
    def intrinsic_dim(self) -> int:
        return sum(p.intrinsic_dim for p in self.parts)

    @property
    def support(self) -> constraints.Constraint:
        return ProductConstraint(self.parts)

    @property
    def log_volume(self) -> float:
        return sum(p.log_volume for p in self.parts)

    def _each(self, method: str, x: Tensor) -> list[Tensor]:
        return [getattr(p, method)(run) for p, run in zip(self.parts, x.split([p.size for p in self.parts], -1), strict=True)]

    def project(self, x: Tensor) -> Tensor:
        return torch.cat(self._each("project", x), -1)

    def distance(self, x: Tensor) -> Tensor:
        """The farthest of the parts'."""
        return torch.stack(self._each("distance", x)).amax(0)

    def tangent_basis(self, x: Tensor) -> Tensor:
        """The parts' bases along the diagonal."""
        basis, row, column = x.new_zeros(*x.shape, self.intrinsic_dim), 0, 0
        for part in self._each("tangent_basis", x):
            rows, columns = part.shape[-2:]
            basis[..., row : row + rows, column : column + columns] = part
            row, column = row + rows, column + columns
        return basis

    def radius(self, z: Tensor) -> Tensor:
        return torch.cat(self._each("radius", z), -1)

    def latent(self, name: str) -> Manifold:
        raise SupportError(f"latent site {name!r} lies on a product of manifolds, {self.support}: draw its parts at one site each")

    def random_uniform(self, shape: Sequence[int] = (), dtype: Any = None, device: Any = None) -> Tensor:
        return torch.cat([p.random_uniform(shape, dtype, device) for p in self.parts], -1)

    def quadrature(self, resolution: int = 200) -> tuple[Tensor, Tensor]:
        points, weights = torch.zeros(1, 0, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        for p in self.parts:
            more, w = p.quadrature(resolution)
            i, j = torch.arange(len(points)).repeat_interleave(len(more)), torch.arange(len(more)).repeat(len(points))
            points, weights = torch.cat([points[i], more[j]], -1), weights[i] * w[j]
        return points, weights
