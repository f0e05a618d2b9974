"""What a transform does to rounding errors, and what it was seen to do to points: the measurements behind a verdict on its inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .copies import Copy

__all__ = ["Check", "Local", "Measured", "local", "lipschitz", "measure"]

FLOOR = {torch.float64: 1e-8, torch.float32: 1e-4}  # relative errors below are small: the library's own solvers stop there
ROUNDINGS = 100.0  # roundings of the size of a point that a sound chain of layers may add up
GIVEN = ("x", "around x")  # the other sets of points are stress inputs
_NO_INVERSE = (NotImplementedError, KeyError)  # torch says the former, Pyro's planar, radial and Sylvester the latter
_FAILURES = (RuntimeError, ValueError, TypeError, ArithmeticError)


class Local(NamedTuple):
    """The transform near each point, in float64."""

    y: Tensor  # (N, D)
    ladj: Tensor  # (N,), as the transform says
    sigma_min: Tensor  # (N,), of the Jacobian
    sigma_max: Tensor
    logdet: Tensor  # (N,), of the Jacobian
    sign: Tensor  # (N,), of its determinant
    slope: Tensor  # (N,), the norm of the gradient of ladj
    logdet_error: Tensor  # (N,), how far logdet itself may be off, for finite differences
    method: str  # how the Jacobian was found


class Check(NamedTuple):
    """One quantity at one set of points in one precision: the worst error, and what is allowed there."""

    quantity: str
    points: str
    dtype: torch.dtype
    error: float  # relative for round trips, nats for log-dets
    allowed: float
    status: str  # "fine", "conditioning", "not finite", "failed"
    note: str = ""


class Measured(NamedTuple):
    """All checks at one set of points; ``why_not`` says why there is no inverse."""

    checks: list[Check]
    errors: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]]  # by point, and allowed
    why_not: str


def size(points: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of each row, and their root mean square (one where all rows are zero)."""
    norm = points.norm(dim=-1)
    mean = (norm**2).mean().sqrt()
    return norm, torch.where(mean > 0, mean, torch.ones_like(mean))


def local(f: Copy, x: Tensor, context: Tensor | None) -> Local:
    """Jacobians at rows by autograd, or by central differences where the map cannot be differentiated; O(D) evaluations."""
    with torch.enable_grad():
        at = x.detach().clone().requires_grad_()
        y, ladj = f.forward(at, context)
        blind = not y.requires_grad
        if blind:
            pairs = [_differences(f, x, context, width) for width in (1.0, 0.5)]
            jacobian, gradient = pairs[1]
        else:
            rows = [_gradient(y[:, i].sum(), at) for i in range(y.shape[-1])]
            jacobian, gradient = torch.stack(rows, 1), _gradient(ladj.sum(), at) if ladj.requires_grad else torch.zeros_like(x)
    sound = torch.isfinite(jacobian).flatten(1).all(1)
    safe = torch.where(sound[:, None, None], jacobian, torch.zeros_like(jacobian))
    sigma = torch.linalg.svdvals(safe)
    sign, logdet = torch.linalg.slogdet(safe)
    logdet_error = 10 * (torch.linalg.slogdet(pairs[0][0])[1] - logdet).abs() + 1e-6 if blind else torch.zeros_like(logdet)
    nan = torch.full_like(logdet, torch.nan)
    low, high, logdet, sign = (torch.where(sound, v, nan) for v in (sigma[:, -1], sigma[:, 0], logdet, sign))
    method = "differences" if blind else "autograd"
    return Local(y.detach(), ladj.detach(), low, high, logdet, sign, gradient.norm(dim=-1), logdet_error, method)


def _gradient(value: Tensor, at: Tensor) -> Tensor:
    return torch.autograd.grad(value, at, retain_graph=True, allow_unused=True, materialize_grads=True)[0]


@torch.no_grad()
def _differences(f: Copy, x: Tensor, context: Tensor | None, width: float) -> tuple[Tensor, Tensor]:
    """The Jacobian, and the gradient of ladj, by central differences."""
    norm, mean = size(x)
    step = (width * torch.finfo(x.dtype).eps ** (1 / 3) * (norm + mean))[:, None]
    columns = []
    for e in torch.eye(x.shape[-1], dtype=x.dtype, device=x.device):
        (y, ladj), (y_before, ladj_before) = f.forward(x + step * e, context), f.forward(x - step * e, context)
        columns.append(torch.cat([y - y_before, (ladj - ladj_before)[:, None]], -1) / (2 * step))
    derivatives = torch.stack(columns, -1)
    return derivatives[:, :-1], derivatives[:, -1]


