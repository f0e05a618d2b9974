"""A fixed map from uniform angles to ones with a tabulated density."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..manifolds import ManifoldTransform, Torus

__all__ = ["AngleProfiles"]

BINS = 256
STEP = 2 * math.pi / BINS
_FLOOR = 1e-7  # of a table's largest value: every point can be reached


class AngleProfiles(ManifoldTransform):
    r"""Maps uniform angles to ones with a density that is linear between 256 points of the circle; the identity until :meth:`tabulate`.

    In the bin after :math:`\theta_k` the distribution function is :math:`F_k + h (\rho_k t + \tfrac12 (\rho_{k+1} - \rho_k) t^2)`, with :math:`\rho`
    the density, :math:`h` the width of a bin and :math:`t` the fraction of it; the map is its inverse. The table is a buffer and not learned.

    Args:
        dim: number of angles.

    Cost: a search in the table forward; closed formulas in both directions.

    Reference: Neural importance sampling (Müller et al., 2019), https://arxiv.org/abs/1808.03856, here in one period
    """

    density: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__(Torus(dim))
        self.register_buffer("density", torch.full((dim, BINS), 0.5 / math.pi))

    @torch.no_grad()
    def tabulate(self, log_density: Tensor) -> None:
        """Take the density from its logarithm at the points ``-pi + 2 pi k / 256``, ``(dim, 256)``, up to a constant."""
        weights = log_density.softmax(-1)
        weights = weights + _FLOOR * weights.amax(-1, keepdim=True)
        self.density.copy_(weights / weights.sum(-1, keepdim=True) / STEP)

    def _starts(self) -> Tensor:
        """What lies below each bin, ``(dim, 256)``."""
        mass = 0.5 * STEP * (self.density + self.density.roll(-1, 1))
        return mass.cumsum(1) - mass

    def _bin(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """The density where bins begin, and how much it grows in them."""
        left = self.density.gather(1, k)
        return left, self.density.roll(-1, 1).gather(1, k) - left

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        below, shape = _by_angle(0.5 * x / math.pi + 0.5)
        starts = self._starts()
        k = torch.searchsorted(starts[:, 1:].contiguous(), below.detach(), right=True)
        left, growth = self._bin(k)
        m = (below - starts.gather(1, k)) / STEP
        there = (left * left + 2 * growth * m).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
        y = STEP * (k + 2 * m / (left + there)) - math.pi
        return _by_point(y, shape), -_by_point((2 * math.pi * there).log(), shape).sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        bins, shape = _by_angle((y + math.pi) / STEP)
        k = bins.detach().nan_to_num(0.0).floor().clamp(0, BINS - 1).long()  # NaN has no bin, and stays NaN
        left, growth = self._bin(k)
        t = bins - k
        below = self._starts().gather(1, k) + STEP * t * (left + 0.5 * growth * t)
        ladj = _by_point((2 * math.pi * (left + growth * t)).log(), shape).sum(-1)
        return _by_point(2 * math.pi * below - math.pi, shape), ladj


def _by_angle(x: Tensor) -> tuple[Tensor, torch.Size]:
    """``(*batch, dim) -> (dim, points)``, and the shape that :func:`_by_point` wants."""
    moved = x.movedim(-1, 0)
    return moved.reshape(len(moved), -1).contiguous(), moved.shape


def _by_point(x: Tensor, shape: torch.Size) -> Tensor:
    return x.reshape(shape).movedim(0, -1)
