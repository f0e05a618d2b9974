"""Adaptive cubature of densities on two-dimensional manifolds: splines have kinks along curves, where a grid of equal steps converges slowly."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_flows import manifolds as M
from pyro_flows.manifolds.grids import gauss_legendre

NODES, CALL = 5, 200_000
START, LEVELS = 4, 11  # cells along a side at first, and how often they may be halved
TOLERANCE = 3e-10  # of a cell: the difference between its rule and those of its quarters, whose own error is several times smaller


def from_square(manifold: M.Manifold, u: Tensor) -> tuple[Tensor, Tensor]:
    """Points of a manifold and the density of its measure, at points ``(m, 2)`` of the unit square."""
    a, b = u.unbind(-1)
    if manifold == M.Sphere(3):
        polar, azimuth = math.pi * a, 2 * math.pi * b
        x = torch.stack([polar.sin() * azimuth.cos(), polar.sin() * azimuth.sin(), polar.cos()], -1)
        return x, 2 * math.pi**2 * polar.sin()
    if manifold == M.Torus(2):
        return 2 * math.pi * u - math.pi, torch.full_like(a, 4 * math.pi**2)
    assert manifold == M.Simplex(3)
    low, high = u**5, (1 - u) ** 5  # graded towards the edges, where densities may have poles
    share, rest = low / (low + high), high / (low + high)
    slope = (5 * (u * (1 - u)) ** 4 / (low + high) ** 2).prod(-1)
    p = torch.stack([share[:, 0], rest[:, 0] * share[:, 1], rest[:, 0] * rest[:, 1]], -1)
    return p, slope * rest[:, 0]


def integral(log_prob: Callable[[Tensor], Tensor], manifold: M.Manifold) -> float:
    """Of ``exp(log_prob)``: Gauss-Legendre on ``START^2`` cells, those that differ from their quarters taken apart again and again."""
    nodes, weights = gauss_legendre(NODES)
    offsets, weight = torch.cartesian_prod((nodes + 1) / 2, (nodes + 1) / 2), torch.cartesian_prod(weights / 2, weights / 2).prod(-1)
    quarters = torch.cartesian_prod(torch.arange(2), torch.arange(2)).double()

    def rule(corners: Tensor, width: float) -> Tensor:
        found = []
        for some in corners.split(CALL // len(weight)):
            x, measure = from_square(manifold, (some[:, None] + width * offsets).flatten(0, 1))
            found.append((log_prob(x).exp() * measure).unflatten(0, (-1, len(weight))) @ weight)
        return width**2 * torch.cat(found)

    width, total = 1 / START, 0.0
    corners = torch.cartesian_prod(*[torch.arange(START).double() * width] * 2)
    values = rule(corners, width)
    for level in range(LEVELS):
        width /= 2
        children = (corners[:, None] + width * quarters).flatten(0, 1)
        finer = rule(children, width)
        coarse = (finer.unflatten(0, (-1, 4)).sum(-1) - values).abs() > TOLERANCE
        coarse = coarse.repeat_interleave(4) & torch.tensor(level < LEVELS - 1)
        total += float(finer[~coarse].sum())
        corners, values = children[coarse], finer[coarse]
        if not len(corners):
            break
    return total
