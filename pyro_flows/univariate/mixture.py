"""The logit of a mixture of logistic distributions' CDF: the map of Flow++, and the layer of neural autoregressive flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError
from .affine import soft_clamp
from .base import InvertedByRoot

__all__ = ["MixtureCDF"]

Score = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

_MAX_LOG_SCALE = 3.0  # of a component, in natural logarithms
_SPREAD = 2.0  # locations start between minus this and this


def check_mixture(name: str, components: int, min_slope: float, called: str = "components") -> None:
    """Raises an ``OptionError`` unless there are two components and a possible slope."""
    if components < 2:
        raise OptionError(f"{name}: {called} must be at least 2, got {components}")
    if not 0 < min_slope < 1:
        raise OptionError(f"{name}: min_slope must lie in (0, 1), got {min_slope}")


def mixture_params(params: Tensor, components: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From ``3K + 1`` numbers: the correction's weight, log weights, locations and log scales; and the locations at zero."""
    weight, raw_w, raw_m, raw_s = params.split([1, components, components, components], -1)
    start = torch.linspace(-_SPREAD, _SPREAD, components, dtype=params.dtype, device=params.device)
    return 2 * weight.squeeze(-1).sigmoid(), raw_w.log_softmax(-1), start + raw_m, soft_clamp(raw_s, _MAX_LOG_SCALE), start


def logit_mixture(x: Tensor, log_weights: Tensor, locs: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the CDF and its slope, a sum of positive terms: exact in both tails, however far."""
    inverse_scales = (-log_scales).exp()
    z = (x.unsqueeze(-1) - locs) * inverse_scales
    below, above = log_weights + F.logsigmoid(z), log_weights + F.logsigmoid(-z)
    slope = (inverse_scales * (above.softmax(-1) * z.sigmoid() + below.softmax(-1) * (-z).sigmoid())).sum(-1)
    return below.logsumexp(-1) - above.logsumexp(-1), slope


def mixture_map(score: Score, x: Tensor, params: Tensor, components: int, min_slope: float) -> tuple[Tensor, Tensor]:
    """A mixture's ``score(x, log_weights, locs, log_scales)`` made an identity at zero parameters, and its slope: see :class:`MixtureCDF`."""
    weight, log_weights, locs, log_scales, start = mixture_params(params, components)
    y, slope = score(x, log_weights, locs, log_scales)
    y0, slope0 = score(x, torch.zeros_like(start).log_softmax(-1), start, torch.zeros_like(start))
    free = 1 - min_slope
    return min_slope * x + free * (y + weight * (x - y0)), min_slope + free * (slope + weight * (1 - slope0))


@dataclass(frozen=True)
class MixtureCDF(InvertedByRoot):
    r"""The logit of a mixture of logistic CDFs, then an affine map (Flow++).

    .. math:: y = e^a \bigl( m x + (1 - m) [g_\theta(x) + w (x - g_0(x))] \bigr) + b, \qquad
        g_\theta(x) = \operatorname{logit} \sum_k \pi_k \, \sigma\!\left(\frac{x - \mu_k}{s_k}\right)

    The bracket holds the published map :math:`g_\theta` and a correction of weight :math:`w = 2\sigma(r)`: :math:`g_0`, the map at zero
    parameters, has components of scale one at different locations, so its slope is at most one and :math:`x - g_0` increases. So zero
    parameters give the identity although the components differ (equal ones would get equal gradients and stay equal), :math:`w \to 0` leaves the
    published map, and every slope is at least :math:`m e^a`.

    Args:
        components: number of components :math:`K`.
        min_slope: lower bound :math:`m` of the slope before the affine map.

    Scales lie in :math:`(e^{-3}, e^3)` and :math:`a` in :math:`(-2, 2)`. Both tails are linear. Cost: :math:`O(K)` forward; the inverse is a root
    and takes about ten times that. It has :math:`3K + 3` parameters.

    Example:
        >>> import torch
        >>> f, params = MixtureCDF(components=2), torch.linspace(-2, 2, 9)
        >>> y, log_slope = f.forward(torch.tensor(0.3), params)
        >>> round(f.inverse(y, params)[0].item(), 4)
        0.3

    Reference: Flow++: improving flow-based generative models with variational dequantization and architecture design (Ho et al., 2019),
    https://arxiv.org/abs/1902.00275
    """

    components: int = 8
    min_slope: float = 1e-3

    def __post_init__(self) -> None:
        check_mixture("MixtureCDF", self.components, self.min_slope)

    @property
    def num_params(self) -> int:
        """The affine map's two, the correction's weight, and weights, locations and scales of the components."""
        return 3 * self.components + 3

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = params[..., 0], params[..., 1]
        y, slope = mixture_map(logit_mixture, x, params[..., 2:], self.components, self.min_slope)
        log_scale = soft_clamp(raw, 2.0)
        return y * log_scale.exp() + shift, slope.log() + log_scale
