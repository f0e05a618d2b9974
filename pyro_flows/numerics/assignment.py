"""Pairs of points that are close to each other: the assignment problem, nearly solved."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["near_optimal_assignment"]

_SHARPNESS = 40.0  # of the plan, in units of one over the mean cost
_SWEEPS = 60  # of Sinkhorn's algorithm


@torch.no_grad()
def near_optimal_assignment(a: Tensor, b: Tensor) -> Tensor:
    r"""A permutation ``p`` that makes :math:`\sum_i \|a_i - b_{p(i)}\|^2` nearly as small as it can be, ``(N,)``.

    Sinkhorn's algorithm gives a plan with entropy, which is rounded to a permutation: rows claim their best free column, and the strongest claim
    wins. Each point of ``b`` is used once, so nothing is lost or drawn twice; the cost is a few per cent above the least.

    Shape: ``a, b (N, D)``. Cost: :math:`O(N^2)` a sweep, some 60 of them.

    Reference: Sinkhorn distances: lightspeed computation of optimal transport (Cuturi, 2013), https://arxiv.org/abs/1306.0895
    """
    cost = torch.cdist(a.double(), b.double()) ** 2
    plan = torch.exp(-_SHARPNESS * cost / cost.mean().clamp(min=torch.finfo(cost.dtype).tiny)).clamp(min=1e-280)
    columns = plan.new_ones(len(b))
    for _ in range(_SWEEPS):
        rows = 1 / (plan @ columns)
        columns = 1 / (rows @ plan)
    plan = rows[:, None] * plan * columns
    chosen = torch.full((len(a),), -1, device=a.device)
    while bool((chosen < 0).any()):
        free = (chosen < 0).nonzero()[:, 0]
        strength, wanted = plan[free].max(1)
        rank = torch.empty_like(free)
        rank[strength.argsort()] = torch.arange(len(free), device=a.device)
        best = torch.full_like(chosen, -1).scatter_reduce(0, wanted, rank, "amax")
        won = rank == best[wanted]
        chosen[free[won]] = wanted[won]
        plan[:, wanted[won]] = -1.0
    return chosen
