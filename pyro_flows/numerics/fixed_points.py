"""Fixed points of contractions: Anderson's acceleration, a residual that is reported, and implicit gradients of any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import vjp

from ..errors import InversionError
from .log_det import batch_jacobian

__all__ = ["FixedPoint", "fixed_point"]

Map = Callable[..., Tensor]

WINDOW = 8  # steps that the acceleration looks back
TRACED_ITERATIONS, NEWTON_STEPS = 10, 8  # where values cannot be looked at: under vmap, make_fx and torch.compile


class FixedPoint(NamedTuple):
    """The solution ``value (*batch, D)``, with ``iterations`` and ``residual``, both ``(*batch,)``: evaluations of the map, and ``|f(x) - x|``."""

    value: Tensor
    iterations: Tensor
    residual: Tensor


def fixed_point(
    f: Map, start: Tensor, params: Sequence[Tensor] = (), tol: float | None = None, max_iterations: int = 2000, floor: float = 1.0
) -> FixedPoint:
    r"""Solve :math:`x = f(x, \theta)` for a contraction ``f``, each row of a batch by itself.

    Anderson's acceleration, safeguarded: a step that does not lower a row's residual is answered by a plain step ``x <- f(x)``, which
    converges by Banach's theorem. Rows that are done do not move again, so a row's result does not depend on its batch.

    Args:
        f: ``f(x, *params)``, from ``(*batch, D)`` to ``(*batch, D)``; rows may not influence each other.
        start: the starting point, of shape ``(*batch, D)``, which also sets the scale of the tolerance.
        params: every tensor that ``f`` depends on and whose gradient is wanted.
        tol: the residual asked for, relative to ``floor + |start| + |x|``; by default 32 units of rounding.
        max_iterations: evaluations of ``f`` before it gives up.
        floor: the smallest scale of the tolerance; 0 makes it purely relative.

    The gradient, of any order, is that of the solution and not of the steps: it solves :math:`w = v + (\partial f/\partial x)^\top w` in the same
    way, so memory does not grow with the iterations. The starting point has none.

    Cost: one evaluation of ``f`` an iteration. The error is at most the residual over :math:`1 - L`, where :math:`L` is the Lipschitz constant.

    Under ``vmap``, ``make_fx`` and ``torch.compile``, where values cannot be looked at, it makes 10 iterations and 8 Newton steps with the whole
    Jacobian (``D`` vjps each), of which the last two carry the gradient, up to second order; rows that have not converged are NaN.

    Raises:
        InversionError: rows that have not converged: how many, how far they got, and where.

    Example:
        >>> import torch
        >>> point = fixed_point(torch.cos, torch.zeros(1, dtype=torch.float64))
        >>> point.value.item(), point.residual.item() < 1e-14
        (0.73908513321516..., True)

    Reference: Anderson acceleration for fixed-point iterations (Walker & Ni, 2011), https://doi.org/10.1137/10078356X
    """
    if tol is None:
        tol = 32 * torch.finfo(start.dtype).eps
    if _can_look(f, start, params):
        return FixedPoint(*_Implicit.apply(f, tol, max_iterations, floor, start, *params))
    return _traced(lambda x: f(x, *params), start, tol, floor)


@torch.no_grad()
def _can_look(f: Map, start: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether the program may depend on values here."""
    if torch.compiler.is_compiling():
        return False
    try:
        return bool(f(start, *params).isfinite().any()) in (True, False)
    except RuntimeError:  # vmap and make_fx refuse
        return False


