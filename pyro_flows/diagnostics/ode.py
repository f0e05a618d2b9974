"""How accurately is a continuous flow integrated?"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..distributions import Flow
from ..errors import OptionError, ShapeError
from ..numerics import draw_probe
from ..numerics.random import seeded
from ..transforms import FlowTransform

__all__ = ["OdeCheck", "check_ode"]

_TIGHTER = 100.0  # by what tolerances are divided
_MORE_STEPS = {"euler": 100, "midpoint": 10, "rk4": 4}  # which make the error of a fixed method about a hundredth, or less
_GOOD_Z = 1e-2  # standard deviations of the base
_GOOD_NATS = 1e-2


@dataclass(frozen=True)
class OdeCheck:
    """What :func:`check_ode` finds. Printing it prints a table.

    Attributes:
        z_error: distance between the base points of both solves, ``(N,)``.
        log_prob_error: difference of the log densities, the flow's own minus the finer one's, ``(N,)``.
        evaluations: of the nets in the flow's own solve; with ``reference_evaluations`` in the finer one.
        verdict: ``"good"`` where no point is off by more than 0.01 in the base, where scales are one, or in log density by more than 0.01 nats; or
            ``"inaccurate"``.
        reasons: plain sentences.
    """

    z_error: Tensor
    log_prob_error: Tensor
    evaluations: int
    reference_evaluations: int

    @property
    def reasons(self) -> tuple[str, ...]:
        reasons = []
        for what, error, limit, unit in (
            ("base point", self.z_error, _GOOD_Z, ""),
            ("log density", self.log_prob_error.abs(), _GOOD_NATS, " nats"),
        ):
            if not bool((error <= limit).all()):
                reasons.append(
                    f"the {what} is off by up to {float(error.max()):.2g}{unit}, more than {limit:g}: use smaller rtol and atol, more steps, or an "
                    'adaptive solver such as "dopri5"'
                )
        return tuple(reasons)

    @property
    def verdict(self) -> str:
        return "inaccurate" if self.reasons else "good"

    def __str__(self) -> str:
        lines = [f"check_ode: {self.verdict}, {len(self.z_error)} points", f"{'':<14}{'median':>10}{'largest':>10}"]
        for name, error in (("base point", self.z_error), ("log density", self.log_prob_error.abs())):
            lines.append(f"{name:<14}{float(error.median()):>10.1e}{float(error.max()):>10.1e}")
        lines.append(f"evaluations   {self.evaluations} against {self.reference_evaluations}")
        return "\n".join([*lines, *(f"- {reason}" for reason in self.reasons)])

    __repr__ = __str__


@torch.no_grad()
def check_ode(flow: Flow, x: Tensor, context: Tensor | None = None) -> OdeCheck:
    """Solve again in float64 with tolerances a hundred times smaller, or with more of the fixed steps, and compare.

    Both solves have the same random directions where the trace is estimated. The flow is not changed, nor the random state.

    Args:
        flow: a flow with :class:`~pyro_flows.transforms.ContinuousFlow` layers, or such a layer.
        x: points on the target side, ``(N, D)``, such as draws or data.
        context: ``(N, C)``, for a conditional flow.

    Cost: two to five solves.

    Raises:
        OptionError: a flow without such a layer.
        ShapeError: points that are not ``(N, D)``.
        IntegrationError: a solve fails.

    Example:
        >>> import torch, pyro_flows as pf
        >>> check_ode(pf.flows.cnf(2), torch.randn(100, 2)).verdict
        'good'
    """
    if isinstance(flow, FlowTransform):
        flow = Flow(flow.dim, flow)
    layers = _solved(flow) if isinstance(flow, Flow) else []
    if not layers:
        raise OptionError("check_ode: flow must be a Flow with ContinuousFlow layers, such as pf.flows.cnf(dim), or such a layer")
    if x.dim() != 2 or x.shape[1] != flow.transform.dim or not len(x):
        raise ShapeError(f"check_ode: x must have shape (N, {flow.transform.dim}) with N > 0, got {tuple(x.shape)}")
    fine = copy.deepcopy(flow).double()
    for layer in _solved(fine):
        s = layer.solver
        layer.solver = replace(s, rtol=s.rtol / _TIGHTER, atol=s.atol / _TIGHTER, steps=s.steps * _MORE_STEPS.get(s.method, 1))
    wide = None if context is None else context.double()
    with seeded():
        probes = [draw_probe(m.noise, x) if m.trace == "hutchinson" else None for m in layers]
    z, log_prob, evaluations = _score(flow, x, context, probes)
    fine_z, fine_log_prob, fine_evaluations = _score(fine, x.double(), wide, probes)
    return OdeCheck((z - fine_z).norm(dim=-1), log_prob - fine_log_prob, evaluations, fine_evaluations)


def _solved(flow: Flow) -> list[Any]:
    """The continuous flows among the layers, base to target."""
    return [layer.ode[0] for layer in flow.transform.layers if layer.ode]


def _score(flow: Flow, x: Tensor, context: Tensor | None, probes: list[Tensor | None]) -> tuple[Tensor, Tensor, int]:
    """Base points, log densities, and the number of evaluations."""
    left, total, evaluations = list(probes), x.new_zeros(x.shape[:-1]), 0
    for part in reversed(flow.transform.layers):
        given = context if part.context_dim else None
        if part.ode:
            (layer, backwards), probe = part.ode, left.pop()
            solved = layer.solve(x, given, inverse=not backwards, probe=None if probe is None else probe.to(x))
            x, ladj, evaluations = solved.value, solved.ladj, evaluations + solved.evaluations
        else:
            x, ladj = part.inverse_and_ladj(x, given)
        total = total + ladj
    return x, total + flow.base(context).log_prob(x), evaluations
