"""Affine layers with a triangular matrix: learned, and fixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from .linear import Linear, solve_rows, times, triangular, zeros

__all__ = ["TriangularLinear", "Standardize"]


class TriangularLinear(Linear):
    r"""A full-rank affine layer: :math:`y = L x + t`, with :math:`L` lower triangular and :math:`L_{ii} = e^{d_i} > 0`.

    The rows are scaled by their diagonal, :math:`L = \mathrm{diag}(e^{d}) (I + \mathrm{strictly\ lower}(M))`, so that one learning rate suits
    coordinates of any scale.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that all parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(D^2)` a point in both directions (a triangular solve back). Starts at the identity.

    Example:
        >>> TriangularLinear(2).weight()
        tensor([[1., 0.],
                [0., 1.]], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim, log_diag=zeros(dim), lower=zeros(dim, dim), shift=zeros(dim))

    def _matrix(self, at: Any) -> Tensor:
        return triangular(at.lower, at.log_diag)

    def _log_det(self, at: Any) -> Tensor:
        return at.log_diag.sum(-1)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return times(self._matrix(at), x)

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return solve_rows(self._matrix(at), y)


class Standardize(Linear):
    r"""A fixed affine layer: :math:`y = L x + t` with given :math:`t` and lower triangular :math:`L`; it has buffers, and nothing to learn.

    As the last layer of a flow it lets the layers before it work on standardised points, whatever the units of the target.

    Args:
        loc: :math:`t`, of shape ``(D,)``.
        scale_tril: :math:`L`, of shape ``(D, D)`` with a positive diagonal.

    Cost: :math:`O(D^2)` a point in both directions.

    Raises:
        ShapeError: the shapes do not agree, or the diagonal is not positive.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(self, loc: Tensor, scale_tril: Tensor) -> None:
        super().__init__(loc.shape[-1])
        self.register_buffer("loc", torch.empty_like(loc))
        self.register_buffer("scale_tril", torch.empty_like(scale_tril))
        self.set(loc, scale_tril)

    @torch.no_grad()
    def set(self, loc: Tensor, scale_tril: Tensor) -> None:
        """Replace ``loc`` and ``scale_tril`` in place."""
        if scale_tril.shape != (self.dim, self.dim) or loc.shape != (self.dim,):
            raise ShapeError(f"Standardize: expected loc ({self.dim},) and scale_tril ({self.dim}, {self.dim})")
        if not bool((scale_tril.diagonal() > 0).all()):
            raise ShapeError("Standardize: scale_tril must have a positive diagonal")
        self.loc.copy_(loc), self.scale_tril.copy_(scale_tril.tril())

    def _matrix(self, at: Any) -> Tensor:
        return self.scale_tril

    def _log_det(self, at: Any) -> Tensor:
        return self.scale_tril.diagonal().log().sum()

    def _offset(self, at: Any) -> Tensor:
        return self.loc

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return x @ self.scale_tril.mT

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return solve_rows(self.scale_tril, y)
