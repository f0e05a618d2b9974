"""What all linear layers share: a matrix that can be written out, solved with, and whose log-determinant is known."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import FlowTransform

__all__ = ["Linear"]


def eye_like(matrix: Tensor) -> Tensor:
    """The identity of the last dimension's size, on the matrix's dtype and device."""
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)


def triangular(entries: Tensor, log_diag: Tensor | None = None, upper: bool = False) -> Tensor:
    """``diag(exp(log_diag)) (I + strict part of entries)``: each row in units of its diagonal; a unit triangle without ``log_diag``."""
    unit = (entries.triu(1) if upper else entries.tril(-1)) + eye_like(entries)
    return unit if log_diag is None else log_diag.exp().unsqueeze(-1) * unit


def solve_rows(matrix: Tensor, y: Tensor, upper: bool = False) -> Tensor:
    """Solve ``matrix x = y`` for the rows of ``y``, ``(*batch, *blocks, D)``, where the triangular ``matrix`` is ``(*blocks, D, D)``."""
    columns = y.reshape(-1, *matrix.shape[:-1]).movedim(0, -1)
    return torch.linalg.solve_triangular(matrix, columns, upper=upper).movedim(-1, 0).reshape(y.shape)


class Linear(FlowTransform):
    r"""The base of the linear layers, :math:`y = W x + t`.

    A subclass says how to multiply by :math:`W`, how to solve with it, and its log-determinant; both directions follow. Nothing is kept from one
    call to the next, so no factor is ever stale.
    """

    shift: Tensor

    def _multiply(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _solve(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def _offset(self) -> Tensor:
        return self.shift

    def logabsdet(self) -> Tensor:
        r""":math:`\log|\det W|`, a scalar."""
        raise NotImplementedError

    def weight(self) -> Tensor:
        """The matrix :math:`W`, of shape ``(D, D)``."""
        return self._multiply(eye_like(self._offset())).mT

    def solve(self, y: Tensor) -> Tensor:
        """The ``x`` with :math:`W x = y` (no shift), of ``y``'s shape ``(*batch, D)``; raises as a call with ``y`` does."""
        return self._solve(self._check(y, None)[0])

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._multiply(x) + self._offset(), self.logabsdet().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(y - self._offset()), -self.logabsdet().expand(y.shape[:-1])
