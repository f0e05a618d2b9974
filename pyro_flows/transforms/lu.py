"""Linear layers by their LU factors: one full matrix, or blocks along the diagonal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .linear import Linear, solve_rows, times, triangular
from .permutation import check_order

__all__ = ["LULinear", "BlockDiagonalLinear"]


class _LU(Linear):
    """Holds the factors ``L`` and ``U`` of a matrix or of a stack of them, of shape ``(*blocks, size, size)``."""

    def __init__(self, dim: int, context_dim: int, *shape: int) -> None:
        square = (*shape, shape[-1])
        super().__init__(dim, context_dim, lower=torch.zeros(square), upper=torch.zeros(square), log_diag=torch.zeros(shape), shift=torch.zeros(dim))

    def _factors(self, at: Any) -> tuple[Tensor, Tensor]:
        return triangular(at.lower), triangular(at.upper, at.log_diag, upper=True)

    def _product(self, at: Any) -> Tensor:
        lower, upper = self._factors(at)
        return lower @ upper

    def _back(self, at: Any, y: Tensor) -> Tensor:
        lower, upper = self._factors(at)
        return solve_rows(upper, solve_rows(lower, y), upper=True)

    def _log_det(self, at: Any) -> Tensor:
        return at.log_diag.sum(-1)


class LULinear(_LU):
    r"""A general linear layer: :math:`y = P L U x + t`, with a fixed permutation :math:`P`, unit lower :math:`L` and upper :math:`U`.

    The diagonal of :math:`U` is :math:`e^{d}`, so the layer is always invertible and :math:`\log|\det| = \sum_i d_i`; the sign of the determinant
    is that of :math:`P`.

    Args:
        dim: number of coordinates :math:`D`.
        permutation: the fixed permutation, a tensor of the integers ``0 .. D-1``; the identity when omitted.
        context_dim: size of the context that all parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(D^2)` a point in both directions (two triangular solves back), and :math:`O(D^3)` once a call (a context) forward, to
    multiply the factors. Starts at the permutation alone.

    Raises:
        ShapeError: ``permutation`` does not hold each of ``0 .. D-1`` once.

    Reference: Glow: generative flow with invertible 1x1 convolutions (Kingma & Dhariwal, 2018), https://arxiv.org/abs/1807.03039
    """

    order: Tensor

    def __init__(self, dim: int, permutation: Tensor | None = None, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim, dim)
        order = torch.arange(dim) if permutation is None else permutation
        self.register_buffer("order", check_order(order, dim, "LULinear: permutation"))

    def _matrix(self, at: Any) -> Tensor:
        return self._product(at).index_select(-2, self.order)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return times(self._matrix(at), x)

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return self._back(at, y[..., self.order.argsort()])


class BlockDiagonalLinear(_LU):
    r"""Mixes the coordinates within consecutive blocks: :math:`y = \mathrm{diag}(L_1 U_1, \dots, L_B U_B)\, x + t`.

    The blocks hold :math:`c` coordinates each; a :class:`Permutation` before the layer decides who is together. As in :class:`LULinear`, the
    diagonals of the :math:`U_b` are positive, so every block is invertible.

    Args:
        dim: number of coordinates :math:`D`.
        block_size: coordinates a block, :math:`c`, a divisor of ``dim``.
        context_dim: size of the context that all parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(Dc)` a point in both directions, and :math:`O(Dc^2)` once a call (a context). Starts at the identity.

    Raises:
        OptionError: ``block_size`` does not divide ``dim``.

    Example:
        >>> BlockDiagonalLinear(6, block_size=2).lower.shape
        torch.Size([3, 2, 2])
    """

    def __init__(self, dim: int, block_size: int, context_dim: int = 0) -> None:
        if not isinstance(block_size, int) or block_size < 1 or dim % block_size:
            raise OptionError(f"BlockDiagonalLinear: block_size must divide dim={dim}, got {block_size!r}")
        super().__init__(dim, context_dim, dim // block_size, block_size)
        self.block_size = block_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}"

    def _log_det(self, at: Any) -> Tensor:
        return super()._log_det(at).sum(-1)

    def _matrix(self, at: Any) -> Tensor:
        blocks = self._product(at).movedim(-3, -1).diag_embed(dim1=-4, dim2=-2)  # (..., block, row, block, column)
        return blocks.flatten(-2).flatten(-3, -2)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return (self._product(at) @ x.unflatten(-1, self.log_diag.shape).unsqueeze(-1)).squeeze(-1).flatten(-2)

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return self._back(at, y.unflatten(-1, self.log_diag.shape)).flatten(-2)
