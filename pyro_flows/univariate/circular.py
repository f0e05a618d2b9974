"""The rational-quadratic spline of the circle."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .affine import soft_clamp
from .spline import _KNOT_RATIO, RationalQuadraticSpline

__all__ = ["CircularSpline"]


def _wrap(angle: Tensor) -> Tensor:
    return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi


@dataclass(frozen=True)
class CircularSpline(RationalQuadraticSpline):
    r"""Bends the circle :math:`[-\pi, \pi)` onto itself by a rational-quadratic spline, then turns it by a phase.

    The spline is that of :class:`~pyro_flows.univariate.RationalQuadraticSpline`, with the same bounds of its slope, but the slope at the seam
    :math:`\pm\pi` is free and shared by both sides, so densities are continuous all the way round. Points outside are wrapped first, and
    results lie in :math:`[-\pi, \pi)`: a bijection of the circle, not of the line.

    Args:
        bins: number of bins :math:`K`.
        min_slope: lower bound of the slope, anywhere.

    Cost: :math:`O(K)` an angle in both directions; both are closed formulas. It has :math:`3K + 1` parameters.

    Example:
        >>> import torch
        >>> spline, params = CircularSpline(bins=4), torch.linspace(-1, 2, 13)
        >>> y, _ = spline.forward(torch.tensor(3.0), params)
        >>> round(y.item(), 4), round(spline.inverse(y, params)[0].item(), 4)
        (-1.4052, 3.0)

    Reference: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428
    """

    bound: float = field(default=math.pi, init=False)
    _periodic: ClassVar[bool] = True
    circular: ClassVar[bool] = True  # a map of the circle, for structures of angles

    @property
    def num_params(self) -> int:
        """Widths and heights of the bins, slopes at the knots with one for the seam, and the phase."""
        return 3 * self.bins + 1

    def _slopes(self, smaller: Tensor, bends: Tensor, knot: Tensor) -> Tensor:
        return smaller * soft_clamp(bends.gather(0, knot % self.bins), math.log(_KNOT_RATIO)).exp()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = self._bend(_wrap(x), params[..., :-1])
        return _wrap(y + params[..., -1]), log_slope

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x, log_slope = self._unbend(_wrap(y - params[..., -1]), params[..., :-1])
        return _wrap(x), log_slope
