"""The monotone rational-quadratic spline with a guaranteed range of slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .affine import soft_clamp

__all__ = ["RationalQuadraticSpline"]

_KNOT_RATIO = 4.0  # a knot's slope lies within this factor of the smaller neighbouring secant


@dataclass(frozen=True)
class RationalQuadraticSpline:
    r"""Bends :math:`[-B, B]` onto itself by a rational-quadratic spline; the identity outside, with equal slopes at the seam.

    With :math:`p, q` the softmaxes of the width and height parameters, bins have widths :math:`2B((1-m)p + mq)` and heights
    :math:`2B((1-m)q + mp)`, so that every secant lies in :math:`[m/(1-m), (1-m)/m]`; the slope at an inner knot is the smaller of its two
    secants times a factor in :math:`[1/4, 4]`. Inside a bin of secant :math:`s` and relative knot slopes :math:`a, b \le M` the slope is at least
    :math:`s \min(a, b, 2/(M+1))`, so with :math:`m` chosen from ``min_slope`` **every** slope is at least ``min_slope``, between the knots too.
    It is at most :math:`s \max(a, b, 2)`, so nowhere above :math:`4/\max(\sqrt{\mu}, 4\mu)` with :math:`\mu` the ``min_slope``.

    Args:
        bins: number of bins :math:`K`.
        bound: half-width :math:`B` of the interval that is bent.
        min_slope: lower bound of the slope, anywhere.

    Cost: :math:`O(K)` a coordinate in both directions; both are closed formulas. It has :math:`3K - 1` parameters.

    Example:
        >>> import torch
        >>> spline, params = RationalQuadraticSpline(bins=4), torch.linspace(-2, 2, 11)
        >>> y, log_slope = spline.forward(torch.tensor(0.3), params)
        >>> x, _ = spline.inverse(y, params)
        >>> round(x.item(), 4)
        0.3

    Reference: Neural spline flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032
    """

    bins: int = 8
    bound: float = 5.0
    min_slope: float = 1e-3

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise OptionError(f"RationalQuadraticSpline: bins must be at least 2, got {self.bins}")
        if not self.bound > 0:
            raise OptionError(f"RationalQuadraticSpline: bound must be positive, got {self.bound}")
        if not 0 < self.min_slope < 0.1:
            raise OptionError(f"RationalQuadraticSpline: min_slope must lie in (0, 0.1), got {self.min_slope}")

    @property
    def num_params(self) -> int:
        """Widths and heights of the bins, slopes at the inner knots."""
        return 3 * self.bins - 1

    @property
    def _mix(self) -> float:
        # An edge bin meets slope 1 at the seam: relative to a secant s it is M = 1/s, so the in-bin minimum is 2 s^2 / (1 + s) > min_slope
        # for s >= sqrt(min_slope); the inner bins need s / 4 >= min_slope.
        secant = max(math.sqrt(self.min_slope), _KNOT_RATIO * self.min_slope)
        return secant / (1 + secant)

    def _knots(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Left edges, bottom edges, widths, heights ``(..., K)`` and knot slopes ``(..., K + 1)``."""
        k, m = self.bins, self._mix
        raw_w, raw_h, raw_d = params.split([k, k, params.shape[-1] - 2 * k], -1)
        p, q = torch.softmax(raw_w, -1), torch.softmax(raw_h, -1)
        p, q = p * (1 - 1e-3) + 1e-3 / k, q * (1 - 1e-3) + 1e-3 / k  # no bin vanishes
        xs, ys = self._edges(p + m * (q - p)), self._edges(q + m * (p - q))
        # Differences of the edges, so that a point's place in its bin lies in [0, 1] in floating point too: clamping it there
        # would lose the gradient.
        widths, heights = xs.diff(dim=-1), ys.diff(dim=-1)
        secants = heights / widths
        return xs[..., :-1], ys[..., :-1], widths, heights, self._slopes(secants, soft_clamp(raw_d, math.log(_KNOT_RATIO)).exp())

    def _slopes(self, secants: Tensor, factors: Tensor) -> Tensor:
        """The slopes at all ``K + 1`` knots; one at the two ends."""
        inner = torch.minimum(secants[..., 1:], secants[..., :-1]) * factors
        one = torch.ones_like(inner[..., :1])
        return torch.cat([one, inner, one], -1)

    def _edges(self, fractions: Tensor) -> Tensor:
        """The ``K + 1`` edges of bins that take these fractions of the interval; the outer ones exactly at its ends."""
        inner = 2 * self.bound * fractions[..., :-1].cumsum(-1) - self.bound
        end = torch.full_like(inner[..., :1], self.bound)
        return torch.cat([-end, inner, end], -1)

    def _bin(self, at: Tensor, edges: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The quantities of the bin that holds ``at``: left, bottom, width, height, slope at its left and right ends."""
        lefts, bottoms, widths, heights, slopes = params
        index = (at.unsqueeze(-1) >= edges[..., 1:]).sum(-1, keepdim=True)
        picked = [v.gather(-1, index).squeeze(-1) for v in (lefts, bottoms, widths, heights)]
        return (*picked, slopes.gather(-1, index).squeeze(-1), slopes.gather(-1, index + 1).squeeze(-1))

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = x.abs() < self.bound
        y, log_slope = self._bend(x.clamp(-self.bound, self.bound), params)  # before evaluating: where() would not mask the gradient
        return torch.where(inside, y, x), torch.where(inside, log_slope, torch.zeros_like(x))

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        inside = y.abs() < self.bound
        x, log_slope = self._unbend(y.clamp(-self.bound, self.bound), params)
        return torch.where(inside, x, y), torch.where(inside, log_slope, torch.zeros_like(y))

    def _bend(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The forward map inside the interval."""
        knots = self._knots(params)
        left, bottom, w, h, d0, d1 = self._bin(x, knots[0], knots)
        s, t = h / w, (x - left) / w
        u = t * (1 - t)
        denominator = s + (d0 + d1 - 2 * s) * u
        y = bottom + h * (s * t * t + d0 * u) / denominator
        return y, 2 * (s / denominator).log() + (d1 * t * t + 2 * s * u + d0 * (1 - t) ** 2).log()

    def _unbend(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse map inside the interval."""
        knots = self._knots(params)
        left, bottom, w, h, d0, d1 = self._bin(y, knots[1], knots)
        s, r = h / w, (y - bottom) / h
        # r is the fraction of the height: solve (s - d0 + r e) t^2 + (d0 - r e) t - r s = 0 with e = d0 + d1 - 2 s, by the
        # stable root and with the discriminant as a sum of squares, which neither cancels nor vanishes.
        e = d0 + d1 - 2 * s
        discriminant = (d0 * (1 - r) - d1 * r) ** 2 + 4 * s * s * r * (1 - r)
        t = 2 * r * s / (d0 - r * e + discriminant.sqrt())
        u = t * (1 - t)
        denominator = s + e * u
        return left + w * t, -2 * (s / denominator).log() - (d1 * t * t + 2 * s * u + d0 * (1 - t) ** 2).log()
