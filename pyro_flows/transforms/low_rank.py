"""The low-rank linear layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import OptionError
from .linear import Linear, eye_like

__all__ = ["LowRankLinear"]


class LowRankLinear(Linear):
    r"""A scaled low-rank update: :math:`y = e^{s} \odot (I + Q\,\mathrm{diag}(e^{\lambda} - 1)\,Q^\top) x + t`, with orthonormal columns :math:`Q`.

    :math:`Q` is the QR factor of a free :math:`D \times r` matrix. Because the update is diagonal in :math:`Q`, Woodbury's identity is exact and
    explicit: the inverse has :math:`e^{-\lambda}` in place of :math:`e^{\lambda}`, and :math:`\log|\det| = \sum_i s_i + \sum_k \lambda_k`. The
    layer is invertible at every parameter value, unlike :math:`I + UV^\top`.

    Args:
        dim: number of coordinates :math:`D`.
        rank: rank :math:`r`, between 1 and ``dim``.

    Cost: :math:`O(Dr)` a point in both directions, and :math:`O(Dr^2)` once a call. Starts at the identity.
    """

    def __init__(self, dim: int, rank: int = 4) -> None:
        super().__init__(dim)
        if not 1 <= rank <= dim:
            raise OptionError(f"LowRankLinear: rank must lie between 1 and dim={dim}, got {rank}")
        self.rank = rank
        self.log_scale, self.shift = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))
        self.log_stretch, self.factor = nn.Parameter(torch.zeros(rank)), nn.Parameter(torch.randn(dim, rank) / dim**0.5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}"

    def _basis(self) -> Tensor:
        return torch.linalg.qr(self.factor).Q

    def weight(self) -> Tensor:
        q = self._basis()
        return self.log_scale.exp().unsqueeze(-1) * (eye_like(q.mT) + (q * self.log_stretch.expm1()) @ q.mT)

    def logabsdet(self) -> Tensor:
        return self.log_scale.sum() + self.log_stretch.sum()

    def _multiply(self, x: Tensor) -> Tensor:
        q = self._basis()
        return (x + ((x @ q) * self.log_stretch.expm1()) @ q.mT) * self.log_scale.exp()

    def _solve(self, y: Tensor) -> Tensor:
        q = self._basis()
        x = y * (-self.log_scale).exp()
        return x + ((x @ q) * (-self.log_stretch).expm1()) @ q.mT
