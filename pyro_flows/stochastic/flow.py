"""A flow of stochastic and deterministic layers: its paths, listed below and inferred above."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions import BoxUniform, Gaussian, StudentT
from ..distributions.flow import standardization
from ..errors import OptionError, ShapeError
from ..transforms import FlowTransform
from .competition import Competition, Independent
from .distribution import StochasticFlowDistribution
from .layer import DiscreteLayer, Law, StochasticLayer, log_total

__all__ = ["Path", "StochasticFlow"]


class Path(NamedTuple):
    """A way from the base to a point.

    Args:
        z: the base's point, ``(*batch, D)``.
        indices: the index of each stochastic layer, base to target, each ``(*batch, index_dim)``.
        log_prob: log density of point and indices together, ``log p(x, u)``, ``(*batch,)``.
    """

    z: Tensor
    indices: tuple[Tensor, ...]
    log_prob: Tensor


class StochasticFlow(nn.Module):
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

    law_loc: Tensor
    law_scale: Tensor

    def __init__(self, base: nn.Module | int, layers: Sequence[StochasticLayer | FlowTransform], max_paths: int = 256) -> None:
        super().__init__()
        layers = list(layers)
        if not layers or not all(isinstance(layer, (StochasticLayer, FlowTransform)) for layer in layers):
            raise OptionError("StochasticFlow: layers must hold stochastic layers and flow transforms, at least one")
        if not isinstance(max_paths, int) or max_paths < 1:
            raise OptionError(f"StochasticFlow: max_paths must be a positive integer, got {max_paths!r}")
        self.base = Gaussian(base) if isinstance(base, int) else base
        dims = {layer.dim for layer in layers} | {getattr(self.base, "dim", layers[0].dim)}
        contexts = {layer.context_dim for layer in layers} - {0}
        if len(dims) > 1 or len(contexts) > 1:
            raise ShapeError(f"StochasticFlow: base and layers differ in size: dims {sorted(dims)}, context_dims {sorted(contexts)}")
        self.layers = nn.ModuleList(layers)
        self.dim: int = dims.pop()
        self.context_dim: int = contexts.pop() if contexts else 0
        self.max_paths = max_paths
        self.register_buffer("law_loc", torch.zeros(len(layers), self.dim))
        self.register_buffer("law_scale", torch.ones(len(layers), self.dim))
        first = layers[0]
        self.folds = isinstance(first, StochasticLayer) and first.factorizes and isinstance(self.base, (Gaussian, StudentT, BoxUniform))
        self.num_paths, self.listed = self._plan()

    def _plan(self) -> tuple[int, int]:
        """The number of paths that are listed, and of layers, from the base, that they go through."""
        count = 1
        for i, layer in enumerate(self.layers):
            more = 1 if isinstance(layer, FlowTransform) or (i == 0 and self.folds) else layer.branch_count
            if more is None or count * more > self.max_paths:  # type: ignore[operator]
                return count, i
            count *= more  # type: ignore[operator, assignment]
        return count, len(self.layers)

    @property
    def exact(self) -> bool:
        """Whether the density is computed exactly."""
        return self.listed == len(self.layers)

    @property
    def stochastic(self) -> list[StochasticLayer]:
        """The stochastic layers, base to target."""
        return [layer for layer in self.layers if isinstance(layer, StochasticLayer)]

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
        return StochasticFlow(self.base, [*self.layers, standardization(self, x)], self.max_paths)  # type: ignore[list-item]

    # From the base

    def simulate(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Path]:
        """Points and their paths from points ``(*batch, D)`` of the base, indices drawn."""
        start, log_prob, indices = z, self.base(context).log_prob(z), []
        for layer in self.layers:
            if isinstance(layer, FlowTransform):
                z, ladj = layer.forward_and_ladj(z, context if layer.context_dim else None)
                log_prob = log_prob - ladj
            else:
                u, (z, ladj, log_prior) = layer.draw(z, context if layer.context_dim else None)  # type: ignore[operator]
                indices.append(u)
                log_prob = log_prob - ladj + log_prior
        return z, Path(start, tuple(indices), log_prob)

    def push(self, z: Tensor, indices: Sequence[Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points of given paths, and ``log p(x, u)``."""
        log_prob, given = self.base(context).log_prob(z), iter(indices)
        for layer in self.layers:
            at = context if layer.context_dim else None
            if isinstance(layer, FlowTransform):
                z, ladj = layer.forward_and_ladj(z, at)
                log_prob = log_prob - ladj
            else:
                z, ladj, log_prior = layer.push(z, next(given), at)  # type: ignore[operator]
                log_prob = log_prob - ladj + log_prior
        return z, log_prob

    def spread(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """All the points that points ``(*batch, D)`` of the base may become, ``(*batch, P, D)``, and their log probabilities ``(*batch, P)``.

        For discrete indices: an expectation over draws is one over ``z`` of a sum over these, whose gradient needs no score function.
        """
        z = z.unsqueeze(-2)
        log_prob = z.new_zeros(z.shape[:-1])
        for layer in self.layers:
            if isinstance(layer, FlowTransform):
                z = layer.forward_and_ladj(z)[0]
            else:
                z, _, log_prior = layer.push(z.unsqueeze(-2), layer.listing().to(z.device))  # type: ignore[operator]
                z, log_prob = z.flatten(-3, -2), (log_prob.unsqueeze(-1) + log_prior).flatten(-2)
        return z, log_prob

    @property
    def num_outcomes(self) -> int | None:
        """How many points a point of the base may become; ``None`` where they cannot be listed."""
        count = 1
        for layer in self.stochastic:
            if not isinstance(layer, DiscreteLayer) or not len(layer.listing()):
                return None
            count *= len(layer.listing())
        return count

    # Towards the base

    def _down(self, layer: nn.Module, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return layer.inverse_and_ladj(x, context if layer.context_dim else None)  # type: ignore[operator]

    def infer(
        self, x: Tensor, context: Tensor | None = None, indices: Sequence[Tensor] | None = None, best: bool = False
    ) -> tuple[Path, Tensor]:
        """Go down through the layers whose paths are not listed.

        Args:
            indices: those of these layers, base to target; drawn from the inference kernels when omitted.
            best: take the most probable indices instead.

        Returns:
            The path so far, with ``log p(x, u | z)``, the kernels and determinants without the law of ``z``; and ``log q(u | x)``.
        """
        log_p = log_q = x.new_zeros(x.shape[:-1])
        found: list[Tensor] = []
        given = None if indices is None else list(indices)
        for i in range(len(self.layers) - 1, self.listed - 1, -1):
            layer = self.layers[i]
            if isinstance(layer, FlowTransform):
                x, ladj = self._down(layer, x, context)
                log_p = log_p + ladj
                continue
            at = context if layer.context_dim else None
            if best:
                u = layer.best(x, at, self._law(i))  # type: ignore[operator]
            else:
                q = layer.infer(x, at, self._law(i))  # type: ignore[operator]
                u = given.pop() if given is not None else q.rsample() if q.has_rsample and torch.is_grad_enabled() else q.sample()
                log_q = log_q + q.log_prob(u)
            x, ladj, log_prior = layer.pull(x, u, at)  # type: ignore[operator]
            log_p = log_p + ladj + log_prior
            found.append(u)
        return Path(x, tuple(reversed(found)), log_p), log_q

    def list_paths(self, x: Tensor, context: Tensor | None = None, fold: bool = False) -> Path:
        """All paths of the layers below, for points ``(*batch, D)`` there: fields ``(*batch, P, ...)``.

        With ``fold`` the layer next to the base is summed out where its sum is a product; ``z`` and the indices are then those above it.
        """
        z, context = x.unsqueeze(-2), None if context is None else context.unsqueeze(-2)
        log_prob = z.new_zeros(z.shape[:-1])
        indices: list[Tensor] = []
        fold = fold and self.folds and self.listed > 0
        for layer in reversed(self.layers[fold : self.listed]):  # type: ignore[misc]
            if isinstance(layer, FlowTransform):
                z, ladj = self._down(layer, z, context)
                log_prob = log_prob + ladj
            else:
                found = layer.branches(z, context if layer.context_dim else None)  # type: ignore[operator]
                count = found.z.shape[-2]
                z, log_prob = found.z.flatten(-3, -2), (log_prob.unsqueeze(-1) + found.log_weight).flatten(-2)
                indices = [u.repeat_interleave(count, -2) for u in indices] + [found.indices.flatten(-3, -2)]
        if fold:
            below = self.layers[0].over(self.base(context), z, context if self.layers[0].context_dim else None)  # type: ignore[operator]
        else:
            below = self.base(context).log_prob(z)
        return Path(z, tuple(reversed(indices)), log_prob + below)

    def log_lower(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of points below the layers that are inferred: the exact one of the flow where there are none."""
        return log_total(self.list_paths(x, context, fold=True).log_prob)

    def log_weight(self, x: Tensor, context: Tensor | None = None, indices: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Path]:
        """``log p(x, u)``, ``log q(u | x)`` and the inferred path ``u`` of each point; ``p / q`` averages to the density."""
        path, log_q = self.infer(x, context, indices)
        return path.log_prob + self.log_lower(path.z, context), log_q, path

    # The laws that discrete layers take their posterior from

    def _law(self, i: int) -> Law:
        if i == 0 and isinstance(self.base, (Gaussian, StudentT, BoxUniform)):
            return Independent(self.base())
        return Independent(dist.Normal(self.law_loc[i], self.law_scale[i], validate_args=False).to_event(1))

    @property
    def inferred_kinds(self) -> set[bool]:
        """Whether the indices that are inferred are discrete: ``{True}``, ``{False}``, both, or neither where the density is exact."""
        return {layer.discrete for layer in self.layers[self.listed :] if isinstance(layer, StochasticLayer)}  # type: ignore[misc]

    @property
    def needs_laws(self) -> bool:
        """Whether a discrete layer's index is inferred, and so depends on :meth:`fit_laws`."""
        return any(isinstance(layer, Competition) for layer in self.layers[max(self.listed, 1) :])

    @torch.no_grad()
    def fit_laws(self, num_samples: int = 4096, context: Tensor | None = None, momentum: float = 0.0) -> None:
        """Measure mean and spread of what enters each layer, on draws; with ``momentum``, mixed into the present values."""
        if context is not None:
            context = context[torch.randint(len(context), (num_samples,), device=context.device)]
        base = self.base(context)
        z = base.sample(torch.Size((num_samples,)) if len(base.batch_shape) == 0 else torch.Size())
        for i, layer in enumerate(self.layers):
            scale, loc = torch.std_mean(z, 0)
            self.law_loc[i].lerp_(loc, 1 - momentum)
            self.law_scale[i].lerp_(scale.clamp(min=1e-6), 1 - momentum)
            at = context if layer.context_dim else None
            z = layer.forward_and_ladj(z, at)[0] if isinstance(layer, FlowTransform) else layer.draw(z, at)[1].value  # type: ignore[operator]

    # Units that never win

    @torch.no_grad()
    def usage(self, num_samples: int = 4096, context: Tensor | None = None) -> dict[int, Tensor]:
        """How often each unit wins, on draws: for each layer of competing units, by its place, shares ``(groups, units)``."""
        if context is not None:
            context = context[torch.randint(len(context), (num_samples,), device=context.device)]
        base = self.base(context)
        z = base.sample(torch.Size((num_samples,)) if len(base.batch_shape) == 0 else torch.Size())
        indices = iter(self.simulate(z, context)[1].indices)
        found: dict[int, Tensor] = {}
        for i, layer in enumerate(self.layers):
            if isinstance(layer, StochasticLayer):
                u = next(indices)
                if isinstance(layer, Competition):
                    found[i] = nn.functional.one_hot(u, layer.units).to(z).mean(0)
        return found

    def revive(self, num_samples: int = 4096, threshold: float = 1e-3, context: Tensor | None = None) -> int:
        """Put units that win less often than ``threshold`` beside the busiest unit of their group; returns how many there were."""
        return sum(self.layers[i].revive(u, threshold) for i, u in self.usage(num_samples, context).items())  # type: ignore[operator, misc]

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # Pyro's parameter store hangs a weak reference here, which cannot be pickled
        return self.__dict__
