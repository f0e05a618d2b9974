"""The step of variational inference for stochastic flows: discrete paths summed out, continuous indices drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from ..errors import OptionError
from ..stochastic import StochasticFlow
from .objectives import FlatFlow, LogDensity, Parameters, StepOutput, finish, gaps_and_slopes

__all__ = ["build_stochastic_step"]


class _Calls(nn.Module):
    """What is asked of a stochastic flow as one module call, which is what ``functional_call`` needs."""

    def __init__(self, flow: StochasticFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, what: str, *args: Any) -> Any:
        return getattr(self.flow, what)(*args)


def _sum_paths(flat_flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, landing: bool) -> StepOutput:
    r"""Rao-Blackwell over paths: :math:`E_z \sum_u \pi_u(z) [\log q(x_u) - \log p(x_u)]`, with no score function.

    With ``landing`` the density's own parameters are held fixed, as their gradient is zero on average: at q = p nothing is left but zero.
    """
    fixed = {name: t.detach() for name, t in parameters.items()}
    z, power = noise[:, :-1], noise[0, -1]

    def draw(p: Parameters) -> tuple[Tensor, Tensor, Tensor]:
        x, log_prob = flat_flow.apply(p, "spread", z)
        return x, log_prob, flat_flow.apply(fixed if landing else p, "log_lower", x)

    (x, log_prob, log_q), pull = vjp(draw, parameters)  # type: ignore[misc]
    gap, slope, sound = gaps_and_slopes(log_joint, x, log_q, power)

    def loss(log_prob: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
        weight = torch.where(sound, log_prob, torch.full_like(log_prob, -torch.inf)).exp()
        return (weight * gap).sum() / weight.sum().clamp(min=1e-9), weight

    (by_prob, by_gap), weight = grad(loss, (0, 1), has_aux=True)(log_prob, gap)
    gradient = pull((by_gap.unsqueeze(-1) * slope, by_prob, by_gap))[0]
    total = weight.sum().clamp(min=1e-9)
    mean = (weight * gap).sum() / total
    spread = (weight * (gap - mean) ** 2).sum() / total
    return finish(flat_flow.flatten(gradient), mean, spread, 1 - total / len(noise), sound.logical_not().any(-1).sum())


def _draw_indices(flat_flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, landing: bool) -> StepOutput:
    """The bound with auxiliary indices, by reparameterised draws of everything."""
    z, power = noise[:, :-1], noise[0, -1]

    def draw(p: Parameters) -> tuple[Tensor, Tensor]:
        x, path = flat_flow.apply(p, "simulate", z)
        return x, path.log_prob - flat_flow.apply(p, "infer", x, None, path.indices)[1]

    (x, log_q), pull = vjp(draw, parameters)  # type: ignore[misc]
    gap, slope, sound = gaps_and_slopes(log_joint, x, log_q, power)
    weight = sound.to(gap) / sound.sum().clamp(min=1)
    gradient = pull((weight.unsqueeze(-1) * slope, weight))[0]
    kept = gap[sound]
    spread = kept.var() if len(kept) > 1 else kept.sum() * torch.inf
    return finish(flat_flow.flatten(gradient), kept.mean(), spread, 1 - sound.sum() / len(gap), sound.logical_not().sum())


def build_stochastic_step(
    flow: StochasticFlow, log_joint: LogDensity, objective: str
) -> tuple[FlatFlow, Callable[[Tensor, Tensor], tuple[Any, ...]]]:
    """The flow as a function of one vector of parameters, and the step ``(parameters (P,), noise (N, d + 1)) -> StepOutput``.

    The last column of the noise is the power of the model's density that the flow is fitted to, the same in all rows: 1 for the posterior.

    Args:
        flow: a flow whose indices are all discrete, or all continuous.
        log_joint: log joint density of the model.
        objective: ``"path"`` (discrete: sticking the landing) or ``"elbo"``; for continuous indices both are the bound's total gradient.

    Raises:
        OptionError: another objective.
    """
    if objective not in ("path", "elbo"):
        raise OptionError(f"objective={objective!r} is not known for stochastic flows: choose 'path' or 'elbo'")
    flat_flow = FlatFlow(flow, _Calls(flow))
    step = _sum_paths if all(layer.discrete for layer in flow.stochastic) else _draw_indices
    return flat_flow, lambda flat, noise: tuple(step(flat_flow, log_joint, flat_flow.unflatten(flat), noise, objective == "path"))
