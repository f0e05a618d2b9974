"""The integral of a positive network."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..numerics import integrate_from_zero
from .affine import soft_clamp
from .base import InvertedByRoot

__all__ = ["UnconstrainedMonotone"]

_MAX_BEND = 3.0  # bounds of the log slope: of the network
_MAX_LOG_SCALE = 2.0  # and of the common factor


@dataclass(frozen=True)
class UnconstrainedMonotone(InvertedByRoot):
    r"""The integral of a positive network whose weights belong to the coordinate (UMNN).

    .. math:: y = b + \int_0^x g(t)\,dt, \qquad g(t) = \exp\Bigl(s + \sum_k w_k \tanh(a_k (t - c_k))\Bigr)

    All weights of the one-hidden-layer integrand come from the row of parameters, so a conditioner generates the integrand itself. Beyond
    ``bound`` the slope stays what it is there, so the tails are linear and only ``[-bound, bound]`` is integrated. Clenshaw-Curtis quadrature is
    exact to about 1e-10 there because the integrand cannot be sharp: :math:`a_k` lies in (1/2, 2) and the sum in (-3, 3). With :math:`s` in
    (-2, 2), every slope lies in :math:`(e^{-5}, e^5)`.

    Args:
        hidden: hidden units :math:`K` of the integrand.
        bound: half-width of the interval on which the slope varies.

    Cost: ``18 * bound`` evaluations of the integrand forward; the inverse is a root and takes about ten times that. It has :math:`3K + 2`
    parameters.

    Reference: Unconstrained monotonic neural networks (Wehenkel and Louppe, 2019), https://arxiv.org/abs/1908.05164
    """

    hidden: int = 8
    bound: float = 4.0

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise OptionError(f"UnconstrainedMonotone: hidden must be at least 1, got {self.hidden}")
        if not self.bound > 0:
            raise OptionError(f"UnconstrainedMonotone: bound must be positive, got {self.bound}")

    @property
    def num_params(self) -> int:
        """The shift, the log scale; and sharpness, centre and weight of each hidden unit."""
        return 3 * self.hidden + 2

    @property
    def _panels(self) -> int:
        return 2 * math.ceil(9 * self.bound)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        k = self.hidden
        shift, raw_scale, raw_a, raw_c, raw_w = params.split([1, 1, k, k, k], -1)
        start = torch.linspace(-0.75 * self.bound, 0.75 * self.bound, k, dtype=params.dtype, device=params.device)
        sharpness, centres = soft_clamp(raw_a, math.log(2)).exp(), start + raw_c
        w = raw_w * (_MAX_BEND / math.sqrt(k)) / (1 + (raw_w * raw_w).sum(-1, keepdim=True)).sqrt()  # so that |w . tanh| < 3
        scale = soft_clamp(raw_scale, _MAX_LOG_SCALE)

        def log_slope(t: Tensor) -> Tensor:
            """At ``(..., n)`` points of each coordinate."""
            units = ((t.unsqueeze(-1) - centres.unsqueeze(-2)) * sharpness.unsqueeze(-2)).tanh()
            return scale + (units * w.unsqueeze(-2)).sum(-1)

        inside = x.clamp(-self.bound, self.bound)
        end = log_slope(inside.unsqueeze(-1)).squeeze(-1)
        y = integrate_from_zero(lambda t: log_slope(t).exp(), inside, self._panels)
        return y + end.exp() * (x - inside) + shift.squeeze(-1), end
