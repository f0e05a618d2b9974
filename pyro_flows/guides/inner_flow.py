"""The flow of AutoFlow between base and affine layer: what may be asked for, how it is made, and which one is the default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import flows
from ..distributions import Flow, Gaussian, StudentT
from ..errors import OptionError, ShapeError
from ..model.sites import LatentSite
from ..transforms import Compose, Coupling, Elementwise, FlowTransform
from ..univariate import Affine, SinhArcsinh

__all__ = ["BASES", "NO_GUIDES", "FlowSpec", "check_spec", "default_flow", "inner_flow"]

FlowSpec = str | Flow | FlowTransform | Callable[[int], Flow | FlowTransform] | None
BASES: dict[str, Callable[[int], nn.Module]] = {"normal": Gaussian, "student_t": StudentT}
_OPTIONS: dict[str, dict[str, Any]] = {"cnf": {"solver": "rk4", "steps": 4}}  # of recipes: graphs want fixed steps
NO_GUIDES = {  # recipes, and why not
    "flow_gmm": "draws of its base cannot be reparameterised",
    **dict.fromkeys(("sphere", "simplex", "torus"), "its points live on a manifold, and AutoFlow's in unconstrained space: use AutoManifoldFlow"),
    **dict.fromkeys(("lwta", "ar_lwta", "cif", "snf"), "it is no bijection: use AutoStochasticFlow"),
}


def check_spec(flow: Any) -> None:
    """Raise an ``OptionError`` for what cannot be the flow of a guide."""
    if isinstance(flow, str) and flow in NO_GUIDES:
        raise OptionError(f"flow={flow!r} cannot be a guide: {NO_GUIDES[flow]}")
    if isinstance(flow, str) and flow != "auto" and flow not in flows.__all__:
        names = ", ".join(name for name in flows.__all__ if name not in NO_GUIDES)
        raise OptionError(f"flow={flow!r} is not known: choose 'auto', None or one of {names}")
    if not (flow is None or isinstance(flow, (str, FlowTransform)) or callable(flow)):
        raise OptionError(f"flow must be a name, a transform, a function of the dimension or None, got {type(flow).__name__}")


def inner_flow(spec: Any, dim: int) -> Flow | FlowTransform | None:
    """The flow that a name, a transform or a function of the dimension stands for."""
    if isinstance(spec, str):
        spec = partial(getattr(flows, spec), **_OPTIONS.get(spec, {}))
    inner = spec if spec is None or isinstance(spec, (Flow, FlowTransform)) else spec(dim)
    if inner is None:
        return None
    if not isinstance(inner, (Flow, FlowTransform)):
        raise OptionError(f"flow= must give a Flow or a transform of pyro_flows, got {type(inner).__name__}")
    if inner.dim != dim or inner.context_dim:
        raise ShapeError(
            f"flow= must map the model's {dim} unconstrained numbers without a context; it has dim={inner.dim}, context_dim={inner.context_dim}: "
            "give a function of the dimension, flow=lambda dim: ..."
        )
    return inner


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
