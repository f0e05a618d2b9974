"""The Gaussian mixture as a base, whose components can stand for classes."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from .bases import check_dim

__all__ = ["GaussianMixture"]


class GaussianMixture(nn.Module):
    r"""A mixture of normals with diagonal covariances, :math:`\sum_k \pi_k N(z; \mu_k, \mathrm{diag}(\sigma_k^2))`; calling it gives
    the Pyro distribution.

    Args:
        dim: number of coordinates.
        components: number of components :math:`K`.
        loc: their means at the start, shape ``(components, dim)``; random on a sphere of radius :math:`\sqrt{D + 8}` when omitted: components
            that start together would stay together.
        trainable: whether means, scales and weights are learned; if not, scales are 1 and weights equal.

    Cost: :math:`O(KD)` a point. Draws cannot be differentiated.

    Example:
        >>> base = GaussianMixture(2, 3)
        >>> z = base().sample((5,))
        >>> base.component_log_prob(z).softmax(-1).shape  # to which component each point belongs
        torch.Size([5, 3])

    Reference: Semi-supervised learning with normalizing flows (Izmailov et al., 2019), https://arxiv.org/abs/1912.13025
    """

    loc: Tensor
    log_scale: Tensor
    logits: Tensor

    def __init__(self, dim: int, components: int, loc: Tensor | None = None, trainable: bool = True) -> None:
        super().__init__()
        self.dim, self.components = check_dim("GaussianMixture", dim), components
        if not isinstance(components, int) or components < 1:
            raise OptionError(f"GaussianMixture: components must be a positive integer, got {components!r}")
        if loc is None:
            loc = nn.functional.normalize(torch.randn(components, dim), dim=-1) * math.sqrt(dim + 8)
            loc = loc if dim > 1 else torch.linspace(-3, 3, components + 2)[1:-1, None]  # the sphere of a line has two points
        if loc.shape != (components, dim):
            raise ShapeError(f"GaussianMixture: loc must have shape ({components}, {dim}), got {tuple(loc.shape)}")
        loc = loc.detach().to(torch.get_default_dtype()).clone()
        for name, value in (("loc", loc), ("log_scale", torch.zeros_like(loc)), ("logits", torch.zeros_like(loc[:, 0]))):
            if trainable:
                self.register_parameter(name, nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.MixtureSameFamily(dist.Categorical(logits=self.logits, validate_args=False), self._normals(), validate_args=False)

    def _normals(self) -> dist.TorchDistribution:
        return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)

    def component_log_prob(self, z: Tensor) -> Tensor:
        r"""Joint log density of points and components, :math:`\log \pi_k + \log N(z; \mu_k, \sigma_k^2)`: ``(*batch, dim) -> (*batch, components)``.

        Its ``logsumexp`` is the mixture's log density, its ``softmax`` the probability of each component given the point.
        """
        return self.logits.log_softmax(-1) + self._normals().log_prob(z.unsqueeze(-2))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, components={self.components}"
