"""Shift and affine maps of the line."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError

__all__ = ["Shift", "Affine", "soft_clamp"]


def soft_clamp(x: Tensor, bound: float) -> Tensor:
    """Squash ``x`` smoothly into ``(-bound, bound)``, with slope one at zero: ``bound * tanh(x / bound)``."""
    return bound * torch.tanh((1 / bound) * x)


@dataclass(frozen=True)
class Shift:
    r"""Moves a coordinate: :math:`y = x + t`, with log slope 0 (the map of NICE).

    Reference: NICE: non-linear independent components estimation (Dinh et al., 2014), https://arxiv.org/abs/1410.8516
    """

    num_params = 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return x + params[..., 0], torch.zeros_like(x)

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        return y - params[..., 0], torch.zeros_like(y)


@dataclass(frozen=True)
class Affine:
    r"""Moves and scales a coordinate: :math:`y = e^{s} x + t`, where :math:`s = c \tanh(r / c)` lies in :math:`(-c, c)`.

    Args:
        max_log_scale: the bound :math:`c` of the log scale. It keeps one layer's condition number below :math:`e^{2c}`.

    Example:
        >>> import torch
        >>> y, log_slope = Affine().forward(torch.tensor(3.0), torch.tensor([0.5, 1.0]))
        >>> round(y.item(), 4), round(log_slope.item(), 4)
        (5.8962, 0.4898)

    Reference: Density estimation using real NVP (Dinh et al., 2016), https://arxiv.org/abs/1605.08803
    """

    max_log_scale: float = 2.0
    num_params = 2

    def __post_init__(self) -> None:
        if not self.max_log_scale > 0:
            raise OptionError(f"Affine: max_log_scale must be positive, got {self.max_log_scale}")

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = params.unbind(-1)
        log_scale = soft_clamp(raw, self.max_log_scale)
        return torch.addcmul(shift, x, log_scale.exp()), log_scale

    def inverse(self, y: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = params.unbind(-1)
        log_slope = soft_clamp(-raw, self.max_log_scale)
        return (y - shift) * log_slope.exp(), log_slope
