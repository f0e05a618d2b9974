"""Initial value problems: fixed steps as a plain sequence of operations, adaptive steps and adjoints by torchdiffeq."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torchdiffeq import odeint, odeint_adjoint

from ..errors import CaptureError, IntegrationError, OptionError
from .introspection import is_traced

__all__ = ["ADAPTIVE_SOLVERS", "FIXED_SOLVERS", "Solver", "integrate"]

Field = Callable[[Any, Tensor], Tensor]  # (time, state) -> derivative; time is a number or a tensor of no dimension
Step = Callable[[Field, float, float, Tensor], Tensor]

_MOST_STEPS = 10_000  # of one adaptive solve
_LEAST_STEP = 1e-13  # in units of time
ADAPTIVE_SOLVERS = ("dopri5", "dopri8", "bosh3", "adaptive_heun")  # torchdiffeq's fehlberg2 misses its tolerance two-hundredfold


def _euler(f: Field, t: float, h: float, y: Tensor) -> Tensor:
    return y + h * f(t, y)


def _midpoint(f: Field, t: float, h: float, y: Tensor) -> Tensor:
    return y + h * f(t + h / 2, y + (h / 2) * f(t, y))


def _rk4(f: Field, t: float, h: float, y: Tensor) -> Tensor:
    """Kutta's three-eighths rule, which is torchdiffeq's "rk4": the adjoint then solves the same equations."""
    k1 = f(t, y)
    k2 = f(t + h / 3, y + (h / 3) * k1)
    k3 = f(t + 2 * h / 3, y + h * (k2 - k1 / 3))
    k4 = f(t + h, y + h * (k1 - k2 + k3))
    return y + (h / 8) * (k1 + 3 * (k2 + k3) + k4)


FIXED_SOLVERS: dict[str, tuple[Step, int]] = {"euler": (_euler, 1), "midpoint": (_midpoint, 2), "rk4": (_rk4, 4)}  # steps, evaluations


@dataclass(frozen=True)
class Solver:
    """How to integrate, and how to differentiate the result.

    Attributes:
        method: ``"euler"``, ``"midpoint"`` or ``"rk4"`` take ``steps`` equal steps; ``"dopri5"``, ``"dopri8"``, ``"bosh3"`` and
            ``"adaptive_heun"`` choose their steps, so that the error of each, in root mean square over the whole state, stays below
            ``atol + rtol * |state|``. Tolerances below ten units of rounding of the state's dtype are raised to that.
        steps: number of steps of a fixed method.
        rtol, atol: tolerances of an adaptive method.
        adjoint: differentiate by solving the adjoint equation backwards: memory does not depend on the number of steps, the gradient has an error of
            the size of the tolerances, and there is no second derivative. Otherwise the steps themselves are differentiated.
        checkpoint: with ``n > 0``, keep only ``n`` states on the way, and repeat one n-th of the solve at a time while differentiating.

    Raises:
        OptionError: an unknown method, tolerances or steps that are not positive, or both ways to save memory at once.
    """

    method: str = "dopri5"
    steps: int = 20
    rtol: float = 1e-5
    atol: float = 1e-5
    adjoint: bool = False
    checkpoint: int = 0

    def __post_init__(self) -> None:
        known = (*ADAPTIVE_SOLVERS, *FIXED_SOLVERS)
        if self.method not in known:
            raise OptionError(f"solver={self.method!r} is not known: choose one of {', '.join(known)}")
        if not isinstance(self.steps, int) or self.steps < 1:
            raise OptionError(f"steps must be a positive integer, got {self.steps!r}")
        for name in ("rtol", "atol"):
            if not 0 < getattr(self, name) < math.inf:
                raise OptionError(f"{name} must be positive, got {getattr(self, name)}")
        if not isinstance(self.checkpoint, int) or self.checkpoint < 0:
            raise OptionError(f"checkpoint must be the number of states to keep, 0 for all, got {self.checkpoint!r}")
        if self.adjoint and self.checkpoint:
            raise OptionError("adjoint=True keeps no state on the way, so checkpoint= has nothing to do: choose one of them")

    @property
    def is_fixed(self) -> bool:
        """Whether the steps are the same for every state, so that the solve is a plain sequence of operations."""
        return self.method in FIXED_SOLVERS


def integrate(f: Field, state: Tensor, start: float, end: float, solver: Solver, parameters: Sequence[Tensor] = ()) -> tuple[Tensor, int]:
    r"""Solve :math:`\dot y = f(t, y)` from ``start`` to ``end``, in either direction of time.

    Args:
        f: ``f(t, y)``, whose time is a number or a tensor of no dimension.
        state: :math:`y` at ``start``, any shape.
        solver: how.
        parameters: the tensors that ``f`` depends on, of which the adjoint method finds gradients.

    Returns:
        The state at ``end``, and how often ``f`` was evaluated.

    Raises:
        IntegrationError: the state is not finite, the step has shrunk to nothing, or there were too many: with time and norm of the state. Where a
            tracer or a function transform looks on, fixed steps give NaN instead.
        CaptureError: a tracer or a function transform looks on, and the method is adaptive or the adjoint.
    """
    if solver.is_fixed and not solver.adjoint and not (solver.checkpoint and state.numel()):
        return _fixed(f, state, start, end, solver.method, solver.steps), solver.steps * FIXED_SOLVERS[solver.method][1]
    if is_traced() and not torch.compiler.is_compiling() and (solver.adjoint or not solver.is_fixed):
        which = "adjoint=True" if solver.adjoint else f'solver="{solver.method}", which chooses its steps by the values it meets,'
        raise CaptureError(f'{which} cannot run in a graph capture or under torch.func: use fixed steps, solver="rk4", and adjoint=False')
    watched = _Watched(f)
    pieces = max(1, min(solver.checkpoint, solver.steps) if solver.is_fixed else solver.checkpoint)
    if pieces == 1:
        return _solve(watched, state, start, end, solver, solver.steps, parameters), watched.evaluations
    cuts = [i * solver.steps // pieces for i in range(pieces + 1)] if solver.is_fixed else list(range(pieces + 1))
    for a, b in zip(cuts, cuts[1:], strict=False):
        times = [start + (end - start) * c / cuts[-1] for c in (a, b)]
        piece = partial(_solve, watched, start=times[0], end=times[1], solver=solver, steps=b - a)
        state = piece(state) if is_traced() else _Repeated.apply(piece, state, *(p for p in parameters if p.requires_grad))
    return state, watched.evaluations


def _solve(f: _Watched, state: Tensor, start: float, end: float, solver: Solver, steps: int, parameters: Sequence[Tensor] = ()) -> Tensor:
    f.steps = 0
    if not state.numel():  # nothing to measure an error by
        return _fixed(f, state, start, end, "euler", 1)
    if solver.is_fixed and not solver.adjoint:
        return _fixed(f, state, start, end, solver.method, steps)
    times = torch.tensor([start, end], dtype=torch.float64, device=state.device)
    options: dict[str, Any] = {"step_t": times.sort()[0]}  # land there: the interpolant beyond the last step is of lower order
    if solver.is_fixed:
        times = times.to(state)
        options = {"grid_constructor": lambda f, y, t: torch.linspace(float(t[0]), float(t[-1]), steps + 1).to(t)}
    least = 10 * torch.finfo(state.dtype).eps
    common: dict[str, Any] = {"rtol": max(solver.rtol, least), "atol": max(solver.atol, least), "method": solver.method, "options": options}
    if not solver.adjoint:
        return odeint(f, state, times, **common)[-1]
    backward = options if solver.is_fixed else {**options, "norm": "seminorm"}  # the parameters' gradients are integrals: they need no control
    learned = tuple(p for p in parameters if p.requires_grad)
    return odeint_adjoint(f, state, times, **common, adjoint_options=backward, adjoint_params=learned)[-1]


class _Repeated(torch.autograd.Function):
    """A piece of a solve whose graph is made anew, in the backward pass.

    ``torch.utils.checkpoint`` gives the same gradients, but keeps a graph without tensors: 0.2 MiB a step of rk4, and four times the forward time.
    """

    @staticmethod
    def forward(ctx: Any, piece: Callable[[Tensor], Tensor], state: Tensor, *parameters: Tensor) -> Tensor:
        ctx.piece = piece
        ctx.save_for_backward(state, *parameters)
        return piece(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        state, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            state = state.detach().requires_grad_()
            out = ctx.piece(state)
        return None, *torch.autograd.grad(out, (state, *parameters), grad, allow_unused=True)


def _fixed(f: Field, state: Tensor, start: float, end: float, method: str, steps: int) -> Tensor:
    step, h, y = FIXED_SOLVERS[method][0], (end - start) / steps, state
    for i in range(steps):
        y = step(f, start + i * h, h, y)
    if not is_traced() and bool(state.isfinite().all() & ~y.isfinite().all()):
        _find_failure(step, f, state, start, h, steps)
    return y


@torch.no_grad()
def _find_failure(step: Step, f: Field, y: Tensor, start: float, h: float, steps: int) -> None:
    """Take the steps again, to say where the state stops being finite."""
    for i in range(steps):
        after = step(f, start + i * h, h, y)
        if not bool(after.isfinite().all()):
            raise IntegrationError(_explain("the dynamics gave NaN or infinity", start + i * h, y))
        y = after


def _explain(what: str, t: float, state: Tensor) -> str:
    return (
        f"{what} at time {t:.6g}, where the largest row of the state has norm {float(state.detach().norm(dim=-1).max()):.3g}: check the points and "
        "the net's parameters; dynamics that are too fast want a smaller learning rate, or kinetic= and jacobian= in fit_density"
    )


class _Watched:
    """A field that counts its evaluations, and that stops a solve which is going nowhere."""

    def __init__(self, f: Field) -> None:
        self.f, self.evaluations, self.steps, self.last = f, 0, 0, torch.zeros(())

    def __call__(self, t: Any, y: Tensor) -> Tensor:
        self.evaluations += 1
        self.last = self.f(t, y)
        return self.last

    def callback_step(self, t: Tensor, y: Any, dt: Tensor) -> None:
        """Called by torchdiffeq before each step, in either direction of time, and with a tuple of tensors by the adjoint solve."""
        self.steps += 1
        parts: tuple[Tensor, ...] = (y,) if isinstance(y, Tensor) else y
        state = y if isinstance(y, Tensor) else parts[1]
        if not all(bool(part.isfinite().all()) for part in parts):
            raise IntegrationError(_explain("the state is NaN or infinite", float(t.detach()), state))
        if not abs(float(dt.detach())) > _LEAST_STEP:  # NaN too
            finite = bool(self.last.isfinite().all())  # a trial step into NaN has no error to choose the next one by
            what = "the solver's step has shrunk to nothing" if finite else "the dynamics gave NaN or infinity"
            raise IntegrationError(_explain(what, float(t.detach()), state))
        if self.steps > _MOST_STEPS:
            raise IntegrationError(_explain(f"the solver has not arrived after {_MOST_STEPS} steps: it is", float(t.detach()), state))

    callback_step_adjoint = callback_step
