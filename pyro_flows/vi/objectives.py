"""One step of variational inference as a pure function of (parameters, noise): the objective's value and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from ..distributions import Flow
from ..errors import OptionError
from ..stochastic import StochasticFlow
from ..transforms import Standardize
from .scores import has_fixed_points, push_score

__all__ = ["AUTO", "OBJECTIVES", "StepOutput", "FlatFlow", "build_step", "check_objective", "finish", "gaps_and_slopes"]

LogDensity = Callable[[Tensor], Tensor]
Parameters = dict[str, Tensor]
AnyFlow = Flow | StochasticFlow
_CLIP = 10.0  # a particle's gradient, or its excess, is shortened to this many times the median
_SMALL = 0.5  # nats, which no median excess is taken to be below: of a good fit, stray draws are what there is to mend
_LOST_COST = 100.0  # nats: what all of the mass would cost
_IWAE_GROUP = 8
_NO_WEIGHT = -1e30  # log weight of a dropped particle: finite, so that its gradient is zero and not NaN


class StepOutput(NamedTuple):
    """What a step returns, all tensors: the gradient of the loss, and per-step statistics (scalars)."""

    gradient: Tensor
    elbo: Tensor
    spread: Tensor  # variance of the log weights: twice the KL divergence, near the optimum
    dropped: Tensor  # number of particles with a non-finite value or gradient


class _Ends(nn.Module):
    """What is asked of a flow's transform as one module call, which is what ``functional_call`` needs."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.transform = flow.transform

    def forward(self, what: str, *args: Tensor) -> tuple[Tensor, ...]:
        calls: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "forward": self.transform.forward_and_ladj,
            "inverse": self.transform.inverse_and_ladj,
            "push": partial(push_score, self.transform),
        }
        return calls[what](*args)


