"""A transform of any make, copied into another precision and made two plain functions of rows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from pyro.distributions.conditional import ConditionalTransform
from pyro.distributions.util import sum_rightmost
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform
from torch.distributions.transforms import _InverseTransform
from torch.overrides import TorchFunctionMode

from ..transforms import FlowTransform

__all__ = ["Copy", "Stock"]

Stock: TypeAlias = Any  # a Transform or a ConditionalTransform, whose module counts as untyped


class _Casting(TorchFunctionMode):
    """Under it, ``copy.deepcopy`` casts floating tensors, wherever an object keeps them: as parameters, attributes or bound arguments."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:  # of plain tensors, results of a graph among them, which torch itself refuses to copy
            source, memo = args
            return memo.setdefault(id(source), self._cast(source.detach().clone()))
        result = func(*args, **(kwargs or {}))
        return self._cast(result) if func is Tensor.clone else result  # Parameter.__deepcopy__ clones its data


def _copied(transform: Stock, dtype: torch.dtype) -> Stock:
    if isinstance(transform, _InverseTransform):  # torch's copy of one forgets what it inverts
        return _copied(transform.inv, dtype).inv
    if isinstance(transform, ComposeTransform):
        return ComposeTransform([_copied(part, dtype) for part in transform.parts])
    with _Casting(dtype):
        return copy.deepcopy(transform)


def _modules(transform: Any) -> Iterator[nn.Module]:
    if isinstance(transform, nn.Module):
        yield transform
    elif isinstance(transform, _InverseTransform):
        yield from _modules(transform.inv)
    elif isinstance(transform, ComposeTransform):
        for part in transform.parts:
            yield from _modules(part)


class Copy:
    """A transform in ``dtype`` and in eval mode, which shares nothing with the one given.

    Args:
        transform: a ``FlowTransform``, or any of torch's or Pyro's, conditional ones included.
        dtype: the precision of the copy.

    ``forward(x, context)`` and ``inverse(y, context)`` take rows and give rows and a log-det each, never from a cache.
    """

    def __init__(self, transform: Stock, dtype: torch.dtype) -> None:
        self.transform, self.dtype = _copied(transform, dtype), dtype
        for module in _modules(self.transform):
            module.eval()

    @contextmanager
    def _default(self) -> Iterator[None]:
        """Its dtype as the default one: some of Pyro's inverses start from ``torch.zeros``."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def _at(self, context: Tensor | None) -> Transform:
        return self.transform if context is None else self.transform.condition(context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``f(x)`` and its log-det."""
        if isinstance(self.transform, FlowTransform):
            return self.transform.forward_and_ladj(x, context)
        with self._default():
            t, x = self._at(context), x.view_as(x)  # another object: stock caches go by identity
            y = t(x)
            return y, self._row(t, t.log_abs_det_jacobian(x, y), len(x))

    def inverse(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The inverse at ``y`` and its log-det."""
        if isinstance(self.transform, FlowTransform):
            return self.transform.inverse_and_ladj(y, context)
        with self._default():
            t, y = self._at(context), y.view_as(y)
            x = t.inv(y).clone()
            return x, -self._row(t, t.log_abs_det_jacobian(x, y), len(y))

    def inside(self, points: Tensor, codomain: bool = False) -> Tensor:
        """Which rows lie in the domain (or codomain)."""
        if isinstance(self.transform, ConditionalTransform):
            return torch.isfinite(points).all(-1)
        support = self.transform.codomain if codomain else self.transform.domain
        inside = support.check(points)
        return inside.all(-1) if inside.dim() == points.dim() else inside

    @staticmethod
    def _row(t: Transform, ladj: Tensor, rows: int) -> Tensor:
        return sum_rightmost(ladj, 1 - t.domain.event_dim).expand(rows)
