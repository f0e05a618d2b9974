"""The contract that every transform keeps.

A transform maps *base to target* (``forward``, the sampling direction). It implements two methods, each returning the mapped point and the log
absolute determinant of the Jacobian of the map it applied, and every shape is checked here, once:

- ``forward_and_ladj(x, context=None)``: ``(*batch, D) -> (*batch, D), (*batch,)``
- ``inverse_and_ladj(y, context=None)``: the same shapes; its ladj is minus the forward one at ``x``.

Everything that torch and Pyro want of a ``Transform`` is derived from these two.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..errors import DtypeError, ShapeError
from ..numerics.introspection import tensors_of

__all__ = ["FlowTransform", "Conditioned", "Inverse"]

Fused = Callable[..., tuple[Tensor, Tensor]]


def _checked(method: Fused) -> Fused:
    """Checks shapes and dtypes before a fused method runs, and gives context and point a common batch shape."""

    @functools.wraps(method)
    def wrapper(self: FlowTransform, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, context = self._check(value, context)
        return method(self, value, context)

    return wrapper


class _Memory(NamedTuple):
    """The last evaluation of a transform."""

    x: Tensor
    y: Tensor
    ladj: Tensor  # of the forward map
    result: Tensor  # which of x and y was computed from the other
    state: tuple[Tensor, ...]  # held, so that no other tensor can take one of their ids
    stamp: tuple[Any, ...]


class _Cached(Transform):
    """Torch's ``Transform`` interface on two fused methods, remembering the last ``(x, y, ladj)`` by identity.

    The memory answers the way back and the log-det; the same question asked again is computed again, so that no graph is walked twice. It is void
    once a point, a parameter, the grad mode or the train mode changed, so a density is never stale.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    one_pass: Literal["both", "forward", "inverse"] = "both"  # the direction that costs one evaluation
    manifold: Any = None  # where its points live, if not in R^D: see pyro_flows.manifolds
    _last: _Memory | None = None

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` of shape ``(*batch, D)`` to ``(y, log|det dy/dx|)``."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``y`` of shape ``(*batch, D)`` to ``(x, log|det dx/dy|)``."""
        raise NotImplementedError

    def _state(self) -> tuple[Tensor, ...]:
        """The tensors, besides the point, that an evaluation depends on."""
        raise NotImplementedError

    def _stamp(self, *tensors: Tensor) -> tuple[Any, ...]:
        return torch.is_grad_enabled(), *((id(t), t._version, t.requires_grad) for t in tensors)

    def _remembered(self, x: Tensor | None = None, y: Tensor | None = None) -> _Memory | None:
        last = self._last
        if last is None or torch.compiler.is_compiling():
            return None
        same = (x is None or x is last.x) and (y is None or y is last.y)
        return last if same and last.stamp == self._stamp(last.x, last.y, *self._state()) else None

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor, result: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        state = self._state()
        # Inference tensors do not say when they change, and a point that a context has broadcast has another shape on the way back.
        forget = x.shape[:-1] != y.shape[:-1] or any(t.is_inference() for t in (x, y, *state))
        self._last = None if forget else _Memory(x, y, ladj, result, state, self._stamp(x, y, *state))

    def _call(self, x: Tensor) -> Tensor:
        last = self._remembered(x=x)
        if last is not None and last.result is x:
            return last.y
        y, ladj = self.forward_and_ladj(x)
        self._remember(x, y, ladj, y)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        last = self._remembered(y=y)
        if last is not None and last.result is y:
            return last.x
        x, ladj = self.inverse_and_ladj(y)
        self._remember(x, y, -ladj, x)
        return x

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

    def with_cache(self, cache_size: int = 1) -> _Cached:  # the cache here costs nothing and is always right
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


class FlowTransform(_Cached, TransformModule):
    """A bijection of ``R^D``, or of a manifold in it, conditional on a context when ``context_dim > 0``.

    Args:
        dim: number of coordinates ``D``.
        context_dim: size of the context vector; 0 for an unconditional transform.

    Subclasses implement :meth:`forward_and_ladj` and :meth:`inverse_and_ladj`; the arguments that reach them are checked, floating
    point, and broadcast against each other. Subclasses give ``repr`` details through :meth:`extra_repr`.

    Raises:
        ShapeError: a point's last dimension is not ``dim``, or a context is missing, unexpected or of the wrong size.
        DtypeError: a point is not floating point, or its dtype or device is not that of the parameters.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ShapeError(f"{type(self).__name__}: dim must be a positive integer, got {dim!r}")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ShapeError(f"{type(self).__name__}: context_dim must be a non-negative integer, got {context_dim!r}")
        self.dim, self.context_dim = dim, context_dim

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("forward_and_ladj", "inverse_and_ladj"):
            if name in cls.__dict__:
                setattr(cls, name, _checked(cls.__dict__[name]))

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # Pyro's parameter store hangs a weak reference here, which cannot be pickled
        return super().__getstate__()

    def _check(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        name = type(self).__name__
        if value.dim() == 0 or value.shape[-1] != self.dim:
            raise ShapeError(f"{name} expects points of shape (*batch, {self.dim}), got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise DtypeError(f"{name} expects floating-point points, got {value.dtype}: convert them with .to(torch.get_default_dtype())")
        self._check_dtype("points", value)
        self._check_context(context)
        if context is None:
            return value, None
        batch = self._joint_batch(value.shape, context.shape)
        return value.expand(batch + value.shape[-1:]), context.expand(batch + context.shape[-1:])

    def _check_dtype(self, what: str, given: Tensor) -> None:
        own = next((t for t in chain(self.parameters(), self.buffers()) if t.is_floating_point()), given)
        if own.dtype != given.dtype or own.device != given.device:
            raise DtypeError(
                f"{type(self).__name__} has parameters of {own.dtype} on {own.device} but got {what} of {given.dtype} on {given.device}: "
                "convert one with .to(dtype) or .to(device)"
            )

    def _check_context(self, context: Tensor | None) -> None:
        name = type(self).__name__
        if self.context_dim == 0 and context is not None:
            raise ShapeError(f"{name} takes no context, got one of shape {tuple(context.shape)}: build it with context_dim=")
        if self.context_dim and context is None:
            raise ShapeError(f"{name} needs a context of shape (*batch, {self.context_dim}): pass context=, or use .condition(context)")
        if context is not None and (context.dim() == 0 or context.shape[-1] != self.context_dim):
            raise ShapeError(f"{name} expects a context of shape (*batch, {self.context_dim}), got {tuple(context.shape)}")
        if context is not None:
            self._check_dtype("a context", context)

    def _joint_batch(self, value: torch.Size, context: torch.Size) -> torch.Size:
        try:
            return torch.broadcast_shapes(value[:-1], context[:-1])
        except RuntimeError:
            raise ShapeError(f"{type(self).__name__}: points {tuple(value)} and context {tuple(context)} do not broadcast") from None

    def _state(self) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self))

    def _stamp(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.training, *super()._stamp(*tensors)

    def clear_cache(self) -> None:
        for module in self.modules():
            if isinstance(module, _Cached):
                module._last = None

    def condition(self, context: Tensor) -> Transform:
        """The transform at a context: a light ``Transform`` that shares the parameters. Unconditional transforms return themselves."""
        if self.context_dim == 0:
            return self
        self._check_context(context)
        return Conditioned(self, context)

    @property
    def inv(self) -> FlowTransform:  # type: ignore[override]
        """The inverse, as a module that shares the parameters; ``t.inv.inv is t``."""
        return Inverse(self) if self._inv is None else self._inv  # type: ignore[return-value]

    def extra_repr(self) -> str:
        """``dim`` and, where there is one, ``context_dim``."""
        return f"dim={self.dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")

    __repr__ = nn.Module.__repr__


# Registered, not inherited: its metaclass would clash with PyroModule's (pyro.nn.module.to_pyro_module_).
ConditionalTransform.register(FlowTransform)


class Inverse(FlowTransform):
    """The inverse of a transform: owns the same parameters and shares its cache.

    Args:
        transform: the transform to invert.
    """

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.dim, transform.context_dim)
        self.transform = transform
        transform.__dict__["_inv"] = self  # past nn.Module, which would take it for a part
        self.one_pass = {"both": "both", "forward": "inverse", "inverse": "forward"}[transform.one_pass]  # type: ignore[assignment]
        self.domain, self.codomain, self.manifold = transform.codomain, transform.domain, transform.manifold

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(y, context)

    def _call(self, x: Tensor) -> Tensor:
        return self.transform._inverse(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform._call(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.transform.log_abs_det_jacobian(y, x)

    @property
    def inv(self) -> FlowTransform:  # type: ignore[override]
        return self.transform  # type: ignore[return-value]


class Conditioned(_Cached):
    """A transform bound to a context; it holds no parameters of its own.

    Args:
        transform: a conditional transform.
        context: tensor of shape ``(*batch, context_dim)``, whose batch the results take on.
    """

    def __init__(self, transform: FlowTransform, context: Tensor) -> None:
        super().__init__()
        self.transform, self.context = transform, context
        self.domain, self.codomain, self.manifold, self.one_pass = transform.domain, transform.codomain, transform.manifold, transform.one_pass

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(x, self.context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self.context)

    def _state(self) -> tuple[Tensor, ...]:
        return self.context, *self.transform._state()

    def _stamp(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.transform._stamp(*tensors)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the result: the point's, broadcast with the context's batch."""
        return self.transform._joint_batch(shape, self.context.shape) + shape[-1:]

    inverse_shape = forward_shape
