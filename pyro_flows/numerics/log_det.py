"""Traces and log determinants of ``I + J``, where ``J`` is a contraction's Jacobian: exact, and estimated without bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import vjp, vmap

from .factors import log_abs_det

__all__ = ["batch_jacobian", "log_det", "estimate_log_det", "Roulette", "hutchinson_trace"]

Map = Callable[..., Tensor]

MANY_TERMS = 20  # of a series that is cut after a fixed number of terms


def batch_jacobian(f: Map, x: Tensor) -> Tensor:
    """The Jacobian of each row, ``(*batch, D, D)``, of a map whose rows do not influence each other. Cost: one evaluation and ``D`` vjps."""
    units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    pullback = vjp(f, x)[1]
    return vmap(lambda unit: pullback(unit.expand_as(x))[0], out_dims=-2)(units)


def log_det(f: Map, x: Tensor) -> Tensor:
    r""":math:`\log|\det(I + \partial f/\partial x)|` of each row, exactly, for a contraction ``f``: cost ``D`` vjps and :math:`O(D^3)`."""
    return log_abs_det(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) + batch_jacobian(f, x))


def hutchinson_trace(f: Map, x: Tensor, probe: Tensor) -> Tensor:
    r"""The estimate :math:`v^\top J v` of the trace of each row's Jacobian, unbiased for probes :math:`v` with :math:`E vv^\top = I`.

    Shape: ``x, probe (*batch, D) -> (*batch,)``. Cost: one vjp.

    Reference: A stochastic estimator of the trace of the influence matrix (Hutchinson, 1990), https://doi.org/10.1080/03610919008812866
    """
    return (vjp(f, x)[1](probe)[0] * probe).sum(-1)


class Roulette:
    r"""Cuts a series after a random number of terms without bias (Russian roulette), where the sizes of its terms say that little is left.

    After :math:`n` terms that are always there, term :math:`k + 1` follows term :math:`k` with the probability that makes

    .. math:: S_{k+1} = P(N \ge k + 1) = \min(S_k,\ u_k / u_{n-1}), \qquad S_n = 1,

    where :math:`u_k` is the size of term :math:`k`, and it has weight :math:`1 / S_{k+1}`. That is unbiased, since a decision depends only on what
    went before. If the terms shrink by a factor :math:`L < 1` at least, each weighted term stays below :math:`L u_{n-1}` and :math:`N` has
    exponential tails: **the variance is finite**, for every such series. (A cut after a Poisson number has infinite variance where the terms shrink
    geometrically.) Probabilities proportional to the sizes are those of least variance for a given cost.

    Args:
        start: the size :math:`u_{n-1}`.

    Cost: terms that shrink by a constant factor :math:`\rho` are :math:`n + \rho / (1 - \rho)` in the mean; each beyond :math:`n` takes one number
    from torch's generator.

    Reference: Unbiased estimation with square root convergence for SDE models (Rhee & Glynn, 2015), https://doi.org/10.1287/opre.2015.1404

    Example:
        >>> _ = torch.manual_seed(0)
        >>> roulette = Roulette(1.0)
        >>> [roulette.next_weight(size) for size in (0.5, 0.25, 0.125)]
        [2.0, 0.0, 0.0]
    """

    def __init__(self, start: float) -> None:
        self.start, self.survival = start, 1.0

    def next_weight(self, size: float) -> float:
        """The weight of the next term, given the size of the last one; 0 ends the series."""
        # A size that is not in between: the rest is zero, or not a number, as the sum already is.
        survival = min(self.survival, size / self.start) if 0 < size < math.inf else 0.0
        self.survival = survival if self.survival * torch.rand(()).item() < survival else 0.0
        return 1 / self.survival if self.survival else 0.0


def estimate_log_det(f: Map, x: Tensor, params: Sequence[Tensor], probe: Tensor, terms: int = 2, roulette: bool = True) -> Tensor:
    r"""Estimate :math:`\log|\det(I + J)|`, :math:`J = \partial f/\partial x`, of each row, for a contraction ``f(x, *params)``.

    .. math:: \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k
        \approx \sum_{k=1}^{N} c_k \frac{(-1)^{k+1}}{k} v^\top J^k v, \qquad
        \nabla \approx v^\top \Big(\sum_{k=0}^{N} c_k (-J)^k\Big) (\nabla J) v

    Args:
        f: ``f(x, *params)``, whose rows do not influence each other.
        x: points of shape ``(*batch, D)``.
        params: every tensor besides ``x`` that the gradient is wanted of.
        probe: random ``v`` of shape ``(*batch, D)`` with :math:`E vv^\top = I`.
        terms: the number :math:`n \ge 1` of terms of weight :math:`c_k = 1`.
        roulette: let a :class:`Roulette` go on from there, by the largest :math:`\lVert J^{\top k} v \rVert / \lVert v \rVert` of the rows: value and
            gradient are unbiased and of finite variance. Otherwise the series ends, with an error below
            :math:`D L^{N+1} / ((N + 1)(1 - L))`, where :math:`L` is the Lipschitz constant. Where values cannot be looked at (``vmap``, ``make_fx``,
            ``torch.compile``) the number of terms cannot be random: it is 20.

    Cost: ``N`` vjps; backward, three more. The gradient is the Neumann series' and is weighted row by row; no graph is kept, so memory does not
    grow with ``N``. It has no second derivative: asking for one raises.

    References: Residual flows for invertible generative modeling (Chen et al., 2019), https://arxiv.org/abs/1906.02735;
    Invertible residual networks (Behrmann et al., 2018), https://arxiv.org/abs/1811.00995
    """
    if torch.compiler.is_compiling():  # where Dynamo refuses autograd functions of this kind; no second derivative exists there either
        with torch.no_grad():
            value, neumann = _series(f, terms, roulette, probe, x, *params)
        slope = _last_term(f, neumann, probe, x, *params)
        return value + slope - slope.detach()
    return _Estimate.apply(f, terms, roulette, probe, x, *params)[0]


def _size(term: Tensor, lengths: Tensor) -> float | None:
    """The largest length of a row in units of the probe's, or ``None`` where values cannot be looked at."""
    if torch.compiler.is_compiling():
        return None
    ratios = torch.linalg.vector_norm(term, dim=-1) / lengths
    try:
        return ratios.max().item() if ratios.numel() else 0.0
    except RuntimeError:
        return None


