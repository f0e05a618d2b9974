"""A stochastic flow as a Pyro distribution."""

from __future__ import annotations

from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from ..errors import DtypeError, IntractableError, OptionError, ShapeError, SupportError
from .bounds import lower_bound, upper_bound
from .path_model import Path, PathModel

__all__ = ["StochasticFlowDistribution"]


class StochasticFlowDistribution(dist.TorchDistribution):
    """What a :class:`~pyro_flows.stochastic.StochasticFlow` gives when it is called: ``event_shape (D,)``, the context's batch shape.

    ``has_rsample`` says whether draws carry a gradient: where no index is discrete, and the base has it.

    Args:
        flow: the flow.
        context: ``(*batch, context_dim)`` of a conditional flow.
    """

    arg_constraints: dict = {}
    support = constraints.real_vector

    def __init__(self, flow: PathModel, context: Tensor | None = None, batch_shape: torch.Size | None = None) -> None:
        self.flow, self.context = flow, context
        own = torch.Size() if context is None else context.shape[:-1]
        super().__init__(own if batch_shape is None else batch_shape, torch.Size((flow.dim,)), validate_args=False)
        self.has_rsample = flow.base(context).has_rsample and all(layer.reparameterized for layer in flow.stochastic)

    def expand(self, batch_shape: torch.Size | tuple[int, ...], _instance: object = None) -> StochasticFlowDistribution:
        batch_shape = torch.Size(batch_shape)
        context = None if self.context is None else self.context.expand(*batch_shape, -1)
        return StochasticFlowDistribution(self.flow, context, batch_shape)

    @property
    def exact(self) -> bool:
        """Whether the density is computed exactly."""
        return self.flow.exact

    def _points(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Points and context, of one batch shape."""
        if x.dim() == 0 or x.shape[-1] != self.flow.dim:
            raise ShapeError(f"expected points of shape (*batch, {self.flow.dim}), got {tuple(x.shape)}")
        like = next((t for t in (*self.flow.parameters(), *self.flow.buffers()) if t.is_floating_point()), x)
        if x.dtype != like.dtype or x.device != like.device:
            raise DtypeError(f"the flow has parameters of {like.dtype} on {like.device}, the points are {x.dtype} on {x.device}: use .to(...)")
        try:
            batch = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        except RuntimeError:
            raise ShapeError(f"points {tuple(x.shape)} do not broadcast with batch shape {tuple(self.batch_shape)}") from None
        return x.expand(*batch, -1), None if self.context is None else self.context.expand(*batch, -1)

    # Densities

    def log_prob(self, value: Tensor) -> Tensor:
        """The exact log density.

        Raises:
            IntractableError: the flow has more paths than it may list, or a continuous index.
        """
        if not self.exact:
            above = self.flow.steps[self.flow.listed]
            if above.branch_count is None:
                why = f"the index of its {type(above).__name__} cannot be summed out"
            else:
                why = f"it has more than max_paths={self.flow.max_paths} paths ({self.flow.num_paths} x {above.branch_count} so far)"
            raise IntractableError(
                f"this flow has no exact density: {why}. Use log_prob_bound(x, num_particles), a lower bound; or raise max_paths, or move "
                "random layers next to the base"
            )
        return self.flow.log_lower(*self._points(value))

    def log_prob_bound(self, value: Tensor, num_particles: int = 1, gradient: str = "total") -> Tensor:
        """A random lower bound of the log density: the ELBO for one particle, the importance-weighted bound above; the density itself where exact.

        Args:
            value: points ``(*batch, D)``.
            num_particles: inferred paths of each point.
            gradient: ``"total"``, ``"stl"``, ``"dreg"`` or ``"rws"``, see :func:`~pyro_flows.stochastic.lower_bound`.
        """
        return lower_bound(self.flow, *self._points(value), num_particles, gradient)

    def log_prob_paths(self, value: Tensor) -> Path:
        """All paths to each point: fields ``z (*batch, P, D)``, ``indices`` and ``log_prob``, ``log p(x, u)``.

        Raises:
            IntractableError: the flow has more than ``max_paths`` paths.
        """
        flow = self.flow
        first = flow.steps[0].branch_count if flow.folds else 1
        if not self.exact or first is None or flow.num_paths * first > flow.max_paths:
            raise IntractableError(f"this flow has more than max_paths={flow.max_paths} paths to list: raise max_paths, or draw them with inverse(x)")
        return flow.list_paths(*self._points(value))

    # Draws

    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        return self.sample_with_path(sample_shape)[0]

    def rsample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        """Draws with a gradient.

        Raises:
            IntractableError: an index is discrete, so that a gradient through the draw would leave out how its choice changes.
        """
        if not self.has_rsample:
            raise IntractableError(
                "draws of this flow cannot be reparameterised: a discrete index has no gradient, and one that passes it by is biased. Use "
                "sample(), or sum over the index as AutoStochasticFlow and FlowVI do"
            )
        return self.flow.simulate(self._base().rsample(torch.Size(sample_shape)), self._context(sample_shape))[0]

    def _base(self) -> dist.TorchDistribution:
        base = self.flow.base(self.context)
        return base if base.batch_shape == self.batch_shape else base.expand(self.batch_shape)

    def _context(self, sample_shape: torch.Size | tuple[int, ...]) -> Tensor | None:
        return None if self.context is None else self.context.expand(*sample_shape, *self.context.shape)

    @torch.no_grad()
    def sample_with_path(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> tuple[Tensor, Path]:
        """Draws, and the path that each took: ``(x, Path(z, indices, log_prob))``."""
        return self.flow.simulate(self._base().sample(torch.Size(sample_shape)), self._context(sample_shape))

    @torch.no_grad()
    def sample_and_log_prob(self, sample_shape: torch.Size | tuple[int, ...] = (), num_particles: int = 16) -> tuple[Tensor, Tensor]:
        """Draws, and their log density where it is exact; else its :func:`~pyro_flows.stochastic.upper_bound`."""
        x, path = self.sample_with_path(sample_shape)
        if self.exact:
            return x, self.log_prob(x)
        flow = self.flow
        below = sum(step.has_index for step in flow.steps[: flow.listed])
        return x, upper_bound(flow, x, path.indices[below:], num_particles, self._context(sample_shape))

    @torch.no_grad()
    def inverse(self, value: Tensor, winners: Literal["sample", "map"] = "sample") -> Path:
        """The stochastic inverse: a path to each point, drawn from its posterior, or the most probable one.

        Draws are exact where the flow is, ``(z, u) ~ p(z, u | x)``, and from the inference kernels above ``max_paths``. Given the indices, the flow
        takes ``z`` back to the point exactly: ``flow.push(z, indices)``.

        Args:
            value: points ``(*batch, D)``.
            winners: ``"sample"`` or ``"map"``; the latter takes the layers above ``max_paths`` one by one, and the others together.

        Raises:
            SupportError: a point that is not finite or of density zero; with layers above ``max_paths`` also one whose drawn indices are impossible.
        """
        if winners not in ("sample", "map"):
            raise OptionError(f'winners must be "sample" or "map", got {winners!r}')
        flow, best = self.flow, winners == "map"
        x, context = self._points(value)
        not_finite = ~x.isfinite().all(-1)
        if not_finite.any():
            raise SupportError(f"inverse: {int(not_finite.sum())} of {not_finite.numel()} points are not finite: leave them out")
        above, _ = flow.infer(x, context, best=best)
        paths = flow.list_paths(above.z, context, fold=True)
        self._check_reached(paths.log_prob.amax(-1) > -torch.inf)
        folded = flow.folds and flow.listed > 0
        score = paths.log_prob
        if folded and best:  # of a path together with its best winners
            log_q = self._winners_at_base(paths.z, None if context is None else context.unsqueeze(-2), best)[1]
            score = torch.where(score > -torch.inf, score + log_q, score)
        number = score.argmax(-1) if best else dist.Categorical(logits=score, validate_args=False).sample()
        z, indices = _pick(paths.z, number), tuple(_pick(u, number) for u in paths.indices)
        log_prob = above.log_prob + paths.log_prob.gather(-1, number.unsqueeze(-1)).squeeze(-1)
        if folded:
            first = flow.steps[0]
            u, log_q = self._winners_at_base(z, context, best)
            z, log_prob, indices = first.pull(z, u, first.own_context(context)).value, log_prob + log_q, (u, *indices)
        return Path(z, indices + above.indices, log_prob)

    def _check_reached(self, reached: Tensor) -> None:
        """Raise a ``SupportError`` unless a path leads to each point."""
        if reached.all():
            return
        why = "" if self.exact else ", or indices were drawn that cannot lead there: draw again, or raise max_paths"
        raise SupportError(
            f"inverse: {int((~reached).sum())} of {reached.numel()} points have density zero, so no path leads to them: leave them out{why}"
        )

    def _winners_at_base(self, x: Tensor, context: Tensor | None, best: bool) -> tuple[Tensor, Tensor]:
        """The index of the layer next to the base, whose entries are independent given the path above it, and its log probability."""
        first, law = self.flow.steps[0], self.flow.law(0)
        at = first.own_context(context)
        q = first.infer(x, at, law)
        u = first.best(x, at, law) if best else q.sample()
        return u, q.log_prob(u)


def _pick(t: Tensor, number: Tensor) -> Tensor:
    """Of listed values ``(*batch, P, size)`` those with the numbers ``(*batch,)``."""
    return t.gather(-2, number[..., None, None].expand(*number.shape, 1, t.shape[-1])).squeeze(-2)
