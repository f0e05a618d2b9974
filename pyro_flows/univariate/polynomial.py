"""Increasing polynomials: by Bernstein coefficients that increase, and by a derivative that is a sum of squares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..numerics import integrate_from_zero
from .affine import soft_clamp
from .base import InvertedByRoot

__all__ = ["BernsteinPolynomial", "SumOfSquares"]

_MAX_LOG_SLOPE = 4.0  # between two coefficients, in natural logarithms


def _check(name: str, degree: int, bound: float) -> None:
    if degree < 1:
        raise OptionError(f"{name}: degree must be at least 1, got {degree}")
    if not bound > 0:
        raise OptionError(f"{name}: bound must be positive, got {bound}")


def _powers(t: Tensor, highest: int) -> list[Tensor]:
    """``[1, t, .., t^highest]`` by products, whose derivatives of any order are right at zero too."""
    powers = [torch.ones_like(t)]
    for _ in range(highest):
        powers.append(powers[-1] * t)
    return powers


def _bernstein(t: Tensor, degree: int) -> Tensor:
    up, down = _powers(t, degree), _powers(1 - t, degree)
    return torch.stack([math.comb(degree, i) * up[i] * down[degree - i] for i in range(degree + 1)], -1)


@dataclass(frozen=True)
class BernsteinPolynomial(InvertedByRoot):
    r"""A polynomial with increasing Bernstein coefficients on :math:`[-B, B]`; linear outside, with equal slopes at the seam.

    .. math:: y = \sum_{i=0}^n \alpha_i \binom{n}{i} t^i (1 - t)^{n - i}, \quad t = \frac{x + B}{2B}, \qquad
        \alpha_i - \alpha_{i-1} = \tfrac{2B}{n} e^{r_i}, \quad |r_i| < 4

    Its slope is the Bernstein polynomial of the :math:`e^{r_i}`, so it lies between the smallest and the largest of them.

    Args:
        degree: degree :math:`n`.
        bound: half-width :math:`B` of the interval that is bent.

    Cost: :math:`O(n)` forward; the inverse is a root and takes about ten times that. It has :math:`n + 1` parameters.

    Reference: Robust normalizing flows using Bernstein-type polynomials (Ramasinghe et al., 2021), https://arxiv.org/abs/2102.03509
    """

    degree: int = 12
    bound: float = 5.0

    def __post_init__(self) -> None:
        _check("BernsteinPolynomial", self.degree, self.bound)

    @property
    def num_params(self) -> int:
        """The shift, and the increments of the coefficients."""
        return self.degree + 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        n, bound = self.degree, self.bound
        inside = x.clamp(-bound, bound)
        t = (inside + bound) / (2 * bound)
        slopes = soft_clamp(params[..., 1:], _MAX_LOG_SLOPE).exp()
        coefficients = torch.cat([torch.zeros_like(slopes[..., :1]), slopes.cumsum(-1)], -1) - 0.5 * slopes.sum(-1, keepdim=True)
        y = (2 * bound / n) * (coefficients * _bernstein(t, n)).sum(-1)
        slope = (slopes * _bernstein(t, n - 1)).sum(-1)
        return y + slope * (x - inside) + params[..., 0], slope.log()


@dataclass(frozen=True)
class SumOfSquares(InvertedByRoot):
    r"""A polynomial whose derivative is a sum of squares and a constant on :math:`[-B, B]`; linear outside, with equal slopes at the seam.

    .. math:: y = b + \int_0^x \epsilon + \sum_{k=1}^2 p_k(t / B)^2 \, dt, \qquad p_k(u) = \sqrt{\tfrac{1 - \epsilon}{2}} + \sum_{j=0}^r c_{kj} u^j

    Every positive polynomial is a sum of two squares. The integral is that of a polynomial, and a quadrature with positive weights that is exact for
    it keeps the relative accuracy which differences of powers would lose.

    Args:
        degree: degree :math:`r` of the polynomials that are squared; the map has degree :math:`2r + 1`.
        bound: half-width :math:`B` of the interval that is bent.
        min_slope: lower bound :math:`\epsilon` of the slope.

    Cost: :math:`O(r^2)` forward; the inverse is a root and takes about ten times that. It has :math:`2r + 3` parameters.

    Reference: Sum-of-squares polynomial flow (Jaini et al., 2019), https://arxiv.org/abs/1905.02325
    """

    degree: int = 4
    bound: float = 5.0
    min_slope: float = 1e-2

    def __post_init__(self) -> None:
        _check("SumOfSquares", self.degree, self.bound)
        if not 0 < self.min_slope < 1:
            raise OptionError(f"SumOfSquares: min_slope must lie in (0, 1), got {self.min_slope}")

    @property
    def num_params(self) -> int:
        """The shift, and the coefficients of two polynomials."""
        return 2 * self.degree + 3

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        first, second = params[..., 1:].chunk(2, -1)
        start = math.sqrt((1 - self.min_slope) / 2)

        def slope(t: Tensor) -> Tensor:
            """At ``(..., n)`` points of each coordinate."""
            powers = torch.stack(_powers(t / self.bound, self.degree), -1)
            p = start + (first.unsqueeze(-2) * powers).sum(-1)
            q = start + 0.5 * (second.unsqueeze(-2) * powers).sum(-1)  # halved, or both would get the same gradients
            return self.min_slope + p * p + q * q

        inside = x.clamp(-self.bound, self.bound)
        end = slope(inside.unsqueeze(-1)).squeeze(-1)
        y = integrate_from_zero(slope, inside, 2 * self.degree)
        return y + end * (x - inside) + params[..., 0], end.log()
