"""The block of a guide that lives in Euclidean space: a flow, a learned affine layer, a fixed location and scale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..distributions import Flow, Gaussian
from ..model.sites import LatentSite
from ..numerics import triangle
from ..transforms import Affine, Compose, FlowTransform, LowRankLinear, Standardize, TriangularLinear
from .block import Block, Layers, Start, index_of
from .inner_flow import BASES, default_flow, inner_flow

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EuclideanBlock", "affine_layer"]

_FULL_RANK_UP_TO, _LOW_RANK_UP_TO = 300, 2000  # dimensions


@dataclass(frozen=True)
class EuclideanBlock(Block):
    """All numbers that the reals have a bijection to."""

    num_outer: ClassVar[int] = 2

    @classmethod
    def of(cls, sites: Sequence[LatentSite]) -> list[Self]:
        own = [s for s in sites if s.manifold is None]
        return [cls(index_of(own))] if own else []

    @property
    def feature_dim(self) -> int:
        return len(self.index)

    def features(self, noise: Tensor) -> Tensor:
        return noise

    def contains(self, run: Tensor) -> Tensor:
        return torch.ones(run.shape[:-1], dtype=torch.bool, device=run.device)

    def __str__(self) -> str:
        return f"R^{len(self.index)}"

    def build(self, sites: Sequence[LatentSite], loc: Tensor, context_dim: int, config: Mapping[str, Any]) -> tuple[nn.Module, Compose]:
        dim = loc.numel()
        own = _end_to_end([s for s in sites if s.manifold is None])
        inner = default_flow(own, dim) if config["flow"] == "auto" else inner_flow(config["flow"], dim)
        layers = [] if inner is None else [inner.transform if isinstance(inner, Flow) else inner]
        for layer in layers:
            layer.prefer_exact()
        layers += [affine_layer(config["affine"], dim, config["init_scale"]), Standardize(loc, torch.eye(dim, dtype=loc.dtype, device=loc.device))]
        make = config["base"]
        if make is None:
            base = inner.base if isinstance(inner, Flow) else Gaussian(dim)
        else:
            base = BASES[make](dim) if isinstance(make, str) else make(dim)
        return base, Compose(layers)

    def loc(self, layers: Layers) -> Tensor:
        return _fixed(layers).loc

    def start_at(self, layers: Layers, start: Start, before: Tensor) -> bool:
        index = self.index.to(start.loc.device)
        rows = start.scale_tril[index]
        _fixed(layers).set(start.loc[index], rows if len(index) == len(start.loc) else triangle(rows))
        for parameter in layers[-2].parameters():
            parameter.zero_()
        return False

    def foldable(self, layers: Layers) -> bool:
        return isinstance(layers[-2], TriangularLinear)

    def fold(self, layers: Layers) -> None:
        affine, fixed = cast(TriangularLinear, layers[-2]), _fixed(layers)
        fixed.set(fixed.forward_and_ladj(affine.shift)[0], fixed.scale_tril @ affine.weight())
        for parameter in affine.parameters():
            parameter.zero_()


def _fixed(layers: Layers) -> Standardize:
    return cast(Standardize, layers[-1])


def _end_to_end(sites: Sequence[LatentSite]) -> list[LatentSite]:
    """Sites with the slices that they have in a vector of their own."""
    moved: list[LatentSite] = []
    for s in sites:
        start = moved[-1].stop if moved else 0
        moved.append(replace(s, start=start, stop=start + s.size))
    return moved


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
