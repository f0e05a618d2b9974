"""The learned affine layer of AutoFlow, of a rank that suits the dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..transforms import Affine, FlowTransform, LowRankLinear, TriangularLinear

__all__ = ["affine_layer"]

_FULL_RANK_UP_TO, _LOW_RANK_UP_TO = 300, 2000


def affine_layer(kind: str, dim: int, scale: float) -> FlowTransform:
    """A layer of a kind, ``"auto"``, ``"full_rank"``, ``"low_rank"`` or ``"diagonal"``, that starts as a multiple of the identity."""
    if kind == "auto":
        kind = "full_rank" if dim <= _FULL_RANK_UP_TO else "low_rank" if dim <= _LOW_RANK_UP_TO else "diagonal"
    layer: FlowTransform
    log_scales: Tensor
    if kind == "full_rank":
        layer = TriangularLinear(dim)
        log_scales = layer.log_diag
    elif kind == "low_rank":
        layer = LowRankLinear(dim, rank=min(dim, max(4, round(dim**0.5))))
        log_scales = layer.log_scale
    else:
        layer = Affine(dim)
        log_scales = layer.log_scale
    with torch.no_grad():
        log_scales.fill_(math.log(scale))
    return layer