class _Budget:
    """How far each quantity may be off at given points in one precision, and the checks that were made against that."""

    def __init__(self, x: Tensor, near: Local, points: str, dtype: torch.dtype) -> None:
        unit, self.floor = ROUNDINGS * torch.finfo(dtype).eps, FLOOR[dtype]
        (nx, mx), (ny, my) = size(x), size(near.y)
        condition = near.sigma_max / near.sigma_min
        in_x = (ny + my) / near.sigma_min + condition * (nx + mx)  # how much one relative rounding may move x
        in_y = (nx + mx) * near.sigma_max + condition * (ny + my)
        self.size_x, self.size_y = nx + mx, ny + my
        self.x, self.y = unit * in_x / self.size_x + self.floor, unit * in_y / self.size_y + self.floor
        self.nats = unit * (x.shape[-1] * condition + near.slope * in_x) + self.floor * (1 + near.ladj.abs())
        # Where the result is too large for this precision, nothing can be asked.
        self.fits = ~(torch.isfinite(near.y).all(-1) & (near.y.abs().amax(-1) > torch.finfo(dtype).max))
        self.singular, self.points, self.dtype = near.sigma_min == 0, points, dtype
        self.checks: list[Check] = []
        self.errors: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = {}

    def note(self, quantity: str, error: Tensor, allowed: Tensor, small: Tensor | float) -> None:
        """Compare errors with what is allowed; those below ``small`` need no excuse."""
        allowed = torch.where(self.singular, torch.inf, allowed)
        allowed = torch.where(torch.isnan(allowed), torch.zeros_like(allowed) + small, allowed)  # no Jacobian, no excuse
        error = torch.where(self.fits, error.double(), torch.zeros_like(allowed))
        self.errors[quantity, self.dtype] = error, allowed
        self.checks.append(_worst(quantity, self.points, self.dtype, error, allowed, small))

    def note_failure(self, quantity: str, error: Exception) -> None:
        """An evaluation that raised."""
        self.checks.append(Check(quantity, self.points, self.dtype, torch.inf, 0.0, "not finite", _said(error)))


def measure(f: Copy, given: Tensor, context: Tensor | None, near: Local, points: str) -> Measured:
    r"""Both round trips and the log-det in the precision of ``f``, each with its error budget.

    With :math:`\varepsilon` the unit roundoff, a sound forward pass is off by some multiple of
    :math:`\varepsilon(|y| + \sigma_{\max}|x|)`, and any inverse multiplies that by up to :math:`\sigma_{\max}(J^{-1})`.
    """
    x, context = given.to(f.dtype), None if context is None else context.to(f.dtype)
    budget = _Budget(given, near, points, f.dtype)
    # Far out a difference spans many wiggles of a map, and says nothing of its slope.
    telling = near.method == "autograd" or points in GIVEN
    try:
        y, ladj = f.forward(x, context)
        if y.dtype != f.dtype:
            raise TypeError(f"a copy in {f.dtype} returns {y.dtype}")
    except _FAILURES as error:
        budget.note_failure("forward", error)
        return Measured(budget.checks, budget.errors, "")
    small = budget.floor * (1 + near.ladj.abs())
    if telling:
        allowed = budget.nats + small + near.logdet_error
        budget.note(f"log-det ({near.method})", (ladj.double() - near.logdet).abs(), allowed, small + near.logdet_error)
    try:
        back, ladj_back = f.inverse(y, context)
        from_y = near.y.to(f.dtype)
        again = f.forward(f.inverse(from_y, context)[0], context)[0]
    except _NO_INVERSE as error:
        return Measured(budget.checks, budget.errors, _said(error))
    except _FAILURES as error:
        budget.note_failure("inverse", error)
        return Measured(budget.checks, budget.errors, "")
    budget.note("x → y → x", (back - x).double().norm(dim=-1) / budget.size_x, budget.x, budget.floor)
    budget.note("y → x → y", (again - from_y).double().norm(dim=-1) / budget.size_y, budget.y, budget.floor)
    if telling:
        budget.note("log-det (both ways)", (ladj + ladj_back).double().abs(), budget.nats, small)
    return Measured(budget.checks, budget.errors, "")


def _said(error: Exception) -> str:
    """The first line of an error, with its class."""
    text = str(error.args[0] if error.args else "").strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _worst(quantity: str, points: str, dtype: torch.dtype, error: Tensor, allowed: Tensor, small: Tensor | float) -> Check:
    """The point that exceeds its allowance most, and what to call it."""
    finite = torch.isfinite(error)
    error = torch.where(finite, error, torch.full_like(error, torch.inf))
    # Every digit may be lost, or the Jacobian is singular: no error means anything.
    hopeless = torch.isinf(allowed) | ((allowed - small >= 1) & (~finite if quantity.startswith("log-det") else torch.ones_like(finite)))
    explained = (error <= allowed) | hopeless
    badness = torch.where(explained, torch.where(finite, error, torch.ones_like(error)), error / allowed.clamp(min=1e-300) + 1e3)
    at = int(badness.argmax())
    if bool(explained.all()):
        status = "fine" if bool((error <= small).all()) else "conditioning"
    else:
        status = "failed" if bool((~explained & finite).any()) else "not finite"
    if status == "failed":
        at = int(torch.where(finite, badness, torch.zeros_like(badness)).argmax())
    return Check(quantity, points, dtype, error[at].item(), allowed[at].item(), status)


def lipschitz(f: Copy, x: Tensor, context: Tensor | None, noise: Tensor) -> tuple[float, float]:
    """The least and the greatest ``|f(a) - f(b)| / |a - b|`` seen over pairs of points, far ones and near ones.

    Where each point has its own context, both points of a pair are mapped at one of the two.
    """
    _, mean = size(x)
    others = [x.roll(k, 0) for k in range(1, min(len(x), 17))]
    others += [x + h * mean * noise / noise.norm(dim=-1, keepdim=True) for h in (1e-1, 1e-3)]
    y, ratios = f.forward(x, context)[0], []
    for other in others:
        inside = f.inside(other) & ((other - x).norm(dim=-1) > 0)
        other = torch.where(inside[:, None], other, x)
        ratio = (f.forward(other, context)[0] - y).norm(dim=-1) / (other - x).norm(dim=-1)
        ratios.append(ratio[inside & torch.isfinite(ratio)])
    seen = torch.cat(ratios)
    return (seen.min().item(), seen.max().item()) if len(seen) else (torch.nan, torch.nan)