class FlatFlow:
    """A flow as functions of one flat parameter vector, so that optimizers and graphs handle a single tensor.

    The location and scale of a :class:`~pyro_flows.transforms.Standardize` ride along at the end, with zero gradients: a captured graph takes them as
    inputs, and so stays good when they change.

    Args:
        flow: the flow.
        ends: a module that holds the flow, called for what is asked of it; its transform's directions by default.
    """

    def __init__(self, flow: AnyFlow, ends: nn.Module | None = None) -> None:
        self.flow: Any = flow
        self._ends: nn.Module = _Ends(self.flow) if ends is None else ends  # type: ignore[arg-type]
        fixed = [b for m in self._ends.modules() if isinstance(m, Standardize) for b in m.buffers()]
        self._learned = [name for name, p in self._ends.named_parameters() if p.requires_grad]
        tensors = dict(self._ends.named_parameters()) | {n: b for n, b in self._ends.named_buffers() if any(b is f for f in fixed)}
        self._tensors = {n: t for n, t in tensors.items() if n in self._learned or not t.requires_grad}
        self._sizes = [t.numel() for t in self._tensors.values()]

    def read(self) -> Tensor:
        """The flow's parameters as one vector, a copy."""
        return self.flatten({n: t.detach() for n, t in self._tensors.items()}, self._tensors)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Put a vector back into the flow's parameters."""
        for t, part in zip(self._tensors.values(), flat.split(self._sizes), strict=True):
            t.copy_(part.view_as(t))

    def unflatten(self, flat: Tensor) -> Parameters:
        """The parameters by name, as views of the vector."""
        return {n: part.view(t.shape) for (n, t), part in zip(self._tensors.items(), flat.split(self._sizes), strict=True)}

    def flatten(self, values: Parameters, names: Iterable[str] | None = None) -> Tensor:
        """One vector from gradients by name, zero where nothing is learned; from all values of ``names`` where they are given."""
        kept = set(self._learned if names is None else names)
        parts = [values[n].reshape(-1) if n in kept else torch.zeros_like(t).reshape(-1) for n, t in self._tensors.items()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def apply(self, parameters: Parameters, what: str, *args: Any) -> Any:
        """The flow's ``"forward"`` or ``"inverse"`` map, with its ladj; or ``"push"``, the forward map with ladj and score."""
        return functional_call(self._ends, parameters, (what, *args))

    def log_prob(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Log density of points ``(N, d)``."""
        z, ladj = self.apply(parameters, "inverse", x)
        return self.flow.base().log_prob(z) + ladj

    def sample(self, parameters: Parameters, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Points and their log density from base draws ``(N, d)``."""
        x, ladj = self.apply(parameters, "forward", noise)
        return x, self.flow.base().log_prob(noise) - ladj


def _slopes_and_values(function: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``(N, d)`` and values ``(N,)`` of a function at each of N points."""
    values, pull = vjp(function, x)  # type: ignore[misc]
    return pull(torch.ones_like(values))[0], values


def gaps_and_slopes(log_joint: LogDensity, x: Tensor, log_q: Tensor, power: float | Tensor = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """``log q - power log p`` at points ``(*batch, d)``, its slopes there through ``log p``, and which of them are sound.

    Where value or slope is not finite both are zero: a loss that masks the value alone would still multiply the slope by zero, and get NaN.
    """
    slopes, log_p = _slopes_and_values(log_joint, x.reshape(-1, x.shape[-1]))
    gaps, slopes = log_q - power * log_p.view(log_q.shape), -power * slopes.view(x.shape)
    sound = torch.isfinite(gaps) & torch.isfinite(slopes).all(-1)
    return torch.where(sound, gaps, torch.zeros_like(gaps)), torch.where(sound.unsqueeze(-1), slopes, torch.zeros_like(slopes)), sound


def _median(sizes: Tensor, sound: Tensor) -> Tensor:
    """The median of those of sound particles, 0 without any."""
    return torch.where(sound, sizes, torch.full_like(sizes, torch.nan)).nanmedian().nan_to_num(0.0)


def _clean(gap: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Per-particle gradients with the non-finite ones zeroed and the longest shortened; and which particles are sound."""
    sound = torch.isfinite(rows).all(-1) & torch.isfinite(gap)
    rows = torch.where(sound.unsqueeze(-1), rows, torch.zeros_like(rows))
    norms = rows.norm(dim=-1)
    limit = _CLIP * _median(norms, sound)
    return rows * (limit / norms.clamp(min=torch.finfo(rows.dtype).tiny)).clamp(max=1.0).unsqueeze(-1), sound


def _output(gradient: Tensor, gap: Tensor, sound: Tensor) -> StepOutput:
    count = sound.sum().clamp(min=1)
    clean = torch.where(sound, gap, torch.zeros_like(gap))
    mean = clean.sum() / count
    spread = (torch.where(sound, gap - mean, torch.zeros_like(gap)) ** 2).sum() / (count - 1).clamp(min=1)
    return finish(gradient, mean, spread, 1 - sound.sum() / len(gap), sound.logical_not().sum())


def finish(gradient: Tensor, mean: Tensor, spread: Tensor, lost: Tensor, dropped: Tensor) -> StepOutput:
    """A step's output, given the mean and variance of log q - log p, and the share of mass where the density is zero or not a number.

    Leaving that mass out must not look like progress.
    """
    elbo = torch.where(lost < 1, -mean - _LOST_COST * lost, -torch.inf)
    return StepOutput(gradient, elbo, torch.where(lost < 1, spread, torch.inf), dropped)


def _path(flat_flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor) -> StepOutput:
    """Sticking the landing: only the path through the draws carries gradient, so at q = p it has no variance."""
    start, log_base = _slopes_and_values(flat_flow.flow.base().log_prob, noise)

    def draw(parameters: Parameters) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, ladj, score = flat_flow.apply(parameters, "push", noise, start)
        return x, (log_base - ladj, score)

    if has_fixed_points(flat_flow.flow.transform):  # one pass more, for derivatives that do not nest
        _, (log_q, score) = draw(parameters)
        x, pull = vjp(lambda parameters: flat_flow.apply(parameters, "forward", noise)[0], parameters)  # type: ignore[misc]
    else:
        x, pull, (log_q, score) = vjp(draw, parameters, has_aux=True)  # type: ignore[misc]
    slope, log_p = _slopes_and_values(log_joint, x)
    rows, gap = score - slope, log_q - log_p
    rows, sound = _clean(gap, rows)
    return _output(flat_flow.flatten(pull(rows / sound.sum().clamp(min=1))[0]), gap, sound)


def _total(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., StepOutput]:
    """A step with the total gradient of a loss of (log p, log q) at reparameterised draws."""

    def step(flat_flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor) -> StepOutput:
        (x, log_q), pull = vjp(lambda p: flat_flow.sample(p, noise), parameters)  # type: ignore[misc]
        gap, slope, sound = gaps_and_slopes(log_joint, x, log_q)
        weight = grad(loss)(gap, sound)
        weight = torch.where(sound, weight, torch.zeros_like(weight))
        return _output(flat_flow.flatten(pull((weight.unsqueeze(-1) * slope, weight))[0]), gap, sound)

    return step


def _iwae_loss(gap: Tensor, sound: Tensor) -> Tensor:
    weights = torch.where(sound, -gap, torch.full_like(gap, _NO_WEIGHT)).reshape(-1, _IWAE_GROUP)
    alive = sound.reshape(weights.shape).any(-1)
    bounds = torch.logsumexp(weights, -1) - math.log(_IWAE_GROUP)
    return -torch.where(alive, bounds, torch.zeros_like(bounds)).sum() / alive.sum().clamp(min=1)


def _by_scores(weigh: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., StepOutput]:
    """A step whose gradient weighs the scores of draws, the gradients of their log densities where they stay; no slope of ``log p`` is taken."""

    def step(flat_flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor) -> StepOutput:
        x, log_q = flat_flow.sample(parameters, noise)
        gap = log_q - log_joint(x)
        sound = torch.isfinite(gap)
        weights = weigh(gap, sound).detach()
        fixed = torch.where(sound.unsqueeze(-1), x, torch.zeros_like(x)).detach()
        gradient = grad(lambda p: (weights * flat_flow.log_prob(p, fixed)).sum())(parameters)
        return _output(flat_flow.flatten(gradient), gap, sound)

    return step


def _excess(gap: Tensor, sound: Tensor) -> Tensor:
    """By how much each gap is above their mean, the longest shortened: half the slope of their variance, which is that of KL(q | p) too."""
    count = sound.sum()
    above = torch.where(sound, gap, torch.zeros_like(gap))
    above = torch.where(sound, above - above.sum() / count.clamp(min=1), torch.zeros_like(gap))
    limit = _CLIP * _median(above.abs(), sound).clamp(min=_SMALL)
    return above.clamp(-limit, limit) / (count - 1).clamp(min=1)


def _importance(gap: Tensor, sound: Tensor) -> Tensor:
    """Self-normalised importance weights with a minus: the slope of KL(p | q)."""
    return -torch.softmax(torch.where(sound, -gap, torch.full_like(gap, -torch.inf)), 0)


AUTO = "auto"
OBJECTIVES: dict[str, Callable[[FlatFlow, LogDensity, Parameters, Tensor], StepOutput]] = {
    "path": _path,
    "elbo": _total(lambda gap, sound: gap.sum() / sound.sum().clamp(min=1)),
    "iwae": _total(_iwae_loss),
    "score": _by_scores(_excess),
    "forward_kl": _by_scores(_importance),
}


def check_objective(objective: str, num_particles: int) -> None:
    """Raise an ``OptionError`` for an unknown objective, or a number of particles that it cannot use. ``"auto"`` is known."""
    if objective not in (AUTO, *OBJECTIVES):
        raise OptionError(f"objective={objective!r} is not known: choose one of {AUTO}, {', '.join(OBJECTIVES)}")
    if objective == "iwae" and num_particles % _IWAE_GROUP:
        raise OptionError(f"objective='iwae' needs num_particles to be a multiple of {_IWAE_GROUP}, got {num_particles}")


def build_step(flat_flow: FlatFlow, log_joint: LogDensity, objective: str, num_particles: int) -> Callable[[Tensor, Tensor], tuple[Any, ...]]:
    """The step of an objective, as a function ``(parameters (P,), noise (N, d)) -> StepOutput`` of tensors.

    Raises:
        OptionError: an unknown objective, or a number of particles that it cannot use.
    """
    check_objective(objective, num_particles)
    step = OBJECTIVES[objective]
    return lambda flat, noise: tuple(step(flat_flow, log_joint, flat_flow.unflatten(flat), noise))
