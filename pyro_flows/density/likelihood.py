"""What a density fit maximises: the log likelihood of rows, or a lower bound of it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OptionError
from ..stochastic import StochasticFlow
from .rows import AnyFlow, Rows

__all__ = ["Likelihood"]

_BOUNDS = {"elbo": "total", "stl": "stl", "iwae": "total", "dreg": "dreg", "rws": "rws"}  # objective: the gradient of the bound
_EXACT = ("likelihood", "flow_matching")  # objectives without particles; the second is another's business
_SINGLE = (*_EXACT, "elbo", "stl")  # of one particle
_VALIDATE = 10  # particles, at the least
_LAWS, _MOMENTUM = 512, 0.9  # draws a step that the laws of discrete layers are measured on, and what is kept of them
_DEAD = 1e-3  # share of the wins below which a unit counts as dead


class Likelihood:
    """Row by row, the log likelihood of a flow or a bound of it.

    Args:
        flow: the flow.
        objective: see :func:`~pyro_flows.density.fit_density`.
        num_particles: paths of each row, for the importance-weighted bounds.
    """

    def __init__(self, flow: AnyFlow, objective: str, num_particles: int) -> None:
        if objective not in (*_EXACT, "auto", *_BOUNDS):
            raise OptionError(f"objective={objective!r} is not known: choose one of auto, {', '.join((*_EXACT, *_BOUNDS))}")
        if not isinstance(num_particles, int) or num_particles < 1:
            raise OptionError(f"num_particles must be a positive integer, got {num_particles!r}")
        exact = flow.exact if isinstance(flow, StochasticFlow) else True
        if objective == "auto":
            objective = "likelihood" if exact else "rws" if flow.needs_laws else "iwae"  # type: ignore[union-attr]
        if objective == "likelihood" and not exact:
            raise OptionError("objective='likelihood' needs an exact density, and this flow has only a bound: use 'auto', or raise its max_paths")
        if objective in _BOUNDS:
            if exact:
                raise OptionError(f"objective={objective!r} is a bound, and this flow has an exact density: use 'auto'")
            discrete: set[bool] = flow.inferred_kinds  # type: ignore[union-attr, assignment]
            if objective in ("stl", "dreg") and True in discrete:
                raise OptionError(f"objective={objective!r} needs continuous indices, and this flow infers discrete ones: use 'rws'")
            if objective == "rws" and False in discrete:
                raise OptionError("objective='rws' does not train the kernels of continuous indices: use 'iwae' or 'dreg'")
        self.flow, self.objective = flow, objective
        self.particles = 1 if objective in _SINGLE else num_particles

    @property
    def name(self) -> str:
        """What is minimised, in words."""
        names = {"likelihood": "negative log-likelihood", "flow_matching": "flow matching loss"}
        return names.get(self.objective, f"negative {self.objective} bound")

    def training(self, rows: Rows) -> Tensor:
        """What a step maximises, ``(N,)``."""
        flow = self.flow
        if self.objective == "likelihood" or not isinstance(flow, StochasticFlow):
            return log_likelihood(flow, rows)
        if flow.needs_laws:
            flow.fit_laws(_LAWS, rows.context, _MOMENTUM)
        return flow(rows.context).log_prob_bound(rows.x, self.particles, _BOUNDS[self.objective])

    def validation(self, rows: Rows) -> Tensor:
        """What decides which state is best, ``(N,)``."""
        flow = self.flow
        if self.objective == "likelihood" or not isinstance(flow, StochasticFlow):
            return log_likelihood(flow, rows)
        return flow(rows.context).log_prob_bound(rows.x, 1 if self.objective in _SINGLE else max(self.particles, _VALIDATE))

    def tend(self, rows: Rows) -> None:
        """Put units that never win to new use."""
        if isinstance(self.flow, StochasticFlow):
            self.flow.revive(threshold=_DEAD, context=rows.context)

    def notes(self, rows: Rows) -> list[str]:
        """What a user should know about the flow as it is, in words."""
        if not isinstance(self.flow, StochasticFlow):
            return []
        usage = self.flow.usage(context=rows.context)
        dead = [f"{int((u < _DEAD).sum())} of {u.numel()} in layer {i}" for i, u in usage.items() if bool((u < _DEAD).any())]
        remedy = "fewer units would do, or flow.revive() and further training put them to use"
        return [f"units that win less than once in {round(1 / _DEAD)} draws: {', '.join(dead)}; {remedy}"] if dead else []


def log_likelihood(flow: AnyFlow, rows: Rows) -> Tensor:
    """Log density of each row, or its bound; of row and class, where the class is known."""
    if rows.labels is None or isinstance(flow, StochasticFlow):
        distribution = flow(rows.context)
        return distribution.log_prob(rows.x) if getattr(distribution, "exact", True) else distribution.log_prob_bound(rows.x)
    z, ladj = flow.transform.inverse_and_ladj(rows.x, rows.context)
    joint = flow.base.component_log_prob(z)  # type: ignore[operator]
    known = joint.gather(-1, rows.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(rows.labels >= 0, known, joint.logsumexp(-1)) + ladj
