"""The flow of AutoFlow between base and affine layer: what may be asked for, and how it is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from .. import flows
from ..distributions import Flow, Gaussian, StudentT
from ..errors import OptionError, ShapeError
from ..transforms import FlowTransform

__all__ = ["BASES", "NO_GUIDES", "FlowSpec", "check_spec", "inner_flow"]

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
