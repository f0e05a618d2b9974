"""Sylvester flows, with the right determinant, and inverted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError
from ..nets import Hypernetwork
from .base import FlowTransform
from .linear import times
from .planar import above_minus_one, unbend

__all__ = ["Sylvester"]


class Sylvester(FlowTransform):
    r"""Bends space along several directions at once: :math:`y = x + Q R \tanh(S Q^\top x + b)`.

    :math:`Q` has :math:`M` orthonormal columns, :math:`R` and :math:`S` are upper triangular. By Sylvester's identity
    :math:`\log|\det| = \sum_i \log(1 + R_{ii} S_{ii} \tanh'(a_i))` with :math:`a = S Q^\top x + b`, and the map is invertible where every
    :math:`R_{ii} S_{ii} > -1`, which the parametrisation ensures. In the basis :math:`Q` the way back is triangular: from the last coordinate to the
    first, each is one scalar equation, the planar flow's.

    Args:
        dim: number of coordinates :math:`D`.
        rank: number of directions :math:`M`, between 1 and ``dim``; ``dim`` when omitted.
        context_dim: size of the context that :math:`R, S, b` and :math:`Q` may depend on (linearly); 0 for none.
        basis: how :math:`Q` is made: ``"orthogonal"`` (Gram-Schmidt of a free :math:`D \times M` matrix), ``"householder"`` (the first :math:`M`
            columns of :math:`M` reflections) or ``"triangular"`` (the first :math:`M` coordinates themselves: stacks put permutations between).

    Cost: :math:`O(DM + M^2)` a point in both directions, the way back in :math:`M` dependent steps; :math:`Q` costs :math:`O(DM^2)`, once a call or,
    with a context, once a point. Domain: all of :math:`\mathbb{R}^D`. Starts at the identity.

    Raises:
        OptionError: a rank outside ``1 .. dim``, or an unknown basis.

    Reference: Sylvester normalizing flows for variational inference (van den Berg et al., 2018), https://arxiv.org/abs/1803.05649
    """

    one_pass = "forward"

    def __init__(
        self,
        dim: int,
        rank: int | None = None,
        context_dim: int = 0,
        basis: Literal["orthogonal", "householder", "triangular"] = "orthogonal",
    ) -> None:
        super().__init__(dim, context_dim)
        rank = dim if rank is None else rank
        if not isinstance(rank, int) or not 1 <= rank <= dim:
            raise OptionError(f"Sylvester: rank must lie between 1 and dim={dim}, got {rank!r}")
        if basis not in ("orthogonal", "householder", "triangular"):
            raise OptionError(f'Sylvester: basis must be "orthogonal", "householder" or "triangular", got {basis!r}')
        self.rank, self.basis = rank, basis
        self.params = Hypernetwork((2 * rank + 3, rank), context_dim)
        self.frame = None if basis == "triangular" else Hypernetwork((dim, rank), context_dim)
        if self.frame is not None:
            torch.nn.init.normal_(self.frame.bias, std=dim**-0.5)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={self.rank}, basis={self.basis!r}"

    def _basis(self, context: Tensor | None, like: Tensor) -> Tensor:
        """:math:`Q`, of shape ``(..., D, M)``."""
        if self.frame is None:
            return torch.eye(self.dim, self.rank, dtype=like.dtype, device=like.device)
        frame = self.frame(context)
        if self.basis == "orthogonal":
            q, r = torch.linalg.qr(frame)
            # Columns in the direction of what they came from: LAPACK's signs jump where an entry passes zero.
            return q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype).unsqueeze(-2)
        q = torch.eye(self.dim, self.rank, dtype=like.dtype, device=like.device)
        for v in F.normalize(frame, dim=-2).unbind(-1):
            q = q - 2 * v.unsqueeze(-1) * (v.unsqueeze(-2) @ q)
        return q

    def _parts(self, context: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """``Q, R, S, b`` and the products of the diagonals of ``R`` and ``S``."""
        m = self.rank
        upper_r, upper_s, vectors = self.params(context).split([m, m, 3], -2)
        raw, log_s, b = vectors.unbind(-2)
        rho, s = above_minus_one(raw), log_s.tanh().exp()  # only rho bends: s shares it between the two factors
        r_matrix = upper_r.triu(1) + (rho / s).diag_embed()
        return self._basis(context, like), r_matrix, upper_s.triu(1) + s.diag_embed(), b, rho

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, r, s, b, rho = self._parts(context, x)
        h = (times(s, times(q.mT, x)) + b).tanh()
        return x + times(q, times(r, h)), (rho * (1 - h * h)).log1p().sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, r, s, b, rho = self._parts(context, y)
        rest = times(q.mT, y)  # of z + R h once the terms of the known coordinates are taken away
        offset = b.expand(rest.shape)  # of a = S z + b, those terms added
        bent = []
        for i in reversed(range(self.rank)):
            h = unbend(s[..., i, i] * rest[..., i] + offset[..., i], rho[..., i]).tanh()
            z = rest[..., i] - r[..., i, i] * h
            bent.append(h)
            rest = rest - r[..., :, i] * h.unsqueeze(-1)
            offset = offset + s[..., :, i] * z.unsqueeze(-1)
        h = torch.stack(bent[::-1], -1)
        return y - times(q, times(r, h)), -(rho * (1 - h * h)).log1p().sum(-1)
