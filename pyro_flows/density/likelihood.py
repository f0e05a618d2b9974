"""Maximum likelihood, exact or by a lower bound."""

from __future__ import annotations

from torch import Tensor

from ..distributions.abstract_flow import AbstractFlow
from ..errors import OptionError
from .objective import Objective
from .rows import Rows

__all__ = ["Bound", "Likelihood"]

_VALIDATION_PARTICLES = 10  # paths of each row, at the least
_LAW_DRAWS, _LAW_MOMENTUM = 512, 0.9  # draws a step that the laws of discrete layers are measured on, and the share of the old values that stays
_RARE = 1e-3  # share of the wins below which a unit counts as dead


class _MaximumLikelihood(Objective):
    """What the density and its bounds share: units that never win are put to new use before each validation, and reported at the end."""

    def before_validation(self, flow: AbstractFlow, rows: Rows) -> None:
        flow.revive(threshold=_RARE, context=rows.context)

    def notes(self, flow: AbstractFlow, rows: Rows) -> list[str]:
        usage = flow.usage(context=rows.context)
        dead = [f"{int((u < _RARE).sum())} of {u.numel()} in layer {i}" for i, u in usage.items() if bool((u < _RARE).any())]
        remedy = "fewer units would do, or flow.revive() and further training put them to use"
        return [f"units that win less than once in {round(1 / _RARE)} draws: {', '.join(dead)}; {remedy}"] if dead else []


class Likelihood(_MaximumLikelihood):
    r"""The negative log-likelihood :math:`-\log q(x \mid c)`; of row and class, where classes are given."""

    name = "negative log-likelihood"
    takes_labels = True

    def validate(self, flow: AbstractFlow) -> None:
        if not flow.exact:
            raise OptionError(
                "objective='likelihood' needs an exact density, and this flow has only a bound: use 'auto', or raise its max_paths where it has one"
            )

    def loss(self, flow: AbstractFlow, rows: Rows) -> Tensor:
        if rows.labels is not None:
            return -flow.log_prob_labelled(rows.x, rows.labels, rows.context)
        return -flow(rows.context).log_prob(rows.x)


class Bound(_MaximumLikelihood):
    """The negative of a random lower bound of the log-likelihood.

    Args:
        short_name: what it is called.
        gradient: how it is differentiated, see :func:`~pyro_flows.stochastic.lower_bound`.
        num_particles: paths of each row in training; ``None`` for the bound of a single one, in validation too.
    """

    def __init__(self, short_name: str, gradient: str, num_particles: int | None = None) -> None:
        self.short_name, self.gradient = short_name, gradient
        self.name = f"negative {short_name} bound"
        self.particles = 1 if num_particles is None else num_particles
        self.validation_particles = 1 if num_particles is None else max(num_particles, _VALIDATION_PARTICLES)

    def validate(self, flow: AbstractFlow) -> None:
        what = f"objective={self.short_name!r}"
        if flow.exact:
            raise OptionError(f"{what} is a bound, and this flow has an exact density: use 'auto'")
        if self.gradient in ("stl", "dreg") and True in flow.inferred_kinds:
            raise OptionError(f"{what} needs continuous indices, and this flow infers discrete ones: use 'rws'")
        if self.gradient == "rws" and False in flow.inferred_kinds:
            raise OptionError(f"{what} does not train the kernels of continuous indices: use 'iwae' or 'dreg'")
        if self.gradient not in flow.gradients:
            raise OptionError(f"{what} needs a gradient that the bound of this {type(flow).__name__} does not have: use 'elbo' or 'iwae'")

    def loss(self, flow: AbstractFlow, rows: Rows) -> Tensor:
        if flow.needs_laws:
            flow.fit_laws(_LAW_DRAWS, rows.context, _LAW_MOMENTUM)
        return -flow(rows.context).log_prob_bound(rows.x, self.particles, self.gradient)

    def validation_loss(self, flow: AbstractFlow, rows: Rows) -> Tensor:
        return -flow(rows.context).log_prob_bound(rows.x, self.validation_particles)
