"""Objectives for stochastic flows: discrete paths are summed, continuous indices drawn."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import grad, vjp

from ..stochastic import StochasticFlow
from .flat_flow import Calls, FlatFlow, Parameters
from .objective import Objective
from .steps import LogDensity, StepOutput, finish, gaps_and_slopes

__all__ = ["DrawnIndices", "SummedPaths"]


class _OfStochasticFlow(Objective):
    def flat(self, flow: StochasticFlow) -> FlatFlow:
        return FlatFlow(flow, Calls(flow))


@dataclass(frozen=True)
class SummedPaths(_OfStochasticFlow):
    r"""The ELBO by Rao-Blackwell over paths: :math:`E_z \sum_u \pi_u(z) [\log q(x_u) - \log p(x_u)]`, with no score function.

    Attributes:
        landing: hold the density's own parameters fixed, as their gradient is zero on average: at q = p nothing is left but zero.
    """

    name: str
    landing: bool

    def step(self, flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, power: Tensor) -> StepOutput:
        """Value and gradient at base draws ``(N, d)``."""
        fixed = {name: t.detach() for name, t in parameters.items()}

        def draw(p: Parameters) -> tuple[Tensor, Tensor, Tensor]:
            x, log_prob = flow.apply(p, "spread", noise)
            return x, log_prob, flow.apply(fixed if self.landing else p, "log_lower", x)

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
        return finish(flow.flatten(gradient), mean, spread, 1 - total / len(noise), sound.logical_not().any(-1).sum())


@dataclass(frozen=True)
class DrawnIndices(_OfStochasticFlow):
    """The bound of the ELBO with auxiliary indices, by reparameterised draws of everything."""

    name: str
    obstacle: str = "it draws random indices on its way"

    def step(self, flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, power: Tensor) -> StepOutput:
        """Value and gradient at base draws ``(N, d)``."""

        def draw(p: Parameters) -> tuple[Tensor, Tensor]:
            x, path = flow.apply(p, "simulate", noise)
            return x, path.log_prob - flow.apply(p, "infer", x, None, path.indices)[1]

        (x, log_q), pull = vjp(draw, parameters)  # type: ignore[misc]
        gap, slope, sound = gaps_and_slopes(log_joint, x, log_q, power)
        weight = sound.to(gap) / sound.sum().clamp(min=1)
        gradient = pull((weight.unsqueeze(-1) * slope, weight))[0]
        kept = gap[sound]
        spread = kept.var() if len(kept) > 1 else kept.sum() * torch.inf
        return finish(flow.flatten(gradient), kept.mean(), spread, 1 - sound.sum() / len(gap), sound.logical_not().sum())
