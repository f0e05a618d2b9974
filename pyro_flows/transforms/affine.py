"""The diagonal affine layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .linear import Linear, zeros

__all__ = ["Affine"]


class Affine(Linear):
    r"""Moves and scales every coordinate: :math:`y = e^{s} \odot x + t`.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that :math:`s` and :math:`t` may depend on (linearly); 0 for none.

    Cost: :math:`O(D)` in both directions. Domain: all of :math:`\mathbb{R}^D`. Starts at the identity.

    Example:
        >>> import torch
        >>> Affine(2)(torch.tensor([1.0, 2.0]))
        tensor([1., 2.], grad_fn=<AddBackward0>)
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim, log_scale=zeros(dim), shift=zeros(dim))

    def _matrix(self, at: Any) -> Tensor:
        return at.log_scale.exp().diag_embed()

    def _log_det(self, at: Any) -> Tensor:
        return at.log_scale.sum(-1)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return x * at.log_scale.exp()

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return y * (-at.log_scale).exp()
