"""Quadrature rules on the circle, the sphere and the simplex of three parts: what a density must integrate to one by."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["gauss_legendre", "circle_grid", "sphere_grid", "simplex_grid"]


@functools.lru_cache(None)
def gauss_legendre(m: int) -> tuple[Tensor, Tensor]:
    """Nodes in (-1, 1) and weights, both ``(m,)``."""
    nodes, weights = np.polynomial.legendre.leggauss(m)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def circle_grid(m: int) -> tuple[Tensor, Tensor]:
    """``m`` equal steps of the angle: spectrally accurate for smooth functions. Angles and weights, both ``(m,)``."""
    angle = torch.arange(m, dtype=torch.float64) * (2 * math.pi / m) - math.pi
    return angle, torch.full_like(angle, 2 * math.pi / m)


def sphere_grid(m: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre in height times ``2 m`` steps of the azimuth: points ``(2 m^2, 3)`` and weights."""
    height, weight = gauss_legendre(m)
    azimuth, step = circle_grid(2 * m)
    z, phi = height.repeat_interleave(2 * m), azimuth.repeat(m)
    r = (1 - z * z).sqrt()
    return torch.stack([r * phi.cos(), r * phi.sin(), z], -1), weight.repeat_interleave(2 * m) * step.repeat(m)


def simplex_grid(m: int) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre on the simplex of three parts, graded towards the edges, where densities may have poles: points ``(m^2, 3)`` and weights."""
    nodes, weights = gauss_legendre(m)
    u, k = (nodes + 1) / 2, 5
    low, high = u**k, (1 - u) ** k
    g, rest = low / (low + high), high / (low + high)  # one minus the other without cancellation
    slope = weights / 2 * k * (u * (1 - u)) ** (k - 1) / (low + high) ** 2
    i, j = torch.arange(m).repeat_interleave(m), torch.arange(m).repeat(m)
    return torch.stack([g[i], rest[i] * g[j], rest[i] * rest[j]], -1), slope[i] * slope[j] * rest[i]
