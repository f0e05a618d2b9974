"""Maps of the circle besides the spline: turns, mixtures of Moebius maps, and one that gathers it around a point."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import OptionError
from ..numerics import invert_monotone
from .affine import soft_clamp
from .circular import _wrap

__all__ = ["CircularGather", "CircularShift", "MobiusMixture"]

_MAX_RADIUS = 0.98  # of the centres: slopes lie between 1/99 and 99
_PEAK = math.sqrt(2 / math.pi)  # the slope of the normal score at 0
_NARROWEST, _THINNEST = 16.0, 24.0  # e^-16 rad; tails that weigh e^-24
_HEAVIEST = 8.0  # tails that weigh e^8, next to which what is left of the slope at 0 is a difference of nearly equal numbers


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


@dataclass(frozen=True)
class CircularGather:
    r"""Gathers the circle around 0, with tails as thin as a normal distribution's, then turns it.

    .. math:: \tan\tfrac{\theta' - t}{2} = e^a \left(e^{-b}\,\tau + (1 - e^{-b})\sqrt{\pi/2}\,
        \Phi^{-1}\bigl(\tfrac12 + \tfrac1\pi\arctan\tau\bigr)\right), \qquad \tau = \tan\tfrac{\theta}{2}

    The slope at 0 is :math:`e^a`. With :math:`b = 0` it is a Möbius map, and uniform angles get a wrapped Cauchy distribution, whose tails are heavy;
    with :math:`b = 4` they are nearly normal where that is narrow, of standard deviation :math:`\sqrt{2\pi}\, e^a`. The
    density is continuous and positive all the way round. Zero parameters are the identity.

    Cost: closed forward; the inverse is a root. It has three parameters, :math:`a, b, t`; :math:`a` is bounded softly by 16,
    and :math:`b` by -8 and 24.

    Example:
        >>> f, params = CircularGather(), torch.tensor([-2.0, 4.0, 0.5])
        >>> y, log_slope = f.forward(torch.tensor(1.0), params)
        >>> round(y.item(), 4), round(f.inverse(y, params)[0].item(), 4)
        (0.6405, 1.0)
    """

    num_params = 3
    circular: ClassVar[bool] = True

    @staticmethod
    def around(spread: Tensor, tail: float) -> Tensor:
        """The parameters that make uniform angles nearly normal: their standard deviation in radians, and minus the log weight of their tails."""
        radius = spread / (math.sqrt(2 * math.pi) * -math.expm1(-tail))
        a = radius.clamp(min=1e-6).log() / _NARROWEST
        return torch.stack([_NARROWEST * a.atanh(), torch.full_like(a, _THINNEST * math.atanh(tail / _THINNEST)), torch.zeros_like(a)], -1)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        t = (0.5 * _wrap(x)).tan()
        there, log_slope = _gather(t, params)
        return _wrap(2 * there.atan() + params[..., 2]), log_slope + _log_ratio(t, there)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        there = (0.5 * _wrap(y - params[..., 2])).tan()
        t = invert_monotone(_gather, there, params, start=_nearly_gathered_from(there, params))
        return 2 * t.atan(), -_gather(t, params)[1] - _log_ratio(t, there)


def _log_ratio(t: Tensor, there: Tensor) -> Tensor:
    """Of the slope in angles to that in tangents of half the angles."""
    return 2 * (torch.hypot(torch.ones_like(t), t).log() - torch.hypot(torch.ones_like(there), there).log())


def _weights(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The slope at 0, the weight of the tails, and that of the normal scores."""
    a, b = soft_clamp(params[..., 0], _NARROWEST), params[..., 1]
    b = torch.where(b < 0, soft_clamp(b, _HEAVIEST), soft_clamp(b, _THINNEST))
    return a.exp(), (-b).exp(), -torch.expm1(-b)


def _gather(t: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
    """The map of :class:`CircularGather` in tangents of half the angles, and its log slope there."""
    radius, tail, normal = _weights(params)
    sign = torch.where(t < 0, -torch.ones_like(t), torch.ones_like(t))
    beyond = torch.atan2(torch.ones_like(t), sign * t) / math.pi  # the mass of what lies farther out, exact where it is small
    score = -torch.special.ndtri(beyond)
    thin = (0.5 * score * score - 2 * torch.hypot(torch.ones_like(t), t).log()).exp()  # the slope of the scores, 1 at 0
    return radius * (tail * t + normal * sign * score / _PEAK), (radius * (tail + normal * thin)).log()


def _nearly_gathered_from(there: Tensor, params: Tensor) -> Tensor:
    """Where to look for what is mapped there: each of the two terms alone would come from farther out."""
    radius, tail, normal = _weights(params.detach())
    size = there.detach().abs() / radius
    score = _PEAK * size / normal.clamp(min=1e-6)
    return there.sign() * torch.minimum(size / tail, 1 / (math.pi * torch.special.ndtr(-score)).tan().clamp(min=1e-30))
