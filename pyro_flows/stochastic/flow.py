"""A flow of stochastic and deterministic layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distributions.flow import standardization
from ..errors import ShapeError
from .bounds import GRADIENTS
from .distribution import StochasticFlowDistribution
from .path_model import PathModel

__all__ = ["StochasticFlow"]


class StochasticFlow(PathModel):
    r"""A base distribution pushed through layers, some of which are random: bijections that an index picks.

    .. math::
        u_l \sim p_l(u \mid z_{l-1}), \quad z_l = F_l(z_{l-1}; u_l), \qquad
        \log p(x, u) = \log p_0(z_0) + \sum_l [\log p_l(u_l \mid z_{l-1}) + \log|\det \partial z_{l-1} / \partial z_l|]

    Layers with finitely many branches are summed out exactly, from the base upwards, as long as there are at most ``max_paths`` paths; a layer
    of local competitions directly above a base of independent coordinates counts as one path. If that covers all layers the density is exact.
    The indices of layers further up are inferred, :math:`u_l \sim q_l(u \mid z_l)`, and give a lower bound of the log density. Of discrete
    layers there :math:`q_l` is Bayes' rule with a normal law of :math:`z_{l-1}`, of independent coordinates, that :meth:`fit_laws` measures.

    Args:
        base: a module whose call gives the base distribution, or an integer for a standard normal of that size.
        layers: stochastic layers and flow transforms, in the sampling direction.
        max_paths: most paths that are listed for a point.

    Calling it, ``flow()`` or ``flow(context)``, gives a
    :class:`~pyro_flows.stochastic.StochasticFlowDistribution`.

    Cost: a density evaluates each layer once for every path of the layers above it, so put random layers next to the base.

    Raises:
        ShapeError: parts of different size, or a context that is missing or unexpected.
        OptionError: no layers, something that is no layer, or ``max_paths`` that is not positive.
    """

    def forward(self, context: Tensor | None = None) -> StochasticFlowDistribution:
        if (context is None) != (self.context_dim == 0):
            wanted = f"a context of shape (*batch, {self.context_dim})" if self.context_dim else "no context"
            raise ShapeError(f"StochasticFlow: this flow takes {wanted}")
        if context is not None and (context.dim() == 0 or context.shape[-1] != self.context_dim):
            raise ShapeError(f"StochasticFlow: expected a context of shape (*batch, {self.context_dim}), got {tuple(context.shape)}")
        return StochasticFlowDistribution(self, context)

    def extra_repr(self) -> str:
        """Sizes at a glance."""
        count = sum(p.numel() for p in self.parameters())
        return f"dim={self.dim}, context_dim={self.context_dim}, parameters={count}, paths={self.num_paths}, exact={self.exact}"

    def standardized(self, x: Any) -> StochasticFlow:
        """The flow with a fixed last layer that takes mean and standard deviation of rows ``x``, ``(N, dim)``; parameters are shared.

        Raises:
            ShapeError: rows of another size.
            DataError: a column that is constant or not finite.
        """
        return StochasticFlow(self.base, [*self.layers, standardization(self, x)], self.max_paths)

    # What every flow answers

    @property
    def bijective(self) -> bool:
        return False

    @property
    def traceable_layers(self) -> Any:
        """The last stochastic layer and those above it: its index is not known from a point, so neither is what lies below."""
        last = max((i for i, step in enumerate(self.steps) if step.has_index), default=0)
        return self.layers[last:]

    @property
    def default_objective(self) -> str:
        return "likelihood" if self.exact else "rws" if self.needs_laws else "iwae"

    @property
    def gradients(self) -> tuple[str, ...]:
        return () if self.exact else GRADIENTS

    @torch.no_grad()
    def usage(self, num_samples: int = 4096, context: Tensor | None = None) -> dict[int, Tensor]:
        """How often each unit wins, on draws: for each layer of competing units, by its position, shares ``(groups, units)``."""
        z, context = self.draw_base(num_samples, context)
        positions = [i for i, step in enumerate(self.steps) if step.has_index]
        shares = {i: self.steps[i].usage(u) for i, u in zip(positions, self.simulate(z, context)[1].indices, strict=True)}
        return {i: share for i, share in shares.items() if share is not None}

    def revive(self, num_samples: int = 4096, threshold: float = 1e-3, context: Tensor | None = None) -> int:
        """Put units that win less often than ``threshold`` beside the busiest unit of their group; returns how many there were."""
        return sum(self.steps[i].revive(share, threshold) for i, share in self.usage(num_samples, context).items())

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # Pyro's parameter store hangs a weak reference here, which cannot be pickled
        return self.__dict__
