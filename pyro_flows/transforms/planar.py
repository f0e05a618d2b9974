"""The planar flow, inverted."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import OptionError
from ..nets import Hypernetwork
from ..numerics import invert_monotone
from .base import FlowTransform

__all__ = ["Planar"]

MIN_SLOPE = 1e-3  # of the scalar maps that decide whether these transforms invert
_LEAK = 0.01  # slope of the leaky ReLU below zero


def above_minus_one(raw: Tensor) -> Tensor:
    """Increasing, the identity above zero and at least ``MIN_SLOPE - 1`` everywhere: what keeps ``1 + w·u`` positive."""
    return F.celu(raw, 1 - MIN_SLOPE)


def _bent(a: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    h = a.tanh()
    return a + rho * h, (rho * (1 - h * h)).log1p()


def unbend(bent: Tensor, rho: Tensor) -> Tensor:
    """The ``a`` at which ``a + rho tanh(a)`` is ``bent``."""
    return invert_monotone(_bent, bent, rho.expand_as(bent))


class Planar(FlowTransform):
    r"""Bends space along one direction: :math:`y = x + \hat u\, h(w^\top x + b)`.

    Both ways need only the scalar :math:`a = w^\top x + b`, since :math:`w^\top y + b = a + \rho h(a)` with :math:`\rho = w^\top \hat u`, and
    :math:`\log|\det| = \log(1 + \rho h'(a))`. The map is invertible where :math:`\rho > -1`, so :math:`u` is moved along :math:`w` to
    :math:`\hat u`, with :math:`\rho = w^\top u` where that is positive and :math:`\rho` between -0.999 and 0 elsewhere.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that :math:`u, w, b` may depend on (linearly); 0 for none.
        activation: :math:`h`, ``"tanh"`` (smooth; a bend of limited height) or ``"leaky_relu"`` (two half-spaces, each mapped linearly).

    Cost: :math:`O(D)` a point in both directions; the way back of tanh solves one scalar equation, that of leaky ReLU has a formula. Domain: all of
    :math:`\mathbb{R}^D`. Starts at the identity.

    Raises:
        OptionError: an unknown activation.

    Reference: Variational inference with normalizing flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770
    """

    def __init__(self, dim: int, context_dim: int = 0, activation: Literal["tanh", "leaky_relu"] = "tanh") -> None:
        super().__init__(dim, context_dim)
        if activation not in ("tanh", "leaky_relu"):
            raise OptionError(f'Planar: activation must be "tanh" or "leaky_relu", got {activation!r}')
        self.activation = activation
        self.one_pass = "forward" if activation == "tanh" else "both"
        self.params = Hypernetwork((2 * dim + 1,), context_dim)
        with torch.no_grad():
            self.params.bias[:dim] = torch.randn(dim) / dim**0.5

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``w``, the moved ``u``, ``b`` and ``rho``."""
        w, u, b = self.params(context).split([self.dim, self.dim, 1], -1)
        wu, ww = (w * u).sum(-1, keepdim=True), (w * w).sum(-1, keepdim=True)
        rho = above_minus_one(wu)
        # celu(z) - z is of second order in z, so the move vanishes with w, and the small number only keeps 0 / 0 away.
        u = u + (rho - wu) / (ww + torch.finfo(w.dtype).tiny ** 0.5) * w
        return w, u, b.squeeze(-1), rho.squeeze(-1)

    def _bend(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """``h(a)`` and its slope."""
        if self.activation == "tanh":
            h = a.tanh()
            return h, 1 - h * h
        slope = torch.where(a < 0, _LEAK, 1.0).to(a.dtype)
        return a * slope, slope

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, u, b, rho = self._parts(context)
        h, slope = self._bend((w * x).sum(-1) + b)
        return x + u * h.unsqueeze(-1), (rho * slope).log1p()

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w, u, b, rho = self._parts(context)
        bent = (w * y).sum(-1) + b
        if self.activation == "tanh":
            a = unbend(bent, rho)
        else:  # of the sign of what it became
            a = bent / (1 + rho * torch.where(bent < 0, _LEAK, 1.0).to(bent.dtype))
        h, slope = self._bend(a)
        return y - u * h.unsqueeze(-1), -(rho * slope).log1p()
