"""The low-rank linear layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError
from .linear import Linear, eye_like, times

__all__ = ["LowRankLinear"]


class LowRankLinear(Linear):
    r"""A scaled low-rank update: :math:`y = e^{s} \odot (I + Q\,\mathrm{diag}(e^{\lambda} - 1)\,Q^\top) x + t`, with orthonormal columns :math:`Q`.

    :math:`Q` is the QR factor of a free :math:`D \times r` matrix. Because the update is diagonal in :math:`Q`, Woodbury's identity is exact and
    explicit: the inverse has :math:`e^{-\lambda}` in place of :math:`e^{\lambda}`, and :math:`\log|\det| = \sum_i s_i + \sum_k \lambda_k`. The
    layer is invertible at every parameter value, unlike :math:`I + UV^\top`.

    Args:
        dim: number of coordinates :math:`D`.
        rank: rank :math:`r`, between 1 and ``dim``.
        context_dim: size of the context that all parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(Dr)` a point in both directions, and :math:`O(Dr^2)` once a call (a context). Starts at the identity.
    """

    def __init__(self, dim: int, rank: int = 4, context_dim: int = 0) -> None:
        if not isinstance(rank, int) or not 1 <= rank <= dim:
            raise OptionError(f"LowRankLinear: rank must lie between 1 and dim={dim}, got {rank!r}")
        super().__init__(
            dim,
            context_dim,
            log_scale=torch.zeros(dim),
            shift=torch.zeros(dim),
            log_stretch=torch.zeros(rank),
            factor=torch.randn(dim, rank) / dim**0.5,
        )
        self.rank = rank

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def _basis(self, at: Any) -> Tensor:
        return torch.linalg.qr(at.factor).Q

    def _matrix(self, at: Any) -> Tensor:
        q = self._basis(at)
        return at.log_scale.exp().unsqueeze(-1) * (eye_like(q.mT) + (q * at.log_stretch.expm1().unsqueeze(-2)) @ q.mT)

    def _log_det(self, at: Any) -> Tensor:
        return at.log_scale.sum(-1) + at.log_stretch.sum(-1)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        q = self._basis(at)
        return (x + times(q, times(q.mT, x) * at.log_stretch.expm1())) * at.log_scale.exp()

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        q = self._basis(at)
        x = y * (-at.log_scale).exp()
        return x + times(q, times(q.mT, x) * (-at.log_stretch).expm1())
