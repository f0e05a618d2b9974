"""A fixed reordering of the coordinates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ShapeError
from .base import FlowTransform

__all__ = ["Permutation"]


class Permutation(FlowTransform):
    r"""Reorders the coordinates: :math:`y_i = x_{\pi(i)}`, with log-det 0.

    Args:
        order: the permutation :math:`\pi`, a tensor of the integers ``0 .. D-1`` (``torch.randperm(dim)``, say).

    Cost: :math:`O(D)` in both directions.

    Example:
        >>> import torch
        >>> Permutation(torch.tensor([2, 0, 1]))(torch.tensor([10.0, 20.0, 30.0]))
        tensor([30., 10., 20.])
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Tensor) -> None:
        super().__init__(order.numel())
        if order.dim() != 1 or not torch.equal(order.sort().values.cpu(), torch.arange(self.dim)):
            raise ShapeError(f"Permutation: order must hold each of 0..{self.dim - 1} once, got {order.tolist()}")
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(-1, self.order), x.new_zeros(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return y.index_select(-1, self.back), y.new_zeros(y.shape[:-1])
