"""The joint law of points and paths, and the inference of paths: what densities, bounds and draws of a stochastic flow are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..distributions import Gaussian
from ..distributions.abstract_flow import AbstractFlow
from ..errors import OptionError, ShapeError
from ..transforms import FlowTransform
from .competition import Independent
from .layer import Deterministic, Law, StochasticLayer, log_total

__all__ = ["Path", "PathModel"]


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


class PathModel(AbstractFlow):
    r"""The joint density :math:`p(x, u)` of points and the indices of their paths, and the inference kernels :math:`q(u \mid x)`.

    Args:
        base, layers, max_paths: see :class:`~pyro_flows.stochastic.StochasticFlow`.

    Raises:
        ShapeError: parts of different size.
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
        self._modules["layers"] = nn.ModuleList(layers)  # names of parameters begin with layers.0, whether or not the layer is wrapped
        self.steps: tuple[StochasticLayer, ...] = tuple(layer if isinstance(layer, StochasticLayer) else Deterministic(layer) for layer in layers)
        self.max_paths = max_paths
        self.register_buffer("law_loc", torch.zeros(len(layers), self.dim))
        self.register_buffer("law_scale", torch.ones(len(layers), self.dim))
        self.folds = self.steps[0].factorizes and self._independent_base
        self.num_paths, self.listed = self._plan()

    @property
    def dim(self) -> int:
        return self.steps[0].dim

    @property
    def context_dim(self) -> int:
        return max(step.context_dim for step in self.steps)

    @property
    def layers(self) -> Any:
        return self._modules["layers"]

    @property
    def stochastic(self) -> list[StochasticLayer]:
        """The stochastic layers, base to target."""
        return [step for step in self.steps if step.has_index]

    @property
    def exact(self) -> bool:
        return self.listed == len(self.steps)

    @property
    def _independent_base(self) -> bool:
        return getattr(self.base, "independent", False)

    def _plan(self) -> tuple[int, int]:
        """The number of paths that are listed, and of layers, from the base, that they go through."""
        count = 1
        for i, step in enumerate(self.steps):
            branches = 1 if i == 0 and self.folds else step.branch_count
            if branches is None or count * branches > self.max_paths:
                return count, i
            count *= branches
        return count, len(self.steps)

    # From the base

    def simulate(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Path]:
        """Points and their paths from points ``(*batch, D)`` of the base, indices drawn."""
        start, log_prob, indices = z, self.base(context).log_prob(z), []
        for step in self.steps:
            u, (z, ladj, log_prior) = step.draw(z, step.own_context(context))
            log_prob = log_prob - ladj + log_prior
            if step.has_index:
                indices.append(u)
        return z, Path(start, tuple(indices), log_prob)

    def push(self, z: Tensor, indices: Sequence[Tensor], context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Points of given paths, and ``log p(x, u)``."""
        log_prob, remaining = self.base(context).log_prob(z), iter(indices)
        for step in self.steps:
            u = next(remaining) if step.has_index else z.new_zeros(0, dtype=torch.long)
            z, ladj, log_prior = step.push(z, u, step.own_context(context))
            log_prob = log_prob - ladj + log_prior
        return z, log_prob

    def spread(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """All the points that points ``(*batch, D)`` of the base may become, ``(*batch, P, D)``, and their log probabilities ``(*batch, P)``.

        For discrete indices: an expectation over draws is one over ``z`` of a sum over these, whose gradient needs no score function.
        """
        z = z.unsqueeze(-2)
        log_prob = z.new_zeros(z.shape[:-1])
        for step in self.steps:
            points, log_prior = step.outcomes(z)
            z, log_prob = points.flatten(-3, -2), (log_prob.unsqueeze(-1) + log_prior).flatten(-2)
        return z, log_prob

    @property
    def num_outcomes(self) -> int | None:
        """How many points a point of the base may become; ``None`` where they cannot be listed."""
        count = 1
        for layer in self.stochastic:
            if layer.num_outcomes is None:
                return None
            count *= layer.num_outcomes
        return count

    # Towards the base

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
        drawn: list[Tensor] = []
        remaining = None if indices is None else list(indices)
        for i in reversed(range(self.listed, len(self.steps))):
            step = self.steps[i]
            at = step.own_context(context)
            given = remaining.pop() if remaining is not None and step.has_index else None
            u, log_q_index = step.select(x, at, self.law(i), given, best)
            x, ladj, log_prior = step.pull(x, u, at)
            log_p, log_q = log_p + ladj + log_prior, log_q + log_q_index
            if step.has_index:
                drawn.append(u)
        return Path(x, tuple(reversed(drawn)), log_p), log_q

    def list_paths(self, x: Tensor, context: Tensor | None = None, fold: bool = False) -> Path:
        """All paths of the layers below, for points ``(*batch, D)`` there: fields ``(*batch, P, ...)``.

        With ``fold`` the layer next to the base is summed out where its sum is a product; ``z`` and the indices are then those above it.
        """
        z, context = x.unsqueeze(-2), None if context is None else context.unsqueeze(-2)
        log_prob = z.new_zeros(z.shape[:-1])
        indices: list[Tensor] = []
        fold = fold and self.folds and self.listed > 0
        for step in reversed(self.steps[int(fold) : self.listed]):
            branches = step.branches(z, step.own_context(context))
            count = branches.z.shape[-2]
            z, log_prob = branches.z.flatten(-3, -2), (log_prob.unsqueeze(-1) + branches.log_weight).flatten(-2)
            indices = [u.repeat_interleave(count, -2) for u in indices]
            if step.has_index:
                indices.append(branches.indices.flatten(-3, -2))
        first, base = self.steps[0], self.base(context)
        below = first.over(base, z, first.own_context(context)) if fold else base.log_prob(z)
        return Path(z, tuple(reversed(indices)), log_prob + below)

    def log_lower(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of points below the layers that are inferred: the exact one of the flow where there are none."""
        return log_total(self.list_paths(x, context, fold=True).log_prob)

    def log_weight(self, x: Tensor, context: Tensor | None = None, indices: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor, Path]:
        """``log p(x, u)``, ``log q(u | x)`` and the inferred path ``u`` of each point; ``p / q`` averages to the density."""
        path, log_q = self.infer(x, context, indices)
        return path.log_prob + self.log_lower(path.z, context), log_q, path

    # The laws that discrete layers take their posterior from

    def law(self, i: int) -> Law:
        """Log density of what enters layer ``i``, as its inference kernel takes it."""
        if i == 0 and self._independent_base:
            return Independent(self.base())
        return Independent(dist.Normal(self.law_loc[i], self.law_scale[i], validate_args=False).to_event(1))

    @property
    def inferred_kinds(self) -> set[bool]:
        return {step.discrete for step in self.steps[self.listed :] if step.has_index}

    @property
    def needs_laws(self) -> bool:
        """Whether a discrete layer's index is inferred, and so depends on :meth:`fit_laws`."""
        return any(step.needs_law for step in self.steps[max(self.listed, 1) :])

    def draw_base(self, num_samples: int, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Draws ``(num_samples, D)`` of the base, at contexts picked at random from the rows of ``context``."""
        if context is not None:
            context = context[torch.randint(len(context), (num_samples,), device=context.device)]
        base = self.base(context)
        return base.sample(torch.Size((num_samples,)) if len(base.batch_shape) == 0 else torch.Size()), context

    @torch.no_grad()
    def fit_laws(self, num_samples: int = 4096, context: Tensor | None = None, momentum: float = 0.0) -> None:
        """Measure mean and spread of what enters each layer, on draws; with ``momentum``, mixed into the present values."""
        z, context = self.draw_base(num_samples, context)
        for i, step in enumerate(self.steps):
            scale, loc = torch.std_mean(z, 0)
            self.law_loc[i].lerp_(loc, 1 - momentum)
            self.law_scale[i].lerp_(scale.clamp(min=1e-6), 1 - momentum)
            z = step.draw(z, step.own_context(context))[1].value
