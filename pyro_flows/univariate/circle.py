"""Maps of the circle besides the spline: turns, and mixtures of Moebius maps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..numerics import invert_monotone
from .circular import _wrap

__all__ = ["CircularShift", "MobiusMixture"]

_MAX_RADIUS = 0.98  # of the centres: slopes lie between 1/99 and 99


@dataclass(frozen=True)
class CircularShift:
    r"""Turns the circle: :math:`\theta' = \theta + t`, wrapped into :math:`[-\pi, \pi)`."""

    num_params = 1
    circular: ClassVar[bool] = True

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return _wrap(x + params[..., 0]), torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return _wrap(y - params[..., 0]), torch.zeros_like(y)


@dataclass(frozen=True)
class MobiusMixture:
    r"""An average of Möbius maps of the circle, then a turn: :math:`\theta' = t + \sum_k \rho_k h_k(\theta)`, wrapped into :math:`[-\pi, \pi)`.

    .. math:: h_k(\theta) = \theta + 2\,\mathrm{atan2}(r_k \sin(\theta - \phi_k),\ 1 - r_k\cos(\theta - \phi_k)), \qquad
        h_k'(\theta) = \frac{1 - r_k^2}{1 - 2 r_k\cos(\theta - \phi_k) + r_k^2}

    The centres :math:`r_k e^{i\phi_k}` lie in the disc of radius 0.98. Zero parameters put all of them at 0, which is the identity; each has a unit
    of its own, from 1/2 to 2, so that training pulls them apart.

    Args:
        components: number of maps :math:`K`.

    Cost: :math:`O(K)` forward; the inverse is a root and takes about ten times that. It has :math:`3K + 1` parameters. Smooth, unlike a spline.

    Raises:
        OptionError: fewer than one component.
        InversionError: a root was not found.

    Example:
        >>> f, params = MobiusMixture(components=2), torch.linspace(-1, 2, 7)
        >>> y, _ = f.forward(torch.tensor(0.3), params)
        >>> round(f.inverse(y, params)[0].item(), 4)
        0.3

    Reference: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428
    """

    components: int = 4
    circular: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.components < 1:
            raise OptionError(f"MobiusMixture: components must be at least 1, got {self.components}")

    @property
    def num_params(self) -> int:
        """The centres, two numbers each, their weights, and the turn."""
        return 3 * self.components + 1

    def _lifted(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        """The map as one of the line, without the turn: it grows by a full turn over each."""
        k = self.components
        raw_weight, *raw_centre = params.split([k, k, k], -1)
        unit = torch.linspace(-math.log(2), math.log(2), k, dtype=params.dtype, device=params.device).exp() if k > 1 else 1.0
        a, b = (unit * c for c in raw_centre)
        shrink = _MAX_RADIUS / (1 + a * a + b * b).sqrt()
        a, b = a * shrink, b * shrink
        cos, sin = x.cos().unsqueeze(-1), x.sin().unsqueeze(-1)
        along, across = a * cos + b * sin, a * sin - b * cos  # r cos(x - phi), r sin(x - phi)
        weight = raw_weight.softmax(-1)
        slope = (weight * (1 - a * a - b * b) / ((1 - along) ** 2 + across**2)).sum(-1)
        return x + 2 * (weight * torch.atan2(across, 1 - along)).sum(-1), slope.log()

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = self._lifted(x, params[..., :-1])
        return _wrap(y + params[..., -1]), log_slope

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        x = invert_monotone(self._lifted, _wrap(y - params[..., -1]), params[..., :-1])
        return _wrap(x), -self._lifted(x, params[..., :-1])[1]
