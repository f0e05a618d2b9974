"""The rational-quadratic spline of a closed interval."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .affine import soft_clamp
from .spline import _KNOT_RATIO, RationalQuadraticSpline

__all__ = ["IntervalSpline"]


@dataclass(frozen=True)
class IntervalSpline(RationalQuadraticSpline):
    r"""Bends the interval :math:`[-1, 1]` onto itself by a rational-quadratic spline whose slopes at the two ends are free.

    The spline is that of :class:`~pyro_flows.univariate.RationalQuadraticSpline`, with the same bounds of its slope, for coordinates that have
    nothing beyond their ends, such as the height of a point of a sphere. Points outside are moved to the nearer end.

    Args:
        bins: number of bins :math:`K`.
        min_slope: lower bound of the slope, anywhere.

    Cost: :math:`O(K)` a coordinate in both directions; both are closed formulas. It has :math:`3K + 1` parameters.

    Example:
        >>> import torch
        >>> spline, params = IntervalSpline(bins=4), torch.linspace(-1, 2, 13)
        >>> y, _ = spline.forward(torch.tensor(0.3), params)
        >>> round(spline.inverse(y, params)[0].item(), 4)
        0.3

    Reference: Neural spline flows (Durkan et al., 2019), https://arxiv.org/abs/1906.04032
    """

    bound: float = field(default=1.0, init=False)

    @property
    def num_params(self) -> int:
        """Widths and heights of the bins, slopes at all knots."""
        return 3 * self.bins + 1

    def _edges(self, raw: Tensor) -> Tensor:
        edges = super()._edges(raw)  # beyond the ends put the end bins once more, so that the secants outside set no bound
        return torch.cat([2 * edges[:, 1:2] - edges[:, 2:3], edges[:, 1:-1], 2 * edges[:, -2:-1] - edges[:, -3:-2]], 1)

    def _slopes(self, smaller: Tensor, bends: Tensor, knot: Tensor) -> Tensor:
        return smaller * soft_clamp(bends.gather(0, knot), math.log(_KNOT_RATIO)).exp()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._bend(x.clamp(-1, 1), params)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return self._unbend(y.clamp(-1, 1), params)
