"""The monotone rational-quadratic spline with a guaranteed range of slopes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

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
    _periodic: ClassVar[bool] = False  # whether the bins go on outside, or lines of slope one

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

    def _edges(self, raw: Tensor) -> Tensor:
        """Edges of the bins, ``(2, K + 3, ...)``: along x and along y, with one more on either side for what lies outside.

        They are one matrix times the shares of the bins in width and height: it mixes the two, gives each bin a least share, and sums them up.
        """
        k, m, least = self.bins, self._mix, 1e-3 / self.bins
        shares = torch.softmax(raw.unflatten(0, (2, k)), 1)
        edge = torch.arange(-1, k + 2, dtype=raw.dtype, device=raw.device).unsqueeze(-1)
        number = edge if self._periodic else edge.clamp(0, k)  # of bins before it; the tails are bins of secant 1 that have no share
        times = ((number - edge[1:-2].mT) / k).ceil()  # that each bin is before it
        before = 2 * self.bound * (times * (1 - k * least) + number * least)
        own, other = (1 - m) * before, m * before
        matrix = torch.cat([torch.cat([own, other], 1), torch.cat([other, own], 1)])
        start = (edge - number - self.bound).repeat(2, 1)
        return torch.addmm(start, matrix, shares.reshape(2 * k, -1)).reshape(2, k + 3, *raw.shape[1:])

    def _slopes(self, smaller: Tensor, bends: Tensor, knot: Tensor) -> Tensor:
        """The slopes at knots ``0 .. K`` from the smaller of the neighbouring secants; one at the two ends, to meet the tails."""
        bend = soft_clamp(bends.gather(0, (knot - 1).clamp(0, self.bins - 2)), math.log(_KNOT_RATIO))
        return torch.where((knot > 0) & (knot < self.bins), smaller * bend.exp(), torch.ones_like(smaller))

    def _bin(self, at: Tensor, params: Tensor, axis: int) -> tuple[Tensor, ...]:
        """The bin that holds ``at``: left and bottom edge, width, height, secant, slopes at its left and right ends."""
        k = self.bins
        # Knots first: sums and selections then run along rows of points, several times faster than across them.
        raw, bends = params.movedim(-1, 0).split([2 * k, params.shape[-1] - 2 * k])
        edges = self._edges(raw)
        index = (at >= edges[axis, 2 : k + 1]).sum(0)
        near = torch.stack([index, index + 1, index + 2, index + 3])  # the edges of the bin and of its neighbours
        x, y = edges.gather(1, near.expand(2, *near.shape))
        # Differences of the edges, so that a point's fraction of its bin lies in [0, 1] in floating point too: clamping it there
        # would lose the gradient.
        width, height = x.diff(dim=0), y.diff(dim=0)
        secant = height / width
        d0, d1 = self._slopes(torch.minimum(secant[:-1], secant[1:]), bends, near[:2])
        return x[1], y[1], width[1], height[1], secant[1], d0, d1

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
        left, bottom, w, h, s, d0, d1 = self._bin(x, params, 0)
        y, slope = _evaluate((x - left) / w, s, d0, d1)
        return bottom + h * y, slope.log()

    def _unbend(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse map inside the interval."""
        left, bottom, w, h, s, d0, d1 = self._bin(y, params, 1)
        r = (y - bottom) / h
        # r is the fraction of the height: solve (s - d0 + r e) t^2 + (d0 - r e) t - r s = 0 with e = d0 + d1 - 2 s, by the
        # stable root and with the discriminant as a sum of squares, which neither cancels nor vanishes.
        discriminant = (d0 * (1 - r) - d1 * r) ** 2 + 4 * s * s * r * (1 - r)
        t = 2 * r * s / (d0 - r * (d0 + d1 - 2 * s) + discriminant.sqrt())
        return left + w * t, -_evaluate(t, s, d0, d1)[1].log()


def _evaluate(t: Tensor, s: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """Fraction of the height and slope at the fraction ``t`` of the width: quadratics over a quadratic, by de Casteljau's interpolations."""
    a, b = torch.lerp(d0, s, t), torch.lerp(s, d1, t)
    ratio = 1 / torch.lerp(b, a, t)
    return t * a * ratio, torch.lerp(a, b, t) * (s * ratio) ** 2
