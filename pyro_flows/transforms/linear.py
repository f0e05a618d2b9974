"""What all linear layers share: a matrix that can be written out, solved with, and whose log-determinant is known."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from .base import FlowTransform

__all__ = ["Linear"]


def eye_like(matrix: Tensor) -> Tensor:
    """The identity of the last dimension's size, on the matrix's dtype and device."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def triangular(entries: Tensor, log_diag: Tensor | None = None, upper: bool = False) -> Tensor:
    """``diag(exp(log_diag)) (I + strict part of entries)``: each row in units of its diagonal; a unit triangle without ``log_diag``."""
    unit = (entries.triu(1) if upper else entries.tril(-1)) + eye_like(entries)
    return unit if log_diag is None else log_diag.exp().unsqueeze(-1) * unit


def times(matrix: Tensor, x: Tensor) -> Tensor:
    """Matrix times vector, ``(*batch, m, n), (*batch, n) -> (*batch, m)``; one matrix serves a whole batch in one product."""
    return x @ matrix.mT if matrix.dim() == 2 else torch.einsum("...ij,...j->...i", matrix, x)


def solve_rows(matrix: Tensor, y: Tensor, upper: bool = False) -> Tensor:
    """Solve ``matrix x = y`` for the rows of ``y``, with a triangular ``matrix``: ``(*batch, n, n), (*batch, n) -> (*batch, n)``."""
    points = y.dim() - matrix.dim() + 1  # batch dimensions that share a matrix
    if points < 0 or y.shape[points:] != matrix.shape[:-1]:
        return torch.linalg.solve_triangular(matrix, y.unsqueeze(-1), upper=upper).squeeze(-1)
    columns = y.reshape(math.prod(y.shape[:points]), *matrix.shape[:-1]).movedim(0, -1)
    return torch.linalg.solve_triangular(matrix, columns, upper=upper).movedim(-1, 0).reshape(y.shape)


def distinct(context: Tensor) -> Tensor:
    """A context without the batch dimensions along which it was only expanded: they have size 1, and are left out at the front."""
    for i, (size, stride) in enumerate(zip(context.shape[:-1], context.stride(), strict=False)):
        if size > 1 and stride == 0:
            context = context.narrow(i, 0, 1)
    while context.dim() > 1 and context.shape[0] == 1:
        context = context.squeeze(0)
    return context


class _At:
    """The parameters of a layer at a context, as attributes."""  # not types.SimpleNamespace, which torch.compile does not trace


def zeros(*shape: int) -> Tensor:
    """How a parameter starts; sizes that are none are refused here, where a layer's parameters are made before the layer."""
    if not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ShapeError(f"dim must be a positive integer: a parameter cannot have the shape {shape}")
    return torch.zeros(shape)


class Linear(FlowTransform):
    r"""The base of the linear layers, :math:`y = W x + t`.

    A subclass names its parameters and says, given them, how to multiply by :math:`W`, how to solve with it, and its log-determinant; both
    directions follow. Nothing is kept from one call to the next, so no factor is ever stale. With a context, each parameter is the free one plus a
    linear function of the context that starts at zero, and :math:`W` has the context's batch shape.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that the parameters may depend on (linearly); 0 for none.
        initial: the parameters by name, as they start.
    """

    shift: Tensor

    def __init__(self, dim: int, context_dim: int = 0, **initial: Tensor) -> None:
        super().__init__(dim, context_dim)
        for name, value in initial.items():
            self.register_parameter(name, nn.Parameter(value))
        self._shapes = {name: value.shape for name, value in initial.items()}
        self.by_context = nn.Linear(context_dim, sum(map(math.prod, self._shapes.values())), bias=False) if context_dim else None
        if self.by_context is not None:
            nn.init.zeros_(self.by_context.weight)

    def _at(self, context: Tensor | None) -> Any:
        """What has the parameters as attributes: the layer itself or, at a context, the values there, ``(*batch, *shape)``."""
        if self.by_context is None or context is None:
            return self
        moves = self.by_context(context).split([math.prod(shape) for shape in self._shapes.values()], -1)
        batch, at = context.shape[:-1], _At()
        for (name, shape), move in zip(self._shapes.items(), moves, strict=True):
            setattr(at, name, getattr(self, name) + move.reshape(batch + shape))
        return at

    def _at_points(self, context: Tensor | None) -> Any:
        """:meth:`_at`, where the context has been repeated for points that share it: each matrix is made once all the same."""
        return self._at(None if context is None else distinct(context))

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _log_det(self, at: Any) -> Tensor:
        raise NotImplementedError

    def _matrix(self, at: Any) -> Tensor:
        shift = self._offset(at)
        batch, units = shift.shape[:-1], eye_like(shift)
        if not batch:
            return self._multiply(at, units).mT
        units = units.view(self.dim, *(1 for _ in batch), self.dim).expand(self.dim, *batch, self.dim)
        return self._multiply(at, units).movedim(0, -1)

    def _offset(self, at: Any) -> Tensor:
        return at.shift

    def _asked(self, context: Tensor | None) -> Any:
        self._check_context(context)
        return self._at(context)

    def logabsdet(self, context: Tensor | None = None) -> Tensor:
        r""":math:`\log|\det W|`, a scalar or of the context's batch shape."""
        return self._log_det(self._asked(context))

    def weight(self, context: Tensor | None = None) -> Tensor:
        """The matrix :math:`W`, of shape ``(D, D)``, or ``(*batch, D, D)`` for a context of shape ``(*batch, context_dim)``."""
        return self._matrix(self._asked(context))

    def solve(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The ``x`` with :math:`W x = y` (no shift), ``y``'s batch and the context's broadcast; raises as a call with ``y`` does."""
        y, context = self._check(y, context)
        return self._solve(self._at_points(context), y)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        at = self._at_points(context)
        return self._multiply(at, x) + self._offset(at), self._log_det(at).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        at = self._at_points(context)
        return self._solve(at, y - self._offset(at)), -self._log_det(at).expand(y.shape[:-1])