def _series(f: Map, terms: int, roulette: bool, probe: Tensor, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate, and the Neumann series of the probe, which the gradient needs."""
    pullback = vjp(lambda z: f(z, *params), x)[1]
    lengths = torch.linalg.vector_norm(probe, dim=-1)
    term = neumann = probe
    value, weight, k, cut = torch.zeros_like(x[..., 0]), 1.0, 1, None
    while weight:
        if roulette and k == terms:
            start = _size(term, lengths)
            terms, cut = (MANY_TERMS, None) if start is None else (terms, Roulette(start))
        term = -pullback(term)[0]  # (-J^T)^k v
        neumann = neumann + weight * term
        value = value - weight / k * (term * probe).sum(-1)
        k += 1
        if k > terms:
            weight = cut.next_weight(_size(term, lengths) or 0.0) if cut else 0.0
    return value, neumann


def _last_term(f: Map, neumann: Tensor, probe: Tensor, x: Tensor, *params: Tensor) -> Tensor:
    """The number whose gradient is that of the estimate, given the Neumann series."""
    return (vjp(lambda z: f(z, *params), x)[1](neumann)[0] * probe).sum(-1)


class _Estimate(torch.autograd.Function):
    """The value without a graph; the graph of one term, made anew, in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f: Map, terms: int, roulette: bool, probe: Tensor, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        return _series(f, terms, roulette, probe, x, *params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        f, _, _, probe, x, *params = inputs
        ctx.f = f
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], probe, x, *params)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        neumann, probe, *point = ctx.saved_tensors
        return None, None, None, None, *vjp(lambda *point: _last_term(ctx.f, neumann, probe, *point), *point)[1](grad)
