"""Affine layers with a triangular matrix: learned, and fixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from .base import FlowTransform

__all__ = ["TriangularLinear", "Standardize"]


def _apply(tril: Tensor, x: Tensor) -> Tensor:
    return x @ tril.mT


def _solve(tril: Tensor, y: Tensor) -> Tensor:
    """Solve ``tril x = y`` for row vectors ``y`` of shape ``(*batch, D)``."""
    flat = y.reshape(-1, y.shape[-1])
    return torch.linalg.solve_triangular(tril, flat.mT, upper=False).mT.reshape(y.shape)


class TriangularLinear(FlowTransform):
    r"""A full-rank affine layer: :math:`y = L x + t`, with :math:`L` lower triangular and :math:`L_{ii} = e^{d_i} > 0`.

    The rows are scaled by their diagonal, :math:`L = \mathrm{diag}(e^{d}) (I + \mathrm{strictly\ lower}(M))`, so that one learning rate suits
    coordinates of any scale.

    Args:
        dim: number of coordinates :math:`D`.

    Cost: :math:`O(D^2)` a point in both directions (a triangular solve back). Starts at the identity.

    Example:
        >>> TriangularLinear(2).weight()
        tensor([[1., 0.],
                [0., 1.]], grad_fn=<MulBackward0>)
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.log_diag, self.lower, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim, dim)), nn.Parameter(torch.zeros(dim))

    def weight(self) -> Tensor:
        """The matrix :math:`L`, of shape ``(D, D)``."""
        eye = torch.eye(self.dim, dtype=self.lower.dtype, device=self.lower.device)
        return self.log_diag.exp().unsqueeze(-1) * (self.lower.tril(-1) + eye)

    def logabsdet(self) -> Tensor:
        """:math:`\\log|\\det L|`, a scalar."""
        return self.log_diag.sum()

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _apply(self.weight(), x) + self.shift, self.logabsdet().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _solve(self.weight(), y - self.shift), -self.logabsdet().expand(y.shape[:-1])


class Standardize(FlowTransform):
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

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _apply(self.scale_tril, x) + self.loc, self.scale_tril.diagonal().log().sum().expand(x.shape[:-1])

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _solve(self.scale_tril, y - self.loc), -self.scale_tril.diagonal().log().sum().expand(y.shape[:-1])
