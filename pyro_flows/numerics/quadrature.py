"""Clenshaw-Curtis quadrature: positive weights, exact for polynomials, spectrally accurate for smooth functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["clenshaw_curtis", "integrate_from_zero"]


def clenshaw_curtis(panels: int, like: Tensor) -> tuple[Tensor, Tensor]:
    r"""The nodes and weights of :math:`\int_{-1}^1 g \approx \sum_j w_j g(u_j)`, both of shape ``(panels + 1,)``.

    Args:
        panels: an even number ``n``; the rule is exact for polynomials of degree ``n``.
        like: a tensor whose dtype and device the result takes. Nothing is copied to it, so a CUDA graph can hold this.

    Reference: A method for numerical integration on an automatic computer (Clenshaw and Curtis, 1960), https://doi.org/10.1007/BF01386223
    """
    n = panels
    angle = torch.arange(n + 1, dtype=like.dtype, device=like.device) * (math.pi / n)
    k = torch.arange(1, n // 2 + 1, dtype=like.dtype, device=like.device)
    share = torch.where(k < n // 2, 2.0, 1.0) / (4 * k * k - 1)
    weights = (1 - ((2 * angle[:, None] * k).cos() * share).sum(-1)) * (2 / n)
    ends = (angle.sin() > 0.5 / n).to(like.dtype)  # zero at the two ends, which count half
    return angle.cos(), weights * (0.5 + 0.5 * ends)


def integrate_from_zero(g: Callable[[Tensor], Tensor], x: Tensor, panels: int) -> Tensor:
    """The integral of ``g`` from 0 to ``x``, elementwise: ``g`` takes points of shape ``(*x.shape, panels + 1)``."""
    nodes, weights = clenshaw_curtis(panels, x)
    half = 0.5 * x.unsqueeze(-1)
    return (half * weights * g(half * (1 + nodes))).sum(-1)
