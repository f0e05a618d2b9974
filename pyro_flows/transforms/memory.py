"""Torch's ``Transform`` interface on two fused methods, with a memory of the last evaluation."""

from __future__ import annotations

import copy
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

__all__ = ["Remembering"]


class _Memory(NamedTuple):
    """The last evaluation of a transform."""

    x: Tensor
    y: Tensor
    ladj: Tensor  # of the forward map
    result: Tensor  # which of x and y was computed from the other
    state: tuple[Tensor, ...]  # kept alive, so that no other tensor can take one of their ids
    stamp: tuple[Any, ...]


class Remembering(Transform):
    """Torch's ``Transform`` interface on two fused methods, remembering the last ``(x, y, ladj)`` by identity.

    The memory answers the way back and the log-det; the same question asked again is computed again, so that no graph is walked twice. It is void
    once a point, a parameter, the grad mode or the train mode changed, so a density is never stale.
    """

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    bijective = True
    event_shape: torch.Size  # of one point
    one_pass: Literal["both", "forward", "inverse"] = "both"  # the direction that costs one evaluation
    manifold: Any = None  # where its points live, if not in R^D: see pyro_flows.manifolds
    _last: _Memory | None = None

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` of shape ``(*batch, *event)`` to ``(y, log|det dy/dx|)``."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``y`` of shape ``(*batch, *event)`` to ``(x, log|det dx/dy|)``."""
        raise NotImplementedError

    def _state(self) -> tuple[Tensor, ...]:
        """The tensors, besides the point, that an evaluation depends on."""
        raise NotImplementedError

    def _stamp(self, *tensors: Tensor) -> tuple[Any, ...]:
        """What changes when one of these tensors does, or the grad mode."""
        return torch.is_grad_enabled(), *[(id(t), t._version, t.requires_grad) for t in tensors]

    def _remembered(self, x: Tensor | None = None, y: Tensor | None = None, result: Tensor | None = None) -> _Memory | None:
        """The last evaluation, if it was of these points, computed this one, and nothing has changed since."""
        if torch.compiler.is_compiling():
            return None
        last = self._last
        if last is None or (x is not None and x is not last.x) or (y is not None and y is not last.y):
            return None
        if result is not None and result is not last.result:
            return None
        return last if last.stamp == self._stamp(last.x, last.y, *self._state()) else None

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor, result: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        state, events = self._state(), len(self.event_shape)
        # A point that a context has broadcast has another shape on the way back, and inference tensors do not say when they change.
        forget = x.shape[:-events] != y.shape[:-events]
        for tensor in (x, y, *state):
            forget = forget or tensor.is_inference()
        self._last = None if forget else _Memory(x, y, ladj, result, state, self._stamp(x, y, *state))

    def _call(self, x: Tensor) -> Tensor:
        last = self._remembered(x=x, result=x)
        if last is not None:
            return last.y
        y, ladj = self.forward_and_ladj(x)
        self._remember(x, y, ladj, y)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        last = self._remembered(y=y, result=y)
        if last is not None:
            return last.x
        x, ladj = self.inverse_and_ladj(y)
        self._remember(x, y, -ladj, x)
        return x

    def inverse_and_forward_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """``(x, log|det dy/dx|)``: from the memory where ``y`` is what the last evaluation gave, else computed; what a density needs.

        Unlike two calls of torch's interface it asks the memory once, and leaves it as it is.
        """
        last = self._remembered(y=y, result=y)
        if last is not None:
            return last.x, last.ladj
        x, ladj = self.inverse_and_ladj(y)
        return x, -ladj

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` of shape ``(*batch,)``, through whichever direction is cheap."""
        last = self._remembered(x, y)
        if last is not None:
            return last.ladj
        if self.one_pass == "inverse":
            return -self.inverse_and_ladj(y)[1]
        return self.forward_and_ladj(x)[1]

    def clear_cache(self) -> None:
        """Forget the last evaluation, here and in every part."""
        self._last = None

    def with_cache(self, cache_size: int = 1) -> Remembering:  # the memory costs nothing and is always right
        return self

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:  # in Python, since torch.compile does not trace object.__hash__ of a class that compares by a method
        return id(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_inv": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        return new
