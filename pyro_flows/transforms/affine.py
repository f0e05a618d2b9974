"""The diagonal affine layer."""

from __future__ import annotations

from torch import Tensor

from ..nets import Hypernetwork
from .linear import Linear

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
        super().__init__(dim, context_dim)
        self.params = Hypernetwork((2, dim), context_dim)

    def _log_scale(self, context: Tensor | None) -> Tensor:
        self._check_context(context)
        return self.params(context)[..., 0, :]

    def weight(self, context: Tensor | None = None) -> Tensor:
        """The diagonal matrix, of shape ``(*batch, D, D)`` for a context of shape ``(*batch, context_dim)``."""
        return self._log_scale(context).exp().diag_embed()

    def logabsdet(self, context: Tensor | None = None) -> Tensor:
        r""":math:`\log|\det W|`, of the context's batch shape."""
        return self._log_scale(context).sum(-1)

    def solve(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        """The ``x`` with :math:`W x = y` (no shift)."""
        y, context = self._check(y, context)
        return y * (-self._log_scale(context)).exp()

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.params(context).unbind(-2)
        return x * log_scale.exp() + shift, log_scale.sum(-1).expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.params(context).unbind(-2)
        return (y - shift) * (-log_scale).exp(), -log_scale.sum(-1).expand(y.shape[:-1])
