"""The map that makes a mixture of normal distributions normal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import log_ndtr, mills, ndtri_exp
from .base import InvertedByRoot
from .mixture import check_mixture, mixture_map

__all__ = ["Gaussianization"]


@dataclass(frozen=True)
class Gaussianization(InvertedByRoot):
    r"""The normal quantile of a mixture of normal CDFs: a mixture becomes a standard normal.

    .. math:: y = m x + (1 - m) [h_\theta(x) + w (x - h_0(x))], \qquad
        h_\theta(x) = \Phi^{-1}\left( \sum_k \pi_k \, \Phi\!\left(\frac{x - \mu_k}{s_k}\right) \right)

    The correction by :math:`h_0`, the map at zero parameters, makes these the identity with components that differ, as in
    :class:`~pyro_flows.univariate.MixtureCDF`: that map contracts, since a mixture of equally wide normals is nowhere more log-concave than one of
    them. The smaller of the two tail probabilities is kept as a logarithm, so the map is exact at any distance.

    Args:
        components: number of components :math:`K`.
        min_slope: lower bound :math:`m` of the slope.

    Scales lie in :math:`(e^{-3}, e^3)`; both tails are asymptotically linear. Cost: :math:`O(K)` forward; the inverse is a root and takes about ten
    times that. It has :math:`3K + 1` parameters.

    Reference: Gaussianization flows (Meng et al., 2020), https://arxiv.org/abs/2003.01941
    """

    components: int = 8
    min_slope: float = 1e-3

    def __post_init__(self) -> None:
        check_mixture("Gaussianization", self.components, self.min_slope)

    @property
    def num_params(self) -> int:
        """The correction's weight, and weights, locations and scales of the components."""
        return 3 * self.components + 1

    def forward(self, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor]:
        y, slope = mixture_map(_normal_score, x, params, self.components, self.min_slope)
        return y, slope.log()


def _normal_score(x: Tensor, log_weights: Tensor, locs: Tensor, log_scales: Tensor) -> tuple[Tensor, Tensor]:
    """The normal quantile of the mixture's CDF, and its slope: the mixture's hazard times the normal's Mills ratio."""
    inverse_scales = (-log_scales).exp()
    z = (x.unsqueeze(-1) - locs) * inverse_scales
    below, above = log_weights + log_ndtr(z), log_weights + log_ndtr(-z)
    log_cdf, log_sf = below.logsumexp(-1), above.logsumexp(-1)
    upper = log_sf < log_cdf
    q = ndtri_exp(torch.minimum(log_sf, log_cdf))
    outward = torch.where(upper.unsqueeze(-1), z, -z)  # the tail on this side holds at most half of the mass
    shares = torch.where(upper.unsqueeze(-1), above, below).softmax(-1)
    slope = (shares * inverse_scales / mills(outward)).sum(-1) * mills(-q)
    return torch.where(upper, -q, q), slope
