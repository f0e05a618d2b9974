"""A flow as functions of one flat vector of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..distributions import Flow
from ..distributions.abstract_flow import AbstractFlow
from ..stochastic import StochasticFlow
from ..transforms import Standardize
from .scores import push_score

__all__ = ["Calls", "FlatFlow", "Parameters"]

Parameters = dict[str, Tensor]


class _Ends(nn.Module):
    """What is asked of a flow's transform as one module call, which is what ``functional_call`` needs."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.transform = flow.transform

    def forward(self, what: str, *args: Tensor) -> tuple[Tensor, ...]:
        calls: dict[str, Callable[..., tuple[Tensor, ...]]] = {
            "forward": self.transform.forward_and_ladj,
            "inverse": self.transform.inverse_and_ladj,
            "push": partial(push_score, self.transform),
        }
        return calls[what](*args)


class Calls(nn.Module):
    """What is asked of a stochastic flow, its methods by name, as one module call."""

    def __init__(self, flow: StochasticFlow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, what: str, *args: Any) -> Any:
        return getattr(self.flow, what)(*args)


class FlatFlow:
    """A flow as functions of one flat parameter vector, so that optimizers and graphs handle a single tensor.

    The location and scale of a :class:`~pyro_flows.transforms.Standardize` ride along at the end, with zero gradients: a captured graph takes them as
    inputs, and so stays good when they change.

    Args:
        flow: the flow.
        ends: a module that holds the flow, called for what is asked of it; its transform's directions by default.
    """

    def __init__(self, flow: AbstractFlow, ends: nn.Module | None = None) -> None:
        self.flow: Any = flow
        self._ends: nn.Module = _Ends(self.flow) if ends is None else ends  # type: ignore[arg-type]
        fixed = [b for m in self._ends.modules() if isinstance(m, Standardize) for b in m.buffers()]
        self._learned = [name for name, p in self._ends.named_parameters() if p.requires_grad]
        tensors = dict(self._ends.named_parameters()) | {n: b for n, b in self._ends.named_buffers() if any(b is f for f in fixed)}
        self._tensors = {n: t for n, t in tensors.items() if n in self._learned or not t.requires_grad}
        self._sizes = [t.numel() for t in self._tensors.values()]

    def read(self) -> Tensor:
        """The flow's parameters as one vector, a copy."""
        return self.flatten({n: t.detach() for n, t in self._tensors.items()}, self._tensors)

    @torch.no_grad()
    def write(self, flat: Tensor) -> None:
        """Put a vector back into the flow's parameters."""
        for t, part in zip(self._tensors.values(), flat.split(self._sizes), strict=True):
            t.copy_(part.view_as(t))

    def unflatten(self, flat: Tensor) -> Parameters:
        """The parameters by name, as views of the vector."""
        return {n: part.view(t.shape) for (n, t), part in zip(self._tensors.items(), flat.split(self._sizes), strict=True)}

    def flatten(self, values: Parameters, names: Iterable[str] | None = None) -> Tensor:
        """One vector from gradients by name, zero where nothing is learned; from all values of ``names`` where they are given."""
        kept = set(self._learned if names is None else names)
        parts = [values[n].reshape(-1) if n in kept else torch.zeros_like(t).reshape(-1) for n, t in self._tensors.items()]
        return torch.cat(parts) if parts else torch.zeros(0)

    def apply(self, parameters: Parameters, what: str, *args: Any) -> Any:
        """The flow's ``"forward"`` or ``"inverse"`` map, with its ladj; or ``"push"``, the forward map with ladj and score."""
        return functional_call(self._ends, parameters, (what, *args))

    def log_prob(self, parameters: Parameters, x: Tensor) -> Tensor:
        """Log density of points ``(N, d)``."""
        z, ladj = self.apply(parameters, "inverse", x)
        return self.flow.base().log_prob(z) + ladj

    def sample(self, parameters: Parameters, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Points and their log density from base draws ``(N, d)``."""
        x, ladj = self.apply(parameters, "forward", noise)
        return x, self.flow.base().log_prob(noise) - ladj
