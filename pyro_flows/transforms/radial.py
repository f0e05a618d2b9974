"""The radial flow, inverted."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nets import Hypernetwork
from .base import FlowTransform
from .planar import MIN_SLOPE, above_minus_one

__all__ = ["Radial"]


class Radial(FlowTransform):
    r"""Pushes points away from a centre, or pulls them to it: :math:`y = x + \frac{\gamma\alpha}{\alpha + r}(x - c)`, with :math:`r = \|x - c\|`.

    :math:`\alpha > 0` is the radius at which the effect has halved, and :math:`\gamma = \beta/\alpha > -1` its size at the centre: there all lengths
    change by the factor :math:`1 + \gamma`. Far away every point moves by nearly :math:`\beta`. Along each ray :math:`r' = r + \beta r/(\alpha + r)`,
    a quadratic equation in :math:`r` with one positive root, so both directions are formulas;
    :math:`\log|\det| = (D - 1)\log(1 + \frac{\beta}{\alpha + r}) + \log(1 + \frac{\beta\alpha}{(\alpha + r)^2})`.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that :math:`\alpha, \beta, c` may depend on (linearly); 0 for none.

    Cost: :math:`O(D)` a point in both directions. Domain: all of :math:`\mathbb{R}^D`. Starts at the identity, with :math:`\alpha = \sqrt{D}`.

    Reference: Variational inference with normalizing flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        self.params = Hypernetwork((dim + 2,), context_dim)

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The centre, ``alpha`` and ``beta``; the latter two with a last dimension of one."""
        centre, raw_alpha, raw_gamma = self.params(context).split([self.dim, 1, 1], -1)
        alpha = math.sqrt(self.dim) * (F.softplus(raw_alpha + math.log(math.expm1(1 - MIN_SLOPE))) + MIN_SLOPE)
        return centre, alpha, alpha * above_minus_one(raw_gamma)

    def _ladj(self, r: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        pull = beta / (alpha + r)
        return ((self.dim - 1) * pull.log1p() + (pull * alpha / (alpha + r)).log1p()).squeeze(-1)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._parts(context)
        r = torch.linalg.vector_norm(x - centre, dim=-1, keepdim=True)
        return x + beta / (alpha + r) * (x - centre), self._ladj(r, alpha, beta)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._parts(context)
        s = torch.linalg.vector_norm(y - centre, dim=-1, keepdim=True)
        # The positive root of r^2 + p r - alpha s = 0, by the form that does not cancel.
        p = alpha + beta - s
        root = (p * p + 4 * alpha * s).sqrt()
        r = torch.where(p > 0, 2 * alpha * s / (root + p.abs()), (root + p.abs()) / 2)
        return centre + (alpha + r) / (alpha + beta + r) * (y - centre), -self._ladj(r, alpha, beta)
