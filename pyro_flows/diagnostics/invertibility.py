"""Does a transform invert, is its log-det right, and does conditioning explain what it loses?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pyro.distributions.conditional import ConditionalTransform
from torch import Tensor
from torch.distributions import Transform

from ..distributions import Flow
from ..errors import DtypeError, OptionError, PyroFlowsError, ShapeError, SupportError
from ..numerics.introspection import floating_tensor
from ..numerics.random import seeded
from ..transforms import Conditioned, FlowTransform
from .conditioning import Check, lipschitz, local, measure
from .copies import Copy, Stock
from .findings import Findings, conclude, table
from .invertibility_plot import plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Invertibility", "check_invertibility"]

_SCALES = tuple(10.0**k for k in range(1, 7))  # factors of the points given, for the stress inputs
_ENTRIES = 2**22  # numbers in all Jacobians together
_ROWS, _STRESS_ROWS = 256, 32  # points at most, as given and of each stress input
_SEED = 0  # of the points around x, and of whatever a transform draws


class Invertibility(Findings):
    """What :func:`check_invertibility` finds. Printing it prints a table.

    Attributes:
        name: class of the transform.
        dim: number of coordinates.
        num_points: points examined.
        verdict: ``"good"``; ``"ill-conditioned"`` (digits are lost, as many as its condition number explains: no fault of the code);
            ``"unstable"`` (rounding costs more than that, or values are not finite, or an inverse gave up); ``"one-way"`` (there is no inverse);
            ``"wrong"`` (in float64, an inverse or a log-det is off by more than rounding explains, or two points have one image).
        reasons: plain sentences, worst first.
        checks: all that was compared, each with what was allowed.
        singular_values: smallest and largest of the Jacobian at each point, ``(N, 2)``.
        lipschitz: least and greatest ``|f(a) - f(b)| / |a - b|`` over pairs of points.
        sigma_min, sigma_max: smallest and largest singular value of the Jacobian at any point.
        condition: largest condition number of the Jacobian at any point.
    """

    def plot(self, path: str | Path | None = None) -> Figure:
        """One figure: errors against what conditioning allows, singular values, and the stress inputs.

        Args:
            path: where to save it as well, such as ``"invertibility.png"``.
        """
        return plot(self, path)

    def __str__(self) -> str:
        return table(self)

    __repr__ = __str__


def check_invertibility(transform: Flow | Stock, x: Tensor, context: Tensor | None = None) -> Invertibility:
    r"""Examine a transform at given points: its inverse, its log-det, its conditioning, and what extreme inputs do to it.

    Copies of the transform are evaluated in float64 and float32, in eval mode. An inverse is right when both round trips return; how closely they
    can is a matter of the Jacobian :math:`J`: an error :math:`\varepsilon\,(|y| + \sigma_{\max}(J)\,|x|)` of the forward pass, which no code
    avoids, comes back multiplied by :math:`\sigma_{\max}(J^{-1})`. So an error counts against the transform only beyond

    .. math:: 100\,\varepsilon\,\sigma_{\max}(J^{-1})\,(|y| + \sigma_{\max}(J)\,|x|) + \tau\,|x|, \qquad
        \tau = 10^{-8} \text{ in float64},\ 10^{-4} \text{ in float32,}

    and that of a log-det beyond the like in nats. The log-det is compared with the Jacobian's by autograd, and with the inverse's own. The same is
    done around ``x`` and at ``x`` times 10, 100, ... 1e6, so far as these lie in the domain.

    Args:
        transform: a ``FlowTransform``, a ``Flow`` (its transform is examined), or a transform of torch or Pyro, conditional or not. It is
            not changed.
        x: points on the base side, ``(*batch, D)``, such as draws of the base; at most 256 of them, evenly chosen, are used.
        context: ``(*batch, context_dim)`` or ``(context_dim,)``, for conditional transforms.

    Returns:
        An :class:`Invertibility`: verdict, reasons, table, figure.

    Cost: O(D) backward passes and a singular value decomposition a point, and some thirty evaluations each way.

    Raises:
        ShapeError: points or context of the wrong size, no points, a missing context, or a map to another dimension.
        DtypeError: integer points.
        SupportError: rows that are not finite or not in the transform's domain.
        OptionError: not a transform.

    Reference: Understanding and mitigating exploding inverses in invertible neural networks (Behrmann et al., 2021),
    https://arxiv.org/abs/2006.09347

    Example:
        >>> import torch, pyro_flows as pf
        >>> report = check_invertibility(pf.flows.realnvp(2), torch.randn(100, 2))
        >>> report.verdict, round(report.condition, 3)
        ('good', 1.0)
    """
    stock, context = _unwrapped(transform, context)
    precise, rough = Copy(stock, torch.float64), Copy(stock, torch.float32)
    x, context = _points(stock, precise, x, context)
    with seeded(_SEED), torch.no_grad():
        return _examine(type(stock).__name__, precise, rough, x, context)


def _examine(name: str, precise: Copy, rough: Copy, x: Tensor, context: Tensor | None) -> Invertibility:
    try:
        y, _ = precise.forward(x, context)
    except (RuntimeError, ValueError, TypeError) as error:
        if isinstance(error, PyroFlowsError):
            raise
        raise ShapeError(f"check_invertibility: {name} cannot be evaluated at points of shape {tuple(x.shape)}: {error}") from error
    if y.shape != x.shape:
        raise ShapeError(f"check_invertibility: {name} maps points of size {x.shape[-1]} to size {y.shape[-1]}: its Jacobian is not square")
    near = local(precise, x, context)
    noise = torch.randn(x.shape, dtype=x.dtype).to(x.device)
    spread = (x**2).mean().sqrt()
    few = torch.linspace(0, len(x) - 1, min(len(x), _STRESS_ROWS)).long().unique()
    inputs = [("x", x, slice(None)), ("around x", x + (spread if spread > 0 else 1.0) * noise, slice(None))]
    inputs += [(f"x · {scale:.0e}".replace("e+0", "e"), scale * x, few) for scale in _SCALES]
    checks: list[Check] = []
    why_not, errors, signs = "", {}, [near.sign]
    for where, points, chosen in inputs:
        points, given = points[chosen], None if context is None else context[chosen]
        inside = precise.inside(points)
        if not bool(inside.any()):
            continue
        points, given = points[inside], None if given is None else given[inside]
        here = near if where == "x" else local(precise, points, given)
        certain = here.sigma_max / here.sigma_min < 1e12
        signs.append(here.sign[certain])
        for f in (precise, rough):
            measured = measure(f, points, given, here, where)
            checks += measured.checks
            why_not = why_not or measured.why_not
            if where == "x":
                errors.update(measured.errors)
    singular_values = torch.stack([near.sigma_min, near.sigma_max], -1)
    bounds = lipschitz(precise, x, context, noise)
    folds = len(torch.cat(signs[1:]).nan_to_num().unique()) > 1 or bounds[0] == 0
    verdict, reasons = conclude(checks, why_not, singular_values, folds)
    return Invertibility(name, x.shape[-1], len(x), verdict, reasons, tuple(checks), singular_values, bounds, errors)


def _unwrapped(transform: object, context: Tensor | None) -> tuple[Stock, Tensor | None]:
    """A transform and its context, out of a flow or of a conditioned transform."""
    if isinstance(transform, Flow):
        transform = transform.transform
    if isinstance(transform, Conditioned):
        if context is not None:
            raise ShapeError("check_invertibility: the transform is already at a context: pass context=None, or the transform it was made from")
        transform, context = transform.transform, transform.context
    if not isinstance(transform, (Transform, ConditionalTransform)):
        raise OptionError(f"check_invertibility: transform must be a Flow or a transform, got {type(transform).__name__}")
    if isinstance(transform, Transform) and not transform.bijective:
        raise OptionError(f"check_invertibility: {type(transform).__name__} says itself that it is no bijection (bijective = False)")
    if isinstance(transform, FlowTransform):
        transform._check_context(context.to(_dtype(transform)) if context is not None and context.is_floating_point() else context)
    elif isinstance(transform, ConditionalTransform) and context is None:
        raise ShapeError(f"check_invertibility: {type(transform).__name__} needs a context: pass context=")
    elif not isinstance(transform, ConditionalTransform) and context is not None:
        raise ShapeError(f"check_invertibility: {type(transform).__name__} takes no context")
    return transform, context


def _dtype(transform: FlowTransform) -> torch.dtype:
    own = floating_tensor(transform)
    return torch.get_default_dtype() if own is None else own.dtype


def _points(stock: Stock, f: Copy, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows in float64 that float32 holds exactly, and a row of context for each."""
    name = type(stock).__name__
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise DtypeError(f"check_invertibility: x must be a floating-point tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    if x.dim() == 0 or not x.numel():
        raise ShapeError(f"check_invertibility: x must hold at least one point, of shape (*batch, D), got {tuple(x.shape)}")
    if isinstance(stock, Transform) and stock.domain.event_dim > 1:
        raise ShapeError(f"check_invertibility: {name} maps arrays of {stock.domain.event_dim} dimensions; only vectors are examined")
    if isinstance(stock, FlowTransform) and x.shape[-1] != stock.dim:
        raise ShapeError(f"check_invertibility: {name} expects points of shape (*batch, {stock.dim}), got {tuple(x.shape)}")
    if context is not None:
        try:
            batch = torch.broadcast_shapes(x.shape[:-1], context.shape[:-1])
        except RuntimeError:
            raise ShapeError(f"check_invertibility: points {tuple(x.shape)} and context {tuple(context.shape)} do not broadcast") from None
        x, context = x.expand(*batch, -1), context.detach().expand(*batch, -1).reshape(-1, context.shape[-1])
    x = x.detach().reshape(-1, x.shape[-1])
    for what, rows in (("x", torch.isfinite(x).all(-1)), ("context", torch.isfinite(x if context is None else context).all(-1))):
        if not bool(rows.all()):
            raise SupportError(f"check_invertibility: {what} is not finite in rows {_first(~rows)}: leave them out")
    count = max(2, min(len(x), _ROWS, _ENTRIES // x.shape[-1] ** 2))
    chosen = torch.linspace(0, len(x) - 1, min(len(x), count)).long()
    x = x[chosen].float().double()
    inside = f.inside(x)
    if not bool(inside.all()):
        raise SupportError(f"check_invertibility: rows {_first(~inside)} of x are not in the domain of {name}: give points of the base side")
    return x, None if context is None else context[chosen].float().double()


def _first(rows: Tensor) -> str:
    indices = rows.nonzero().flatten().tolist()
    return ", ".join(map(str, indices[:5])) + (f" and {len(indices) - 5} more" if len(indices) > 5 else "")
