"""Triangular factors, and what they tell of a matrix."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["log_abs_det", "triangle"]


def log_abs_det(matrix: Tensor) -> Tensor:
    r""":math:`\log|\det A|` of square matrices ``(*batch, n, n)``, ``(*batch,)``, by the diagonal of their LU factors.

    ``torch.linalg.slogdet`` gives the same value, but under ``vmap`` a wrong forward derivative.

    Example:
        >>> import torch
        >>> round(log_abs_det(torch.tensor([[0.0, 2.0], [1.0, 5.0]])).item(), 4)
        0.6931
    """
    return torch.linalg.lu_factor_ex(matrix).LU.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1)


def triangle(rows: Tensor) -> Tensor:
    r"""The Cholesky factor of :math:`A A^\top` for ``A (*batch, d, k)`` of full row rank, without the product, which would square its condition.

    Example:
        >>> import torch
        >>> triangle(torch.tensor([[0.0, 2.0], [1.0, 1.0]])).round(decimals=4).tolist()
        [[2.0, 0.0], [1.0, 1.0]]
    """
    r = torch.linalg.qr(rows.mT).R
    return (r * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-1)).mT
