"""Traces and log determinants of ``I + J``, where ``J`` is a contraction's Jacobian: exact, and estimated without bias."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.func import vjp, vmap

__all__ = ["batch_jacobian", "log_det", "estimate_log_det", "roulette_weights", "hutchinson_trace"]

Map = Callable[..., Tensor]

MANY_TERMS = 20  # of a series that is cut at a fixed place


def batch_jacobian(f: Map, x: Tensor) -> Tensor:
    """The Jacobian of each row, ``(*batch, D, D)``, of a map whose rows do not influence each other. Cost: one evaluation and ``D`` vjps."""
    units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    pullback = vjp(f, x)[1]
    return vmap(lambda unit: pullback(unit.expand_as(x))[0], out_dims=-2)(units)


def log_det(f: Map, x: Tensor) -> Tensor:
    r""":math:`\log|\det(I + \partial f/\partial x)|` of each row, exactly, for a contraction ``f``: cost ``D`` vjps and :math:`O(D^3)`."""
    return torch.linalg.slogdet(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) + batch_jacobian(f, x))[1]


def hutchinson_trace(f: Map, x: Tensor, probe: Tensor) -> Tensor:
    r"""The estimate :math:`v^\top J v` of the trace of each row's Jacobian, unbiased for probes :math:`v` with :math:`E vv^\top = I`.

    Shape: ``x, probe (*batch, D) -> (*batch,)``. Cost: one vjp.

    Reference: A stochastic estimator of the trace of the influence matrix (Hutchinson, 1990), https://doi.org/10.1080/03610919008812866
    """
    return (vjp(f, x)[1](probe)[0] * probe).sum(-1)


def roulette_weights(exact_terms: int = 2, mean: float = 2.0) -> list[float]:
    r"""Weights of the terms of a series that make its cut at a random place unbiased (Russian roulette).

    The series is cut after :math:`N = n + \mathrm{Poisson}(m)` terms; term :math:`k` has weight :math:`1 / P(N \ge k)`, which is 1 for the first
    ``exact_terms`` = :math:`n`. The number of terms is the length of the list, drawn from torch's generator. Where values cannot be looked at
    (``vmap``, ``make_fx``, ``torch.compile``) it cannot be random, and 20 terms of weight 1 are the answer.

    Unbiased does not mean accurate: Poisson tails fall faster than any power, so the weights of late terms are huge and rare, and the variance is
    infinite. Where the Jacobian has an eigenvalue near -1 an average of any practical size falls short: for ``log(1 - 0.9)`` = -2.303 the mean of
    20,000 draws was -2.20 from 2 exact terms and -2.294 from 20; for ``log(1 - 0.97)`` = -3.507 it was -2.85 and -3.28.
    """
    if torch.compiler.is_compiling():
        return [1.0] * MANY_TERMS
    try:
        extra = int(torch.poisson(torch.tensor(mean)))
    except RuntimeError:
        return [1.0] * MANY_TERMS
    weights, density, tail = [1.0] * exact_terms, math.exp(-mean), 1.0
    for k in range(extra):
        tail -= density  # P(Poisson >= k + 1)
        density *= mean / (k + 1)
        weights.append(1.0 / tail)
    return weights


def estimate_log_det(f: Map, x: Tensor, params: Sequence[Tensor], probe: Tensor, weights: Sequence[float]) -> Tensor:
    r"""Estimate :math:`\log|\det(I + J)|`, :math:`J = \partial f/\partial x`, of each row, for a contraction ``f(x, *params)``.

    .. math:: \log\det(I + J) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k} \operatorname{tr} J^k
        \approx \sum_{k=1}^{N} c_k \frac{(-1)^{k+1}}{k} v^\top J^k v, \qquad
        \nabla \approx v^\top \Big(\sum_{k=0}^{N} c_k (-J)^k\Big) (\nabla J) v

    Args:
        f: ``f(x, *params)``, whose rows do not influence each other.
        x: points of shape ``(*batch, D)``.
        params: every tensor besides ``x`` that the gradient is wanted of.
        probe: random ``v`` of shape ``(*batch, D)`` with :math:`E vv^\top = I`.
        weights: the :math:`c_k`: from :func:`roulette_weights` value and gradient are unbiased; ones cut the series, with an error
            below :math:`D L^{N+1} / ((N + 1)(1 - L))`, where :math:`L` is the Lipschitz constant.

    Cost: ``N`` vjps; backward, three more. The gradient is the Neumann series' and is weighted row by row; no graph is kept, so memory does not
    grow with ``N``. It has no second derivative: asking for one raises.

    References: Residual flows for invertible generative modeling (Chen et al., 2019), https://arxiv.org/abs/1906.02735;
    Invertible residual networks (Behrmann et al., 2018), https://arxiv.org/abs/1811.00995
    """
    if torch.compiler.is_compiling():  # where Dynamo refuses autograd functions of this kind; no second derivative exists there either
        with torch.no_grad():
            value, neumann = _series(f, weights, probe, x, *params)
        slope = _last_term(f, neumann, probe, x, *params)
        return value + slope - slope.detach()
    return _Estimate.apply(f, tuple(weights), probe, x, *params)[0]


def _series(f: Map, weights: Sequence[float], probe: Tensor, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
    """The estimate, and the Neumann series of the probe, which the gradient needs."""
    pullback = vjp(lambda z: f(z, *params), x)[1]
    term = neumann = probe
    value = torch.zeros_like(x[..., 0])
    for k, weight in enumerate(weights, 1):
        term = -pullback(term)[0]  # (-J^T)^k v
        neumann = neumann + weight * term
        value = value - weight / k * (term * probe).sum(-1)
    return value, neumann


def _last_term(f: Map, neumann: Tensor, probe: Tensor, x: Tensor, *params: Tensor) -> Tensor:
    """The number whose gradient is that of the estimate, given the Neumann series."""
    return (vjp(lambda z: f(z, *params), x)[1](neumann)[0] * probe).sum(-1)


class _Estimate(torch.autograd.Function):
    """The value without a graph; the graph of one term, made anew, in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(f: Map, weights: tuple[float, ...], probe: Tensor, x: Tensor, *params: Tensor) -> tuple[Tensor, Tensor]:
        return _series(f, weights, probe, x, *params)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        f, _, probe, x, *params = inputs
        ctx.f = f
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1], probe, x, *params)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        neumann, probe, *point = ctx.saved_tensors
        return None, None, None, *vjp(lambda *point: _last_term(ctx.f, neumann, probe, *point), *point)[1](grad)
