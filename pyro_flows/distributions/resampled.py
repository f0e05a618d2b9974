"""The resampled base: a normal distribution thinned by a learned probability of acceptance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.quasirandom import SobolEngine

from ..errors import OptionError
from ..nets import MLP
from .bases import check_dim

__all__ = ["Resampled", "ResampledDistribution"]


class ResampledDistribution(dist.TorchDistribution):
    r"""What truncated rejection sampling draws: a proposal is kept with probability :math:`a(z)`, and the :math:`T`-th in any case.

    Args:
        proposal: distribution :math:`\pi` of the proposals.
        log_accept: :math:`\log a`, from points to values of at most 0.
        log_normalizer: :math:`\log Z`, the logarithm of the mean of :math:`a` under :math:`\pi`.
        truncation: :math:`T`.

    The log density is exact given :math:`Z`. Draws take up to :math:`T` rounds and cannot be differentiated.
    """

    arg_constraints: dict = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(
        self, proposal: dist.TorchDistribution, log_accept: Callable[[Tensor], Tensor], log_normalizer: Tensor, truncation: int
    ) -> None:
        self.proposal, self.log_accept, self.log_normalizer, self.truncation = proposal, log_accept, log_normalizer, truncation
        super().__init__(proposal.batch_shape, proposal.event_shape, validate_args=False)

    def expand(self, batch_shape: torch.Size, _instance: object = None) -> ResampledDistribution:
        return ResampledDistribution(self.proposal.expand(batch_shape), self.log_accept, self.log_normalizer, self.truncation)

    def log_prob(self, value: Tensor) -> Tensor:
        # log[(1 - alpha) a / Z + alpha], with alpha = (1 - Z)^(T - 1) the probability that T - 1 proposals are refused
        log_z = self.log_normalizer.clamp(max=-torch.finfo(value.dtype).eps)
        log_alpha = (self.truncation - 1) * torch.log1p(-log_z.exp())
        kept = torch.log(-torch.expm1(log_alpha)) + self.log_accept(value) - log_z if self.truncation > 1 else log_alpha - math.inf
        return self.proposal.log_prob(value) + torch.logaddexp(kept, log_alpha)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        sample_shape = torch.Size(sample_shape)
        drawn = self.proposal.sample(sample_shape)
        flat = drawn.reshape(-1, drawn.shape[-1])
        open_rows = torch.arange(len(flat), device=flat.device)
        for _ in range(self.truncation - 1):
            refused = torch.rand_like(flat[open_rows, 0]).log() >= self.log_accept(flat[open_rows])
            open_rows = open_rows[refused]
            if not len(open_rows):
                break
            flat[open_rows] = self.proposal.sample(sample_shape).reshape(flat.shape)[open_rows]
        return flat.view(drawn.shape)


class Resampled(nn.Module):
    r"""A standard normal with a learned acceptance, :math:`p(z) = \pi(z) [(1 - \alpha) a(z) / Z + \alpha]`; calling it gives the
    Pyro distribution.

    Here :math:`a` is a net with values in (0, 1), :math:`Z = E_\pi[a]` and :math:`\alpha = (1 - Z)^{T-1}`. It can have holes and several modes,
    which a flow alone cannot make out of one normal.

    Args:
        dim: number of coordinates.
        truncation: :math:`T`, the most proposals a draw may take.
        hidden_features: widths of the acceptance net.
        num_nodes: points over which :math:`Z` is averaged. In evaluation mode they are quasi-random and fixed, in the buffer ``nodes``, so the
            density is a function of the parameters alone and never stale; in training mode they are drawn anew at each call, so that a net cannot
            learn to be small just there. The error of :math:`\log Z` shifts every log density by one constant.

    Cost: the net on ``num_nodes`` points a call and on each point scored.

    Example:
        >>> base = Resampled(2).eval()
        >>> round(base().log_prob(torch.zeros(2)).item(), 3)  # a normal, at first: every proposal is kept with probability one half
        -1.838

    Reference: Resampling base distributions of normalizing flows (Stimper et al., 2022), https://arxiv.org/abs/2110.15828
    """

    nodes: Tensor

    def __init__(self, dim: int, truncation: int = 100, hidden_features: Sequence[int] = (64, 64), num_nodes: int = 4096) -> None:
        super().__init__()
        self.dim, self.truncation = check_dim("Resampled", dim), truncation
        for name, value in (("truncation", truncation), ("num_nodes", num_nodes)):
            if not isinstance(value, int) or value < 1:
                raise OptionError(f"Resampled: {name} must be a positive integer, got {value!r}")
        self.net = MLP(dim, 1, hidden_features)
        uniform = SobolEngine(dim, scramble=True, seed=0).draw(num_nodes, dtype=torch.float64)
        normal = torch.special.ndtri(uniform.clamp(1e-9, 1 - 1e-9))
        self.register_buffer("nodes", normal.to(torch.get_default_dtype()))

    def log_accept(self, z: Tensor) -> Tensor:
        r""":math:`\log a(z)`: ``(*batch, dim) -> (*batch,)``."""
        return nn.functional.logsigmoid(self.net(z).squeeze(-1))

    def log_normalizer(self, nodes: Tensor | None = None) -> Tensor:
        r""":math:`\log Z`, averaged over ``nodes``, draws of the standard normal; over those of the present mode when omitted."""
        if nodes is None:
            nodes = torch.randn_like(self.nodes) if self.training else self.nodes
        return self.log_accept(nodes).logsumexp(-1) - math.log(len(nodes))

    def forward(self, context: Tensor | None = None) -> ResampledDistribution:
        zero = torch.zeros_like(self.nodes[0])
        proposal = dist.Normal(zero, zero + 1, validate_args=False).to_event(1)
        return ResampledDistribution(proposal, self.log_accept, self.log_normalizer(), self.truncation)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, truncation={self.truncation}"
