"""The recipe of continuous normalizing flows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from ..distributions import AugmentedFlow, Flow
from ..errors import OptionError, ShapeError
from ..nets import AutoregressiveVelocity, PotentialNet, VelocityMLP
from ..transforms import ContinuousFlow
from .stacks import check_sizes, flow_of

__all__ = ["cnf"]

NETS: dict[str, Callable[[int, int, Sequence[int]], nn.Module]] = {
    "mlp": VelocityMLP,
    "potential": lambda dim, context_dim, widths: PotentialNet(dim, context_dim, max(widths, default=0)),
    "autoregressive": AutoregressiveVelocity,
}


def cnf(
    dim: int,
    context_dim: int = 0,
    transforms: int = 1,
    hidden_features: Sequence[int] = (64, 64),
    net: Literal["mlp", "potential", "autoregressive"] = "mlp",
    augment: int = 0,
    trace: Literal["exact", "hutchinson"] = "exact",
    noise: Literal["rademacher", "gaussian", "sphere"] = "rademacher",
    solver: str = "dopri5",
    steps: int = 20,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    adjoint: bool = False,
    checkpoint: int = 0,
    base: nn.Module | None = None,
) -> Flow:
    """Points that move with a velocity that a net gives (CNF, FFJORD, OT-Flow): a full Jacobian, and an accuracy that can be chosen.

    Args:
        net: the velocity: ``"mlp"``; ``"potential"``, the gradient of a potential as wide as the widest of ``hidden_features``; or
            ``"autoregressive"``, whose trace is free.
        augment: extra coordinates for the points to move through (ANODE). The result is an :class:`~pyro_flows.distributions.AugmentedFlow`, whose
            density is known by a lower bound only.
        trace, noise, solver, steps, rtol, atol, adjoint, checkpoint: see :class:`~pyro_flows.transforms.ContinuousFlow`.

    Train it by maximum likelihood, or without solving by ``fit_density(flow, x, objective="flow_matching")``. As a guide,
    ``AutoFlow(model, flow="cnf")`` takes fixed steps. Cost: densities and samples alike, 30 to 200 evaluations of the net, each with an
    exact trace that is free but for nets of more than two hidden layers and ``"potential"``. Reference: FFJORD (Grathwohl et al., 2018),
    https://arxiv.org/abs/1810.01367
    """
    if net not in NETS:
        raise OptionError(f"net={net!r} is not known: choose one of {', '.join(NETS)}")
    if not isinstance(context_dim, int) or context_dim < 0:
        raise ShapeError(f"context_dim must be a non-negative integer, got {context_dim!r}")
    if not isinstance(augment, int) or augment < 0:
        raise OptionError(f"augment must be the number of extra coordinates, got {augment!r}")
    size = dim + augment
    layers = [
        ContinuousFlow(size, NETS[net](size, context_dim, hidden_features), context_dim, trace, noise, solver, steps, rtol, atol, adjoint, checkpoint)
        for _ in range(check_sizes(dim, transforms))
    ]
    flow = flow_of(layers, size, base)
    return AugmentedFlow(flow, dim, hidden_features) if augment else flow
