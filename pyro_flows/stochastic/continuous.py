"""Continuously indexed flows: a bijection moved and scaled by a random vector."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..nets import MLP
from ..nets.mlp import Activation
from ..transforms import FlowTransform
from ..univariate import soft_clamp
from .layer import Law, Move, StochasticLayer

__all__ = ["ContinuouslyIndexed"]

_MAX_LOG_SCALE = 3.0


class ContinuouslyIndexed(StochasticLayer):
    r"""A transform behind a move and a scale that a normal index decides.

    .. math::
        u \sim N(\mu_p(z), \sigma_p(z)^2), \qquad x = f(e^{-s(u)} \odot z - t(u)), \qquad q(u \mid x) = N(\mu_q(x), \sigma_q(x)^2)

    Densities are bounds: ``flow().log_prob_bound(x, num_particles)``, with the gradients ``"total"``, ``"stl"`` and ``"dreg"``.

    Args:
        transform: the bijection :math:`f`.
        index_dim: size of the index.
        hidden_features, activation: of the three nets, for :math:`(s, t)`, for :math:`(\mu_p, \sigma_p)` and for :math:`(\mu_q, \sigma_q)`; they see
            the transform's context too.

    Cost: that of the transform and of three small nets. Both kernels start at the standard normal, and :math:`(s, t)` at small functions of
    the index.

    Raises:
        OptionError: something that is no transform.

    Reference: Relaxing bijectivity constraints with continuously indexed normalising flows (Cornish et al., 2020), https://arxiv.org/abs/1909.13833

    Example:
        >>> import torch, pyro_flows as pf
        >>> layer = ContinuouslyIndexed(pf.transforms.LULinear(2))
        >>> flow = pf.stochastic.StochasticFlow(2, [layer])
        >>> flow().log_prob_bound(torch.zeros(3, 2), 10).shape, flow().has_rsample
        (torch.Size([3]), True)
    """

    def __init__(
        self, transform: FlowTransform, index_dim: int = 1, hidden_features: Sequence[int] = (16, 16), activation: Activation = nn.SiLU
    ) -> None:
        if not isinstance(transform, FlowTransform):
            raise OptionError(f"ContinuouslyIndexed: transform must be a FlowTransform, got {type(transform).__name__}")
        super().__init__(transform.dim, index_dim, transform.context_dim)
        self.transform = transform
        dim, more = transform.dim, transform.context_dim
        self.mover = MLP(index_dim + more, 2 * dim, hidden_features, activation)
        nn.init.normal_(self.mover[-1].weight, std=0.1)  # type: ignore[arg-type]
        self.prior = MLP(dim + more, 2 * index_dim, hidden_features, activation)
        self.posterior = MLP(dim + more, 2 * index_dim, hidden_features, activation)

    @staticmethod
    def _given(value: Tensor, context: Tensor | None) -> Tensor:
        return value if context is None else torch.cat([value, context.expand(*value.shape[:-1], -1)], -1)

    def _kernel(self, net: nn.Module, value: Tensor, context: Tensor | None) -> dist.TorchDistribution:
        loc, log_scale = net(self._given(value, context)).chunk(2, -1)
        return dist.Normal(loc, soft_clamp(log_scale, _MAX_LOG_SCALE).exp(), validate_args=False).to_event(1)

    def index_given(self, z: Tensor, context: Tensor | None = None) -> dist.TorchDistribution:
        """The generative kernel ``p(u | z)``."""
        return self._kernel(self.prior, z, context)

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        return self._kernel(self.posterior, x, context)

    def _moves(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.mover(self._given(u, context)).chunk(2, -1)
        return soft_clamp(log_scale, _MAX_LOG_SCALE), shift

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        p = self.index_given(z, context)
        u = p.rsample() if torch.is_grad_enabled() else p.sample()
        return u, self._forward(z, u, p, context)

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        return self._forward(z, u, self.index_given(z, context), context)

    def _forward(self, z: Tensor, u: Tensor, p: dist.TorchDistribution, context: Tensor | None) -> Move:
        log_scale, shift = self._moves(u, context)
        x, ladj = self.transform.forward_and_ladj((-log_scale).exp() * z - shift, context)
        return Move(x, ladj - log_scale.sum(-1), p.log_prob(u))

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        log_scale, shift = self._moves(u, context)
        y, ladj = self.transform.inverse_and_ladj(x, context)
        z = log_scale.exp() * (y + shift)
        return Move(z, ladj + log_scale.sum(-1), self.index_given(z, context).log_prob(u))
