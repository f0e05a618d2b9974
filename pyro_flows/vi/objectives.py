"""What variational inference optimises: each objective is an object whose step gives a value and its gradient, as pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vjp

from ..errors import OptionError
from .flat_flow import FlatFlow, Parameters
from .objective import Objective
from .path_sums import DrawnIndices, SummedPaths
from .steps import LogDensity, StepOutput, clean, gaps_and_slopes, output, slopes_and_values, sound_median

__all__ = ["AUTO", "OBJECTIVES", "build_step", "find_objective"]

_CLIP = 10.0  # a particle's excess is shortened to this many times the median
_SMALL = 0.5  # nats, which no median excess is taken to be below: of a good fit, stray draws are what there is to mend
_IWAE_GROUP = 8  # particles
_NO_WEIGHT = -1e30  # log weight of a dropped particle: finite, so that its gradient is zero and not NaN


@dataclass(frozen=True)
class Path(Objective):
    """The ELBO by sticking the landing: only the path through the draws carries gradient, so at q = p it has no variance."""

    name: str = "path"

    def step(self, flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, power: Tensor) -> StepOutput:
        """Value and gradient at base draws ``(N, d)``."""
        start, log_base = slopes_and_values(flow.flow.base().log_prob, noise)

        def draw(parameters: Parameters) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            x, ladj, score = flow.apply(parameters, "push", noise, start)
            return x, (log_base - ladj, score)

        if flow.flow.has_implicit_layers:  # one pass more, for derivatives that do not nest
            _, (log_q, score) = draw(parameters)
            x, pull = vjp(lambda parameters: flow.apply(parameters, "forward", noise)[0], parameters)  # type: ignore[misc]
        else:
            x, pull, (log_q, score) = vjp(draw, parameters, has_aux=True)  # type: ignore[misc]
        slope, log_p = slopes_and_values(log_joint, x)
        gap = log_q - power * log_p
        rows, sound = clean(gap, score - power * slope)
        return output(flow.flatten(pull(rows / sound.sum().clamp(min=1))[0]), gap, sound)


@dataclass(frozen=True)
class Total(Objective):
    """The total gradient of a loss of the gaps ``log q - log p`` at reparameterised draws.

    Attributes:
        loss: of gaps ``(N,)`` and of which of them are sound.
        group: what the number of particles must be a multiple of.
    """

    name: str
    loss: Callable[[Tensor, Tensor], Tensor]
    group: int = 1

    def validate(self, num_particles: int) -> None:
        """Raise an ``OptionError`` unless the particles make whole groups."""
        if num_particles % self.group:
            raise OptionError(f"objective={self.name!r} needs num_particles to be a multiple of {self.group}, got {num_particles}")

    def step(self, flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, power: Tensor) -> StepOutput:
        """Value and gradient at base draws ``(N, d)``."""
        (x, log_q), pull = vjp(lambda p: flow.sample(p, noise), parameters)  # type: ignore[misc]
        gap, slope, sound = gaps_and_slopes(log_joint, x, log_q, power)
        weight = grad(self.loss)(gap, sound)
        weight = torch.where(sound, weight, torch.zeros_like(weight))
        return output(flow.flatten(pull((weight.unsqueeze(-1) * slope, weight))[0]), gap, sound)


@dataclass(frozen=True)
class Scores(Objective):
    """A gradient that weighs the scores of draws, the gradients of their log densities where they stay; no slope of ``log p`` is taken.

    Attributes:
        weigh: gaps ``(N,)`` and which of them are sound, to weights ``(N,)``.
    """

    name: str
    weigh: Callable[[Tensor, Tensor], Tensor]

    def step(self, flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, power: Tensor) -> StepOutput:
        """Value and gradient at base draws ``(N, d)``."""
        x, log_q = flow.sample(parameters, noise)
        gap = log_q - power * log_joint(x)
        sound = torch.isfinite(gap)
        weights = self.weigh(gap, sound).detach()
        fixed = torch.where(sound.unsqueeze(-1), x, torch.zeros_like(x)).detach()
        gradient = grad(lambda p: (weights * flow.log_prob(p, fixed)).sum())(parameters)
        return output(flow.flatten(gradient), gap, sound)


def _mean(gap: Tensor, sound: Tensor) -> Tensor:
    return gap.sum() / sound.sum().clamp(min=1)


def _iwae(gap: Tensor, sound: Tensor) -> Tensor:
    weights = torch.where(sound, -gap, torch.full_like(gap, _NO_WEIGHT)).reshape(-1, _IWAE_GROUP)
    alive = sound.reshape(weights.shape).any(-1)
    bounds = torch.logsumexp(weights, -1) - math.log(_IWAE_GROUP)
    return -torch.where(alive, bounds, torch.zeros_like(bounds)).sum() / alive.sum().clamp(min=1)


def _excess(gap: Tensor, sound: Tensor) -> Tensor:
    """By how much each gap is above their mean, the longest shortened: half the slope of their variance, which is that of KL(q | p) too."""
    count = sound.sum()
    above = torch.where(sound, gap, torch.zeros_like(gap))
    above = torch.where(sound, above - above.sum() / count.clamp(min=1), torch.zeros_like(gap))
    limit = _CLIP * sound_median(above.abs(), sound).clamp(min=_SMALL)
    return above.clamp(-limit, limit) / (count - 1).clamp(min=1)


def _importance(gap: Tensor, sound: Tensor) -> Tensor:
    """Self-normalised importance weights with a minus: the slope of KL(p | q)."""
    return -torch.softmax(torch.where(sound, -gap, torch.full_like(gap, -torch.inf)), 0)


AUTO = "auto"
_NAMED: tuple[Objective, ...] = (
    *(Path(), Total("elbo", _mean), Total("iwae", _iwae, _IWAE_GROUP)),
    *(Scores("score", _excess), Scores("forward_kl", _importance)),
)
_STOCHASTIC = (SummedPaths("summed path", landing=True), SummedPaths("summed elbo", landing=False), DrawnIndices("drawn indices"))
OBJECTIVES: dict[str, Objective] = {o.name: o for o in _NAMED}
_ALL: dict[str, Objective] = OBJECTIVES | {o.name: o for o in _STOCHASTIC}  # those of stochastic flows are named by their guides


def find_objective(objective: str | Objective) -> Objective:
    """An objective by its name, those of stochastic flows included; an object is taken as it is."""
    return _ALL[objective] if isinstance(objective, str) else objective


def build_step(objective: Objective, flow: FlatFlow, log_joint: LogDensity) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
    """The step of an objective as a function of tensors alone: ``(parameters (P,), noise (N, d), power ()) -> StepOutput``."""
    return lambda flat, noise, power: tuple(objective.step(flow, log_joint, flow.unflatten(flat), noise, power))
