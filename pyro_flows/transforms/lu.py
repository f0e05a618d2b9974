"""The LU-factored linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from .base import FlowTransform
from .triangular import _apply, _solve

__all__ = ["LULinear"]


class LULinear(FlowTransform):
    r"""A general linear layer: :math:`y = P L U x + t`, with a fixed permutation :math:`P`, unit lower :math:`L` and upper :math:`U`.

    The diagonal of :math:`U` is :math:`e^{d}`, so the layer is always invertible and :math:`\log|\det| = \sum_i d_i`; the sign of the determinant
    is that of :math:`P`.

    Args:
        dim: number of coordinates :math:`D`.
        permutation: the fixed permutation, a tensor of the integers ``0 .. D-1``; the identity when omitted.

    Cost: :math:`O(D^2)` a point in both directions (two triangular solves back). Starts at the permutation alone.

    Reference: Glow: generative flow with invertible 1x1 convolutions (Kingma & Dhariwal, 2018), https://arxiv.org/abs/1807.03039
    """

    order: Tensor

    def __init__(self, dim: int, permutation: Tensor | None = None) -> None:
        super().__init__(dim)
        order = torch.arange(dim) if permutation is None else permutation
        if order.shape != (dim,) or not torch.equal(order.sort().values.cpu(), torch.arange(dim)):
            raise ShapeError(f"LULinear: permutation must hold each of 0..{dim - 1} once, got {order.tolist()}")
        self.register_buffer("order", order)
        self.lower, self.upper = nn.Parameter(torch.zeros(dim, dim)), nn.Parameter(torch.zeros(dim, dim))
        self.log_diag, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def _factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(self.dim, dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + eye, self.log_diag.exp().unsqueeze(-1) * (self.upper.triu(1) + eye)

    def weight(self) -> Tensor:
        """The matrix :math:`P L U`, of shape ``(D, D)``."""
        lower, upper = self._factors()
        return (lower @ upper)[self.order]

    def logabsdet(self) -> Tensor:
        """:math:`\\log|\\det|`, a scalar."""
        return self.log_diag.sum()

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _apply(self.weight(), x) + self.shift, self.logabsdet().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower, upper = self._factors()
        z = _solve(lower, (y - self.shift)[..., self.order.argsort()])
        flat = torch.linalg.solve_triangular(upper, z.reshape(-1, self.dim).mT, upper=True).mT
        return flat.reshape(y.shape), -self.logabsdet().expand(y.shape[:-1])
