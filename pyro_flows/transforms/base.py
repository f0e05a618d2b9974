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
from typing import Any, Literal

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..errors import DtypeError, ShapeError

__all__ = ["FlowTransform", "Conditioned", "Inverse"]

Fused = Callable[..., tuple[Tensor, Tensor]]


def _checked(method: Fused) -> Fused:
    """Checks shapes and dtypes before a fused method runs, and gives context and point a common batch shape."""

    @functools.wraps(method)
    def wrapper(self: FlowTransform, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, context = self._check(value, context)
        return method(self, value, context)

    return wrapper


class _Cached(Transform):
    """Torch's ``Transform`` interface on two fused methods, remembering the last ``(x, y, ladj)`` by identity.

    The memory is void once a parameter, the grad mode or the train mode changed, so a density is never stale.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    one_pass: Literal["both", "forward", "inverse"] = "both"  # the direction that costs one evaluation
    _last: tuple[Any, ...] | None = None

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``x`` of shape ``(*batch, D)`` to ``(y, log|det dy/dx|)``."""
        raise NotImplementedError

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ``y`` of shape ``(*batch, D)`` to ``(x, log|det dx/dy|)``."""
        raise NotImplementedError

    def _stamp(self) -> tuple[Any, ...]:
        raise NotImplementedError

    def _remembered(self, index: int, value: Tensor) -> bool:
        if torch.compiler.is_compiling() or self._last is None:
            return False
        return self._last[index] is value and self._last[3] == self._stamp()

    def _remember(self, x: Tensor, y: Tensor, ladj: Tensor) -> None:
        if not torch.compiler.is_compiling():
            self._last = x, y, ladj, self._stamp()

    def _call(self, x: Tensor) -> Tensor:
        if not self._remembered(0, x):
            y, ladj = self.forward_and_ladj(x)
            self._remember(x, y, ladj)
            return y
        return self._last[1]  # type: ignore[index]

    def _inverse(self, y: Tensor) -> Tensor:
        if not self._remembered(1, y):
            x, ladj = self.inverse_and_ladj(y)
            self._remember(x, y, -ladj)
            return x
        return self._last[0]  # type: ignore[index]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """``log|det dy/dx|`` of shape ``(*batch,)``, through whichever direction is cheap."""
        if self._remembered(0, x) and self._last[1] is y:  # type: ignore[index]
            return self._last[2]  # type: ignore[index]
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

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_inv": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        return new


class FlowTransform(_Cached, TransformModule, ConditionalTransform):
    """A bijection of ``R^D``, conditional on a context when ``context_dim > 0``.

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

    __hash__ = nn.Module.__hash__

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
        own = next(self.parameters(), None)
        if own is not None and (own.dtype != value.dtype or own.device != value.device):
            raise DtypeError(
                f"{name} has parameters of {own.dtype} on {own.device} but got points of {value.dtype} on {value.device}: "
                "convert one with .to(dtype) or .to(device)"
            )
        if self.context_dim == 0:
            return value, None
        if context is None:
            raise ShapeError(f"{name} needs a context of shape (*batch, {self.context_dim}): pass context=, or use .condition(context)")
        if context.dim() == 0 or context.shape[-1] != self.context_dim:
            raise ShapeError(f"{name} expects a context of shape (*batch, {self.context_dim}), got {tuple(context.shape)}")
        try:
            batch = torch.broadcast_shapes(value.shape[:-1], context.shape[:-1])
        except RuntimeError:
            raise ShapeError(f"{name}: points {tuple(value.shape)} and context {tuple(context.shape)} do not broadcast") from None
        return value.expand(batch + value.shape[-1:]), context.expand(batch + context.shape[-1:])

    def _stamp(self) -> tuple[Any, ...]:
        return (torch.is_grad_enabled(), self.training, *(p._version for p in self.parameters()), *(b._version for b in self.buffers()))

    def clear_cache(self) -> None:
        for module in self.modules():
            if isinstance(module, _Cached):
                module._last = None

    def condition(self, context: Tensor) -> Transform:
        """The transform at a context: a light ``Transform`` that shares the parameters. Unconditional transforms return themselves."""
        return self if self.context_dim == 0 else Conditioned(self, context)

    @property
    def inv(self) -> FlowTransform:  # type: ignore[override]
        """The inverse, as a module that shares the parameters; ``t.inv.inv is t``."""
        return Inverse(self)

    def extra_repr(self) -> str:
        """``dim`` and, where there is one, ``context_dim``."""
        return f"dim={self.dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")

    __repr__ = nn.Module.__repr__


class Inverse(FlowTransform):
    """The inverse of a transform: owns the same parameters and shares its cache.

    Args:
        transform: the transform to invert.
    """

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.dim, transform.context_dim)
        self.transform = transform
        self.one_pass = {"both": "both", "forward": "inverse", "inverse": "forward"}[transform.one_pass]  # type: ignore[assignment]
        self.domain, self.codomain = transform.codomain, transform.domain

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
        return self.transform


class Conditioned(_Cached):
    """A transform bound to a context; it holds no parameters of its own.

    Args:
        transform: a conditional transform.
        context: tensor of shape ``(*batch, context_dim)``, whose batch the results take on.
    """

    def __init__(self, transform: FlowTransform, context: Tensor) -> None:
        super().__init__()
        self.transform, self.context = transform, context
        self.one_pass, self.domain, self.codomain = transform.one_pass, transform.domain, transform.codomain

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(x, self.context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self.context)

    def _stamp(self) -> tuple[Any, ...]:
        return (self.context._version, *self.transform._stamp())

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the result: the point's, broadcast with the context's batch."""
        batch = self.context.shape[:-1]
        while batch and batch[0] == 1:
            batch = batch[1:]
        return torch.broadcast_shapes(shape, batch + shape[-1:])

    inverse_shape = forward_shape

    __hash__ = object.__hash__
