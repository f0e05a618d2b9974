"""Triangular factors."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["triangle"]


def triangle(rows: Tensor) -> Tensor:
    r"""The Cholesky factor of :math:`A A^\top` for ``A (*batch, d, k)`` of full row rank, without the product, which would square its condition.

    Example:
        >>> import torch
        >>> triangle(torch.tensor([[0.0, 2.0], [1.0, 1.0]])).round(decimals=4).tolist()
        [[2.0, 0.0], [1.0, 1.0]]
    """
    r = torch.linalg.qr(rows.mT).R
    return (r * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT
