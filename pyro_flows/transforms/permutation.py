"""A fixed reordering of the coordinates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from .linear import Linear

__all__ = ["Permutation"]


def check_order(order: Tensor, dim: int, what: str) -> Tensor:
    """``order``, where it holds each of ``0 .. dim-1`` once."""
    if order.shape != (dim,) or not torch.equal(order.sort().values.cpu(), torch.arange(dim)):
        raise ShapeError(f"{what} must hold each of 0..{dim - 1} once, got {order.tolist()}")
    return order


class Permutation(Linear):
    r"""Reorders the coordinates: :math:`y_i = x_{\pi(i)}`, with log-det 0.

    The order is fixed, since gradients cannot choose among permutations. To *learn* one, let a rotation start at it,
    ``Compose([Permutation.random(dim), OrthogonalLinear(dim)])``: through the orthogonal matrices, at log-det 0 all the way, it can turn into every
    order of the same parity, and into the others but for the sign of one coordinate. The result is a rotation close to an order, not an exact one.

    Args:
        order: the permutation :math:`\pi`, a tensor of the integers ``0 .. D-1``.

    Cost: :math:`O(D)` a point in both directions.

    Raises:
        ShapeError: ``order`` does not hold each of ``0 .. D-1`` once.

    Example:
        >>> import torch
        >>> Permutation(torch.tensor([2, 0, 1]))(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__(order.numel())
        self.register_buffer("order", check_order(order, order.numel(), "Permutation: order"))
        self.register_buffer("back", order.argsort())

    @classmethod
    def random(cls, dim: int, generator: torch.Generator | None = None) -> Permutation:
        """A permutation drawn uniformly, from ``generator`` or from torch's global one."""
        return cls(torch.randperm(dim, generator=generator))

    def _matrix(self, at: Any) -> Tensor:
        return torch.eye(self.dim, device=self.order.device)[self.order]

    def _log_det(self, at: Any) -> Tensor:
        return torch.zeros((), device=self.order.device)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return x.index_select(-1, self.order)

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return y.index_select(-1, self.back)

    # Neither a shift nor a dtype of its own: points keep theirs.
    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._multiply(self, x), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._solve(self, y), y.new_zeros(y.shape[:-1])
