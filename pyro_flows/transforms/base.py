"""The contract that every transform keeps.

A transform maps *base to target* (``forward``, the sampling direction). It implements two methods, each returning the mapped point and the log
absolute determinant of the Jacobian of the map it applied, and every shape is checked here, once:

- ``forward_and_ladj(x, context=None)``: ``(*batch, *event) -> (*batch, *event), (*batch,)``
- ``inverse_and_ladj(y, context=None)``: the same shapes; its ladj is minus the forward one at ``x``.

Everything that torch and Pyro want of a ``Transform`` is derived from these two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from ..errors import DtypeError, ShapeError
from ..numerics.introspection import floating_tensor, tensors_of
from .memory import Remembering

__all__ = ["FlowTransform", "Conditioned", "Inverse"]

Fused = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _checked(method: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Checks shapes and dtypes before a fused method runs, and gives context and point a common batch shape."""

    @functools.wraps(method)
    def wrapper(self: FlowTransform, value: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value, context = self._check(value, context)
        return method(self, value, context)

    return wrapper


class FlowTransform(Remembering, TransformModule):
    """A bijection of ``R^D``, or of a manifold in it, conditional on a context when ``context_dim > 0``.

    Args:
        dim: number of coordinates ``D`` of a point; or its shape, such as ``(channels, height, width)``.
        context_dim: size of the context vector; 0 for an unconditional transform.

    Attributes:
        event_shape: shape of one point, ``(D,)`` for vectors.
        dim: number of coordinates, whatever the shape.
        layers: the transforms that this one is composed of, base to target: itself where it has no parts. Compositions, and inverses of them, are
            taken apart at every depth.
        ode: the continuous flow that this layer is, and whether the layer runs it backwards; ``None`` for all other layers.
        implicit: whether the layer's derivatives are functions of its own making (implicit, or of an estimate), which ``torch.func`` cannot nest.

    Subclasses implement :meth:`forward_and_ladj` and :meth:`inverse_and_ladj`; the arguments that reach them are checked, floating
    point, and broadcast against each other. Subclasses give ``repr`` details through :meth:`extra_repr`.

    A transform that is made of others calls ``part.unchecked_forward(x, context)`` and ``part.unchecked_inverse(y, context)``: what reaches it has
    been checked, and need not be checked again for each part.

    Raises:
        ShapeError: a point's shape does not end with ``event_shape``, or a context is missing, unexpected or of the wrong size.
        DtypeError: a point is not floating point, or its dtype or device is not that of the parameters.
        SupportError: a point does not lie on the transform's manifold, where it has one.
    """

    implicit: bool = False
    unchecked_forward: Fused
    unchecked_inverse: Fused

    def __init__(self, dim: int | Sequence[int], context_dim: int = 0) -> None:
        super().__init__()
        sizes = (dim,) if isinstance(dim, int) else tuple(dim) if isinstance(dim, Sequence) else ()
        if not sizes or any(not isinstance(size, int) or size < 1 for size in sizes):
            raise ShapeError(f"{type(self).__name__}: dim must be a positive integer, or a shape of such, got {dim!r}")
        if not isinstance(context_dim, int) or context_dim < 0:
            raise ShapeError(f"{type(self).__name__}: context_dim must be a non-negative integer, got {context_dim!r}")
        self.event_shape = torch.Size(sizes)
        self.dim, self.context_dim = self.event_shape.numel(), context_dim
        if len(sizes) > 1:
            self.domain = self.codomain = constraints.independent(constraints.real, len(sizes))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for way in ("forward", "inverse"):
            name = f"{way}_and_ladj"
            if name in cls.__dict__:
                setattr(cls, name, _checked(cls.__dict__[name]))
            method = getattr(cls, name)
            setattr(cls, f"unchecked_{way}", getattr(method, "__wrapped__", method))

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # Pyro's parameter store hangs a weak reference here, which cannot be pickled
        return super().__getstate__()

    @property
    def layers(self) -> tuple[FlowTransform, ...]:
        return (self,)

    @property
    def ode(self) -> tuple[Any, bool] | None:
        return None

    def prefer_exact(self) -> None:
        """Make exact every log-det that was left to choose ("auto"), here and in every part: importance weights do not bear an estimate."""
        for module in self.modules():
            if isinstance(module, FlowTransform):
                module._prefer_exact()

    def _prefer_exact(self) -> None:
        """What :meth:`prefer_exact` does to this layer alone."""

    def check_compilable(self) -> None:
        """Raise an ``OptionError`` where ``torch.compile`` cannot take this layer."""

    def _check(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        events = len(self.event_shape)
        if value.shape[-events:] != self.event_shape:
            raise ShapeError(f"{type(self).__name__} expects points of shape {self._expected}, got {tuple(value.shape)}")
        if not value.is_floating_point():
            raise DtypeError(
                f"{type(self).__name__} expects floating-point points, got {value.dtype}: convert them with .to(torch.get_default_dtype())"
            )
        self._check_dtype("points", value)
        self._check_context(context)
        if context is not None:
            batch = self._joint_batch(value.shape, context.shape)
            value, context = value.expand(batch + self.event_shape), context.expand(batch + context.shape[-1:])
        if self.manifold is not None:
            self.manifold.check(value, type(self).__name__)
        return value, context

    @property
    def _expected(self) -> str:
        """The shape of points, in words."""
        return f"(*batch, {', '.join(map(str, self.event_shape))})"

    def _check_dtype(self, what: str, given: Tensor) -> None:
        own = floating_tensor(self)
        if own is not None and (own.dtype != given.dtype or own.device != given.device):
            raise DtypeError(
                f"{type(self).__name__} has parameters of {own.dtype} on {own.device} but got {what} of {given.dtype} on {given.device}: "
                "convert one with .to(dtype) or .to(device)"
            )

    def _check_context(self, context: Tensor | None) -> None:
        if context is None and not self.context_dim:
            return
        name = type(self).__name__
        if context is None:
            raise ShapeError(f"{name} needs a context of shape (*batch, {self.context_dim}): pass context=, or use .condition(context)")
        if not self.context_dim:
            raise ShapeError(f"{name} takes no context, got one of shape {tuple(context.shape)}: build it with context_dim=")
        if context.shape[-1:] != (self.context_dim,):
            raise ShapeError(f"{name} expects a context of shape (*batch, {self.context_dim}), got {tuple(context.shape)}")
        self._check_dtype("a context", context)

    def _joint_batch(self, value: torch.Size, context: torch.Size) -> torch.Size:
        try:
            return torch.broadcast_shapes(value[: -len(self.event_shape)], context[:-1])
        except RuntimeError:
            raise ShapeError(f"{type(self).__name__}: points {tuple(value)} and context {tuple(context)} do not broadcast") from None

    def _state(self) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self))

    def _stamp(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.training, *super()._stamp(*tensors)

    def clear_cache(self) -> None:
        for module in self.modules():
            if isinstance(module, Remembering):
                module._last = None

    def condition(self, context: Tensor) -> Transform:
        """The transform at a context: a light ``Transform`` that shares the parameters. Unconditional transforms return themselves."""
        if self.context_dim == 0:
            return self
        self._check_context(context)
        return Conditioned(self, context)

    @property
    def inv(self) -> FlowTransform:
        """The inverse, as a module that shares the parameters; ``t.inv.inv is t``."""
        known: Any = self._inv
        return Inverse(self) if known is None else known

    def extra_repr(self) -> str:
        """``dim``, or the shape of points that are no vectors, and ``context_dim`` where there is one."""
        size = f"dim={self.dim}" if len(self.event_shape) == 1 else f"event_shape={tuple(self.event_shape)}"
        return size + (f", context_dim={self.context_dim}" if self.context_dim else "")

    __repr__ = nn.Module.__repr__


# Registered, not inherited: its metaclass would clash with PyroModule's (pyro.nn.module.to_pyro_module_).
ConditionalTransform.register(FlowTransform)


class Inverse(FlowTransform):
    """The inverse of a transform: owns the same parameters and shares its memory.

    Args:
        transform: the transform to invert.
    """

    transform: FlowTransform

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.event_shape, transform.context_dim)
        self.transform = transform
        transform.__dict__["_inv"] = self  # past nn.Module, which would take it for a part
        if transform.one_pass != "both":
            self.one_pass = "inverse" if transform.one_pass == "forward" else "forward"
        self.domain, self.codomain, self.manifold = transform.codomain, transform.domain, transform.manifold

    @property
    def layers(self) -> tuple[FlowTransform, ...]:
        inner = self.transform.layers
        return (self,) if inner == (self.transform,) else tuple(layer.inv for layer in reversed(inner))

    @property
    def ode(self) -> tuple[Any, bool] | None:
        inner = self.transform.ode
        return None if inner is None else (inner[0], not inner[1])

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.unchecked_inverse(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.unchecked_forward(y, context)

    def _call(self, x: Tensor) -> Tensor:
        return self.transform._inverse(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.transform._call(y)

    def inverse_and_forward_ladj(self, y: Tensor) -> tuple[Tensor, Tensor]:
        last = self.transform._remembered(x=y, result=y)
        x, ladj = self.transform.forward_and_ladj(y) if last is None else (last.y, last.ladj)
        return x, -ladj

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.transform.log_abs_det_jacobian(y, x)

    @property
    def inv(self) -> FlowTransform:
        return self.transform


class Conditioned(Remembering):
    """A transform bound to a context; it holds no parameters of its own.

    Args:
        transform: a conditional transform.
        context: tensor of shape ``(*batch, context_dim)``, whose batch the results take on; ``None`` for a transform without one.
    """

    def __init__(self, transform: FlowTransform, context: Tensor | None) -> None:
        super().__init__()
        self.transform, self.context, self.event_shape = transform, context, transform.event_shape
        self.domain, self.codomain, self.manifold, self.one_pass = transform.domain, transform.codomain, transform.manifold, transform.one_pass

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.forward_and_ladj(x, self.context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse_and_ladj(y, self.context)

    def _state(self) -> tuple[Tensor, ...]:
        own = self.transform._state()
        return own if self.context is None else (self.context, *own)

    def _stamp(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.transform._stamp(*tensors)

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the result: the point's, broadcast with the context's batch."""
        if self.context is None:
            return shape
        return self.transform._joint_batch(shape, self.context.shape) + shape[-len(self.event_shape) :]

    inverse_shape = forward_shape
