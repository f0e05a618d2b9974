"""The flow that AutoFlow uses when none is asked for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import flows
from ..distributions import Flow
from ..model.sites import LatentSite
from ..transforms import Compose, Coupling, Elementwise
from ..univariate import Affine, SinhArcsinh

__all__ = ["default_flow"]

# Couplings by halves and the width of all nets, by dimension: in many dimensions more layers do more good than wide nets, in few they are not needed.
_SIZES = ((16, 2, 40), (64, 4, 64), (10**9, 12, 32))


def _is_global(sites: Sequence[LatentSite], dim: int) -> Tensor | None:
    """Which coordinates belong to the model's upper level, ``(d,)``, or ``None`` where it has one level only.

    Sites outside all plates stand above those inside; a model that has only one kind is divided into single numbers and vectors.
    """
    for upper in (lambda s: not s.plates, lambda s: s.stop - s.start == 1):
        mask = torch.zeros(dim, dtype=torch.bool)
        for site in sites:
            mask[site.start : site.stop] = upper(site)
        if mask.any() and not mask.all():
            return mask
    return None


def default_flow(sites: Sequence[LatentSite], dim: int) -> Flow:
    """Affine couplings, then one sinh-arcsinh layer for skewness and tails.

    In a model of two levels the first couplings, and the last, go from the upper level to what depends on it: funnels and other hierarchies, where
    the upper level sets location and scale of the lower one, are exactly such couplings. The others mix halves of the coordinates. A single
    coordinate, which has nothing to couple, gets a spline.
    """
    if dim == 1:
        return flows.nsf(1, transforms=1, bins=12)
    count, width = next((count, (width, width)) for limit, count, width in _SIZES if dim <= limit)
    upper = _is_global(sites, dim)
    halves = flows.realnvp(dim, transforms=count if upper is not None else count + 4, hidden_features=width).transform
    layers = [halves]
    if upper is not None:
        down, up, last = (Coupling(Affine(), dim, moved, hidden_features=width) for moved in (~upper, upper, ~upper))
        layers = [down, up, halves, last]
    return Flow(dim, Compose([*layers, Elementwise(SinhArcsinh(), dim)]))
