"""The objectives that have a name."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..distributions.abstract_flow import AbstractFlow
from ..errors import OptionError
from .flow_matching import FlowMatching
from .likelihood import Bound, Likelihood
from .objective import Objective
from .regularized import Regularized

__all__ = ["CATALOGUE", "ObjectiveOptions", "objective_of"]


class ObjectiveOptions(NamedTuple):
    """The options of :func:`~pyro_flows.density.fit_density` that belong to objectives."""

    num_particles: int = 8
    coupling: str = "independent"
    kinetic: float = 0.0
    jacobian: float = 0.0


class Entry(NamedTuple):
    """How an objective is made, and the options that it has a use for."""

    make: Callable[[ObjectiveOptions], Objective]
    uses: tuple[str, ...] = ()


def _likelihood(options: ObjectiveOptions) -> Objective:
    penalised = options.kinetic or options.jacobian
    return Regularized(options.kinetic, options.jacobian) if penalised else Likelihood()


CATALOGUE = {
    "likelihood": Entry(_likelihood, ("kinetic", "jacobian")),
    "flow_matching": Entry(lambda options: FlowMatching(options.coupling), ("coupling",)),
    "elbo": Entry(lambda options: Bound("elbo", "total")),
    "stl": Entry(lambda options: Bound("stl", "stl")),
    "iwae": Entry(lambda options: Bound("iwae", "total", options.num_particles), ("num_particles",)),
    "dreg": Entry(lambda options: Bound("dreg", "dreg", options.num_particles), ("num_particles",)),
    "rws": Entry(lambda options: Bound("rws", "rws", options.num_particles), ("num_particles",)),
}


def objective_of(flow: AbstractFlow, objective: str | Objective, options: ObjectiveOptions) -> Objective:
    """The objective that a name or an object stands for, for this flow.

    Raises:
        OptionError: a name that is not known, options that do not go with the objective, or a flow that it is not for.
    """
    if not isinstance(options.num_particles, int) or options.num_particles < 1:
        raise OptionError(f"num_particles must be a positive integer, got {options.num_particles!r}")
    if isinstance(objective, str):
        name = flow.default_objective if objective == "auto" else objective
        if name not in CATALOGUE:
            raise OptionError(f"objective={objective!r} is not known: choose one of auto, {', '.join(CATALOGUE)}, or give a pf.density.Objective")
        entry = CATALOGUE[name]
        _check_used(f"objective={name!r}", options, entry.uses)
        objective = entry.make(options)
    elif isinstance(objective, Objective):
        _check_used("an objective that is an object", options, ())
    else:
        raise OptionError(f"objective must be a name or a pf.density.Objective, got {type(objective).__name__}")
    objective.validate(flow)
    return objective


def _check_used(what: str, options: ObjectiveOptions, uses: tuple[str, ...]) -> None:
    """Raise an ``OptionError`` for an option that would be left out; the number of particles has no say where there is one path."""
    for option, value in options._asdict().items():
        if option not in ("num_particles", *uses) and value != ObjectiveOptions._field_defaults[option]:
            users = [name for name, entry in CATALOGUE.items() if option in entry.uses]
            raise OptionError(f'{option}={value!r} does not go with {what}: it is an option of "{", ".join(users)}"')
