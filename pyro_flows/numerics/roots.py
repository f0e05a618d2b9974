"""The inverse of an increasing function: a safeguarded Newton method, and gradients of any order by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from ..errors import InversionError, ShapeError

__all__ = ["invert_monotone"]

Monotone = Callable[..., tuple[Tensor, Tensor]]

_STEPS = 250  # bisection alone takes about 100 in double precision
_TRACED_STEPS = 32  # in a graph, which cannot stop early
_LEAP = 16.0  # how far one step may go, relative to where it is


def invert_monotone(f: Monotone, y: Tensor, *params: Tensor, start: Tensor | None = None) -> Tensor:
    r"""Solve :math:`f(x, \theta) = y` for :math:`x`, elementwise, for an ``f`` that increases from :math:`-\infty` to :math:`\infty`.

    Newton's method inside a bracket that it finds by itself: a step that leaves the bracket, or is hardly shorter than the one before, is replaced
    by a bisection, or by a leap outwards as long as a side is open. Gradients are implicit,
    :math:`dx = (dy - \partial_\theta f\, d\theta) / f'`, so they cost one evaluation of ``f`` however many steps the root took, and can be
    differentiated again, any number of times.

    Args:
        f: a pure elementwise function, ``f(x, *params) -> (value, log_slope)``, both of ``x``'s shape. All tensors that
            need a gradient must come through ``params``.
        y: the values, of any shape. Values that are not finite are returned as they are.
        params: tensors of shape ``(*y.shape, ...)``: as ``f`` is elementwise, their leading dimensions are those of ``y``.
        start: where to start, of the shape of ``y``; by default at ``y``. It carries no gradient.

    Returns:
        ``x`` of the shape of ``y``, as exact as ``f``'s rounding allows.

    Raises:
        InversionError: points did not converge; the message says how many, how far they got, and where. Inside a traced graph
            (``make_fx``, ``torch.compile``, a CUDA capture), which can neither stop early nor raise, such points are NaN.
        ShapeError: leading dimensions differ.

    Cost: 7 to 20 evaluations of ``f`` where it is smooth; 32 in a traced graph.

    Example:
        >>> import torch
        >>> f = lambda x, a: (x + a * x**3, (1 + 3 * a * x**2).log())
        >>> x = invert_monotone(f, torch.tensor([10.0, 1e6]), torch.tensor([1.0, 1.0]))
        >>> [round(v, 3) for v in x.tolist()]
        [2.0, 99.997]
    """
    for p in (*params, *(() if start is None else (start,))):
        if p.shape[: y.dim()] != y.shape:
            raise ShapeError(f"invert_monotone: parameters of shape {tuple(p.shape)} must begin with the shape of y, {tuple(y.shape)}: expand them")
    if torch.compiler.is_compiling():
        # Dynamo does not trace a Function whose backward differentiates f. Newton steps from the exact root change nothing but the graph;
        # the derivatives of two of them are those of the root up to the third order.
        x = _solve(f, y.detach(), tuple(p.detach() for p in params), y.detach() if start is None else start.detach()).detach()
        for _ in range(2):
            value, log_slope = f(x, *params)
            x = x - (value - y) * (-log_slope).exp()
        return x
    return _root(f, y, (y if start is None else start).detach(), *params)


class _Root(torch.autograd.Function):
    """The root as one node of the graph; its backward is made of differentiable operations on its output."""

    @staticmethod
    def forward(f: Monotone, y: Tensor, start: Tensor, *params: Tensor) -> Tensor:
        return _solve(f, y, params, start)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        f, _, _, *params = inputs
        ctx.f = f
        ctx.save_for_backward(output, *params)
        ctx.save_for_forward(output, *params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, *params = ctx.saved_tensors
        wanted = [i for i, needs in enumerate(ctx.needs_input_grad[3:]) if needs]

        def value(*some: Tensor) -> tuple[Tensor, Tensor]:
            given = dict(zip(wanted, some, strict=True))
            return ctx.f(x, *(given.get(i, p) for i, p in enumerate(params)))

        result: list[Tensor | None] = [None] * len(params)
        if wanted:
            _, pull, log_slope = torch.func.vjp(value, *(params[i] for i in wanted), has_aux=True)  # type: ignore[misc]
        else:
            log_slope = value()[1]
        to_y = grad * (-log_slope).exp()
        if wanted:
            for i, g in zip(wanted, pull(-to_y), strict=True):
                result[i] = g
        return None, to_y, None, *result

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, *params = ctx.saved_tensors
        _, to_y, _, *to_params = tangents
        log_slope, moved = ctx.f(x, *params)[1], torch.zeros_like(x)
        if params:  # two pull-backs make a push-forward: forward mode does not nest
            along = tuple(torch.zeros_like(p) if t is None else t for p, t in zip(params, to_params, strict=True))
            _, pull = torch.func.vjp(lambda *p: ctx.f(x, *p)[0], *params)  # type: ignore[misc]
            _, push = torch.func.vjp(pull, torch.zeros_like(x))  # type: ignore[misc]
            (moved,) = push(along)
        return ((0 if to_y is None else to_y) - moved) * (-log_slope).exp()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], f: Monotone, *tensors: Tensor) -> tuple[Tensor, int]:
        """One more leading dimension, which is all that ``f``, being elementwise, will notice."""
        moved = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return _root(f, *moved), 0


_root: Callable[..., Tensor] = _Root.apply


def _traced(y: Tensor) -> bool:
    """Whether a graph is being made, in which values cannot be looked at."""
    return torch.compiler.is_compiling() or get_proxy_mode() is not None or (y.is_cuda and torch.cuda.is_current_stream_capturing())


def _solve(f: Monotone, y: Tensor, params: tuple[Tensor, ...], x: Tensor) -> Tensor:
    traced, info = _traced(y), torch.finfo(y.dtype)
    low, high, moved = (torch.full_like(y, v) for v in (-torch.inf, torch.inf, torch.inf))
    given, y = y, torch.where(y.isfinite(), y, torch.zeros_like(y))
    x = torch.where(x.isfinite(), x, y)
    done, far, noise = ~given.isfinite(), _LEAP * y.abs(), info.eps**0.7
    for _ in range(_TRACED_STEPS if traced else _STEPS):
        value, log_slope = f(x, *params)
        residual = value - y
        low, high = torch.where(residual <= 0, x, low), torch.where(residual >= 0, x, high)
        step, size, width = residual * (-log_slope).exp(), 1 + x.abs(), high - low
        stalled = (step.abs() <= noise * size) & (step.abs() > 0.5 * moved)  # close by, Newton's step would square: this is rounding
        done = done | stalled | (step.abs() <= info.eps * size) | (width <= 2 * info.eps * size)
        if not traced and bool(done.all()):
            break
        leap = _LEAP * size
        there = x - step.clamp(-leap - far, leap + far)
        slow = step.abs() > 0.75 * moved
        halfway = torch.where(width < torch.inf, low + 0.5 * width, x - residual.sign() * leap)
        there = torch.where((there > low) & (there < high) & ~slow, there, halfway)  # a NaN step is not inside either
        # Half of the largest number, where the search for a value that f does not reach ends.
        there = torch.where(done, x, there.clamp(-info.max / 2, info.max / 2))
        x, moved = there, (there - x).abs()
    else:
        value, log_slope = f(x, *params)
        residual = value - y
        step, tol = residual * (-log_slope).exp(), 32 * info.eps
        done = done | (residual.abs() <= tol * (1 + y.abs())) | (step.abs() <= tol * (1 + x.abs()))
        if not traced and not bool(done.all()):
            raise InversionError(_report(done, y, x, residual, low, high))
    return torch.where(given.isfinite(), torch.where(done, x, torch.full_like(x, torch.nan)), given)


def _report(done: Tensor, y: Tensor, x: Tensor, residual: Tensor, low: Tensor, high: Tensor) -> str:
    """What an ``InversionError`` says, of the worst point."""
    size = torch.where(done, -torch.ones_like(y), residual.abs().nan_to_num(torch.inf)).flatten()
    worst = int(size.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), y.shape)) if y.dim() else ()
    a, b, c, d, e = (t.flatten()[worst].item() for t in (y, x, residual, low, high))
    return (
        f"invert_monotone: {int((~done).sum())} of {done.numel()} points did not converge in {_STEPS} steps. The worst, at index {where}: "
        f"y = {a:.6g}, reached x = {b:.6g} with f(x) - y = {c:.3g}, bracket [{d:.6g}, {e:.6g}]. "
        "f must be finite, increase and reach y: look for NaN or extreme parameters there"
    )
