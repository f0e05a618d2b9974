"""The sinh-arcsinh map: skewness and tail weight by one number each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from .affine import soft_clamp

__all__ = ["SinhArcsinh"]

_MAX_SKEW = 2.0  # in units of arcsinh x
_MAX_LOG_TAIL = math.log(3.0)  # of the power with which tails grow


def _log_cosh(x: Tensor) -> Tensor:
    """``log cosh x`` without overflow."""
    return x.abs() + softplus(-2 * x.abs()) - math.log(2.0)


@dataclass(frozen=True)
class SinhArcsinh:
    r"""Skews a coordinate and makes its tails heavier or lighter: :math:`y = \sinh(e^{t} (\operatorname{arcsinh} x + s))`.

    The skewness :math:`s` lies in :math:`(-2, 2)` and :math:`e^t`, the power with which the tails grow, in :math:`(1/3, 3)`, both softly bounded.
    Both directions are closed formulas on the whole line.

    Example:
        >>> import torch
        >>> y, log_slope = SinhArcsinh().forward(torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([0.5, 0.0]))
        >>> y
        tensor([-0.4016,  0.5097,  1.8432])

    Reference: Sinh-arcsinh distributions (Jones & Pewsey, 2009), https://doi.org/10.1093/biomet/asp053
    """

    num_params = 2

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        skew, log_tail = self._bounded(params)
        u = torch.asinh(x)
        v = (u + skew) * log_tail.exp()
        return torch.sinh(v), log_tail + _log_cosh(v) - _log_cosh(u)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        skew, log_tail = self._bounded(params)
        v = torch.asinh(y)
        u = v * (-log_tail).exp() - skew
        return torch.sinh(u), _log_cosh(u) - _log_cosh(v) - log_tail

    @staticmethod
    def _bounded(params: Tensor) -> tuple[Tensor, Tensor]:
        skew, log_tail = params.unbind(-1)
        return soft_clamp(skew, _MAX_SKEW), soft_clamp(log_tail, _MAX_LOG_TAIL)
