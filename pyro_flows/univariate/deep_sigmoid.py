"""Sigmoid layers one after the other: the map of neural autoregressive flows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from .base import InvertedByRoot
from .mixture import check_mixture, logit_mixture, mixture_map

__all__ = ["DeepSigmoid"]


@dataclass(frozen=True)
class DeepSigmoid(InvertedByRoot):
    r"""A stack of sigmoid layers, each from the line onto the line (NAF's deep sigmoidal flow).

    .. math:: x \mapsto m x + (1 - m) [g_\theta(x) + w (x - g_0(x))], \qquad
        g_\theta(x) = \operatorname{logit} \sum_k \pi_k \, \sigma(a_k (x - \mu_k))

    The correction by :math:`g_0`, the layer at zero parameters, makes zero parameters the identity with units that differ, as in
    :class:`~pyro_flows.univariate.MixtureCDF`. The logit is taken in log space, where no sigmoid saturates, so the range is the whole line.

    Args:
        units: sigmoids in a layer, :math:`K`.
        layers: number of layers.
        min_slope: lower bound of the slope of the whole stack.

    Cost: :math:`O(LK)` forward; the inverse is a root and takes about ten times that. It has :math:`L(3K + 1)` parameters.

    Reference: Neural autoregressive flows (Huang et al., 2018), https://arxiv.org/abs/1804.00779
    """

    units: int = 8
    layers: int = 2
    min_slope: float = 1e-3

    def __post_init__(self) -> None:
        check_mixture("DeepSigmoid", self.units, self.min_slope, "units")
        if self.layers < 1:
            raise OptionError(f"DeepSigmoid: layers must be at least 1, got {self.layers}")

    @property
    def num_params(self) -> int:
        """A correction's weight, and weights, locations and scales of the units, for each layer."""
        return self.layers * (3 * self.units + 1)

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = torch.zeros_like(x)
        for row in params.chunk(self.layers, -1):
            x, slope = mixture_map(logit_mixture, x, row, self.units, self.min_slope ** (1 / self.layers))
            log_slope = log_slope + slope.log()
        return x, log_slope