class _Implicit(torch.autograd.Function):
    """The solver, whose backward pass is a fixed point again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f: Map, tol: float, max_iterations: int, floor: float, start: Tensor, *params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return _anderson(lambda x: f(x, *params), start, tol, max_iterations, floor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.f, ctx.tol, ctx.max_iterations = inputs[:3]
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(output[0], *inputs[5:])

    @staticmethod
    def backward(ctx: Any, v: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, *params = ctx.saved_tensors
        f = ctx.f

        def adjoint(w: Tensor, v: Tensor, x: Tensor, *params: Tensor) -> Tensor:
            return v + vjp(lambda z: f(z, *params), x)[1](w)[0]

        w = fixed_point(adjoint, v, (v, x, *params), ctx.tol, ctx.max_iterations, floor=0.0).value
        return None, None, None, None, None, *vjp(lambda *p: f(x, *p), *params)[1](w)


def _norm(x: Tensor) -> Tensor:
    return x.abs().amax(-1)


def _anderson(f: Callable[[Tensor], Tensor], start: Tensor, tol: float, iterations: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    """The solution, evaluations and residual of each row."""
    state = _State.begin(f, start, tol, floor)
    for _ in range(iterations - 1):
        if bool((state.done | ~state.residual.isfinite()).all()):
            break
        state.advance(f)
    if not bool(state.done.all()):
        raise InversionError(state.failure())
    return state.x, state.evaluations, state.residual


def _traced(f: Callable[[Tensor], Tensor], start: Tensor, tol: float, floor: float) -> FixedPoint:
    """As many iterations whatever the values, and Newton steps that have the solution's derivatives."""
    with torch.no_grad():
        state = _State.begin(f, start.detach(), tol, floor)
        for _ in range(TRACED_ITERATIONS - 1):
            state.advance(f)
    x, eye = state.x, torch.eye(start.shape[-1], dtype=start.dtype, device=start.device)

    def newton(x: Tensor) -> Tensor:
        return x + torch.linalg.solve_ex(eye - batch_jacobian(f, x), (f(x) - x).unsqueeze(-1))[0].squeeze(-1)

    with torch.no_grad():
        for _ in range(NEWTON_STEPS - 2):
            x = newton(x)
    x = newton(newton(x))  # derivatives up to second order
    with torch.no_grad():
        residual = _norm(f(x) - x)
        done = residual <= tol * (floor + _norm(start) + _norm(x))
    return FixedPoint(torch.where(done.unsqueeze(-1), x, torch.nan), state.evaluations + NEWTON_STEPS, residual)


class _State:
    """Where every row of the iteration stands."""

    def __init__(self, x: Tensor, step: Tensor, tol: float, floor: float) -> None:
        self.x, self.step, self.tol = x, step, tol
        self.residual, self.scale = _norm(step), floor + _norm(x)
        self.done = self.residual <= self.allowed()
        self.evaluations = torch.ones_like(self.residual)
        self.plain = torch.ones_like(self.done)  # rows whose next point is f(x): it is kept whatever its residual
        self.moves: list[Tensor] = []  # the differences of the last points, and of their steps
        self.changes: list[Tensor] = []

    @classmethod
    def begin(cls, f: Callable[[Tensor], Tensor], start: Tensor, tol: float, floor: float) -> _State:
        return cls(start.clone(), f(start) - start, tol, floor)

    def allowed(self) -> Tensor:
        return self.tol * (self.scale + _norm(self.x))

    def advance(self, f: Callable[[Tensor], Tensor]) -> None:
        new = self.x + self.step
        if self.changes:
            new = torch.where(self.plain.unsqueeze(-1), new, new - _correction(self.step, self.moves, self.changes))
        new = torch.where(self.done.unsqueeze(-1), self.x, new)
        step = f(new) - new
        residual = _norm(step)
        kept = (self.plain | (residual < self.residual)) & ~self.done
        self.moves, self.changes = [*self.moves, new - self.x][-WINDOW:], [*self.changes, step - self.step][-WINDOW:]
        self.x, self.step = torch.where(kept.unsqueeze(-1), new, self.x), torch.where(kept.unsqueeze(-1), step, self.step)
        self.residual = torch.where(kept, residual, self.residual)
        self.evaluations = self.evaluations + ~self.done
        self.plain = ~kept
        self.done = self.done | (self.residual <= self.allowed())

    def failure(self) -> str:
        ratio = torch.where(self.done, 0.0, self.residual / self.allowed()).nan_to_num(torch.inf).flatten()
        worst = int(ratio.argmax())
        residual, allowed, evaluations = (t.flatten()[worst].item() for t in (self.residual, self.allowed(), self.evaluations))
        return (
            f"fixed point: {int((~self.done).sum())} of {ratio.numel()} points did not converge; the worst, number {worst}, has residual "
            f"{residual:.2g} (asked for {allowed:.2g}) after {evaluations:.0f} iterations, at {self.x.flatten(0, -2)[worst].tolist()[:8]}: "
            "is the map a contraction, and is the point finite?"
        )


def _correction(step: Tensor, moves: list[Tensor], changes: list[Tensor]) -> Tensor:
    """What the secants of the last steps add to a plain step: the combination that cancels most of the residual."""
    change, move = torch.stack(changes, -2), torch.stack(moves, -2)
    tiny = torch.finfo(step.dtype).tiny
    size = change.square().sum(-1).clamp_min(tiny).rsqrt()  # unit rows, or steps of very different sizes would be lost in rounding
    change, move = change * size.unsqueeze(-1), move * size.unsqueeze(-1)
    ridge = 10 * torch.finfo(step.dtype).eps * torch.eye(len(changes), dtype=step.dtype, device=step.device)
    weights = torch.linalg.solve_ex(change @ change.mT + ridge, (change @ step.unsqueeze(-1)))[0]
    return ((change + move).mT @ weights).squeeze(-1)
