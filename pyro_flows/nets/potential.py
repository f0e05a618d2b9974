"""A velocity that is the gradient of a potential, with the trace of the potential's Hessian by formula."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from .velocity import Time, in_time

__all__ = ["PotentialNet"]


class PotentialNet(nn.Module):
    r"""The gradient :math:`\nabla_x \Phi` of a potential with two hidden layers and a quadratic term (OT-Flow).

    .. math:: \Phi = w^\top u_1 + \tfrac12 x^\top A x + x^\top (B [t, c] + b), \qquad
        u_0 = \sigma(K_0 [x, t, c] + b_0), \quad u_1 = u_0 + \sigma(K_1 u_0 + b_1), \quad \sigma(a) = \log(e^a + e^{-a})

    Gradient and trace of the Hessian are written out: no automatic differentiation is needed for either. The Jacobian is symmetric, so nothing
    turns around a point, as optimal transport wants it.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of a context; 0 for none.
        hidden_features: width :math:`m` of both hidden layers.

    Shape: as :class:`~pyro_flows.nets.VelocityMLP`. Starts at zero. Cost: two passes; with the trace :math:`\min(D, m)` products more with a
    square matrix of size :math:`m`.

    Reference: OT-Flow: fast and accurate continuous normalizing flows via optimal transport (Onken et al., 2021),
    https://arxiv.org/abs/2006.00104
    """

    def __init__(self, dim: int, context_dim: int = 0, hidden_features: int = 64) -> None:
        super().__init__()
        if not isinstance(hidden_features, int) or hidden_features < 1:
            raise OptionError(f"PotentialNet: hidden_features must be one positive integer, the width of both layers, got {hidden_features!r}")
        self.first = nn.Linear(dim, hidden_features)
        self.first_in_time = nn.Linear(1 + context_dim, hidden_features, bias=False)
        self.second = nn.Linear(hidden_features, hidden_features)
        self.weight = nn.Parameter(torch.zeros(hidden_features))
        self.quadratic = nn.Parameter(torch.zeros(dim, dim))
        self.drift = nn.Linear(1 + context_dim, dim)
        for parameter in self.drift.parameters():
            nn.init.zeros_(parameter)

    @property
    def _symmetric(self) -> Tensor:
        return (self.quadratic + self.quadratic.mT) / 2

    def _parts(self, t: Time, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The slopes of both layers, what comes back to the first one, and the velocity."""
        a = F.linear(x, self.first.weight, self.first.bias) + in_time(self.first_in_time, t, context)
        first = torch.tanh(a)
        size = a.abs()
        second = torch.tanh(self.second(size + torch.log1p(torch.exp(-2 * size))))
        back = self.weight + (second * self.weight) @ self.second.weight
        linear = x @ self._symmetric + in_time(self.drift, t, context)
        return first, second, back, (first * back) @ self.first.weight + linear

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._parts(t, x, context)[3]

    def products(self, t: Time, x: Tensor, directions: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The velocity ``(*batch, D)``, and the Jacobian times each of the directions ``(K, *batch, D)``."""
        first, second, back, velocity = self._parts(t, x, context)
        moved = F.linear(directions, self.first.weight)
        pulled = ((1 - second**2) * self.weight * F.linear(first * moved, self.second.weight)) @ self.second.weight
        return velocity, ((1 - first**2) * back * moved + first * pulled) @ self.first.weight + directions @ self._symmetric

    @property
    def trace_products(self) -> int:
        """How many products with a matrix of the second layer's size :meth:`velocity_and_trace` costs."""
        return min(self.first.in_features, self.first.out_features)

    def velocity_and_trace(self, t: Time, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The velocity ``(*batch, D)``, and the trace of its Jacobian ``(*batch,)``.

        The second layer's share is :math:`\sum_k w_k \sigma''_k \|K_0^\top r_k\|^2`, where :math:`r_k` is row :math:`k` of :math:`K_1` times the
        slopes of the first layer: found by coordinates, or in a high dimension by :math:`r_k^\top (K_0 K_0^\top) r_k`.
        """
        first, second, back, velocity = self._parts(t, x, context)
        weight = self.first.weight
        outer = ((1 - first**2) * back * (weight**2).sum(-1)).sum(-1)
        if weight.shape[1] <= weight.shape[0]:
            length = (F.linear(first.unsqueeze(-2) * weight.mT, self.second.weight) ** 2).sum(-2)
        else:
            rows = first.unsqueeze(-2) * self.second.weight  # (*batch, m, m)
            length = ((rows @ (weight @ weight.mT)) * rows).sum(-1)
        inner = ((1 - second**2) * self.weight * length).sum(-1)
        return velocity, outer + inner + self.quadratic.diagonal().sum()
