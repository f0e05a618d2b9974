"""Linear layers by their LU factors: one full matrix, or blocks along the diagonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .linear import Linear, solve_rows, triangular
from .permutation import check_order

__all__ = ["LULinear", "BlockDiagonalLinear"]


class _LU(Linear):
    """Holds the factors ``L`` and ``U`` of a matrix or of a stack of them, of shape ``(*blocks, size, size)``."""

    def __init__(self, dim: int, *shape: int) -> None:
        super().__init__(dim)
        self.lower, self.upper = nn.Parameter(torch.zeros(*shape, shape[-1])), nn.Parameter(torch.zeros(*shape, shape[-1]))
        self.log_diag, self.shift = nn.Parameter(torch.zeros(*shape)), nn.Parameter(torch.zeros(dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        return triangular(self.lower), triangular(self.upper, self.log_diag, upper=True)

    def _product(self) -> Tensor:
        lower, upper = self._factors()
        return lower @ upper

    def _back(self, y: Tensor) -> Tensor:
        lower, upper = self._factors()
        return solve_rows(upper, solve_rows(lower, y), upper=True)

    def logabsdet(self) -> Tensor:
        return self.log_diag.sum()


class LULinear(_LU):
    r"""A general linear layer: :math:`y = P L U x + t`, with a fixed permutation :math:`P`, unit lower :math:`L` and upper :math:`U`.

    The diagonal of :math:`U` is :math:`e^{d}`, so the layer is always invertible and :math:`\log|\det| = \sum_i d_i`; the sign of the determinant
    is that of :math:`P`.

    Args:
        dim: number of coordinates :math:`D`.
        permutation: the fixed permutation, a tensor of the integers ``0 .. D-1``; the identity when omitted.

    Cost: :math:`O(D^2)` a point in both directions (two triangular solves back), and :math:`O(D^3)` once a call forward, to multiply the factors.
    Starts at the permutation alone.

    Raises:
        ShapeError: ``permutation`` does not hold each of ``0 .. D-1`` once.

    Reference: Glow: generative flow with invertible 1x1 convolutions (Kingma & Dhariwal, 2018), https://arxiv.org/abs/1807.03039
    """

    order: Tensor

    def __init__(self, dim: int, permutation: Tensor | None = None) -> None:
        super().__init__(dim, dim)
        order = torch.arange(dim) if permutation is None else permutation
        self.register_buffer("order", check_order(order, dim, "LULinear: permutation"))

    def weight(self) -> Tensor:
        return self._product()[self.order]

    def _multiply(self, x: Tensor) -> Tensor:
        return x @ self.weight().mT

    def _solve(self, y: Tensor) -> Tensor:
        return self._back(y[..., self.order.argsort()])


class BlockDiagonalLinear(_LU):
    r"""Mixes the coordinates within consecutive blocks: :math:`y = \mathrm{diag}(L_1 U_1, \dots, L_B U_B)\, x + t`.

    The blocks hold :math:`c` coordinates each; a :class:`Permutation` before the layer decides who is together. As in :class:`LULinear`, the
    diagonals of the :math:`U_b` are positive, so every block is invertible.

    Args:
        dim: number of coordinates :math:`D`.
        block_size: coordinates a block, :math:`c`, a divisor of ``dim``.

    Cost: :math:`O(Dc)` a point in both directions, and :math:`O(Dc^2)` once a call. Starts at the identity.

    Raises:
        OptionError: ``block_size`` does not divide ``dim``.

    Example:
        >>> BlockDiagonalLinear(6, block_size=2).lower.shape
        torch.Size([3, 2, 2])
    """

    def __init__(self, dim: int, block_size: int) -> None:
        if not isinstance(block_size, int) or block_size < 1 or dim % block_size:
            raise OptionError(f"BlockDiagonalLinear: block_size must divide dim={dim}, got {block_size!r}")
        super().__init__(dim, dim // block_size, block_size)
        self.block_size = block_size

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, block_size={self.block_size}"

    def weight(self) -> Tensor:
        return torch.block_diag(*self._product())

    def _multiply(self, x: Tensor) -> Tensor:
        return (self._product() @ x.unflatten(-1, self.log_diag.shape).unsqueeze(-1)).squeeze(-1).flatten(-2)

    def _solve(self, y: Tensor) -> Tensor:
        return self._back(y.unflatten(-1, self.log_diag.shape)).flatten(-2)
