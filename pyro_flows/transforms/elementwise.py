"""The structure without interaction: each coordinate has its own map."""

from __future__ import annotations

from torch import Tensor

from ..nets import Hypernetwork
from ..univariate import Univariate
from .base import FlowTransform

__all__ = ["Elementwise"]


class Elementwise(FlowTransform):
    r"""Applies a univariate map to each coordinate, with its own free parameters: :math:`y_i = f(x_i; \theta_i)`.

    Args:
        univariate: the map, from :mod:`pyro_flows.univariate`.
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that the parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(DP)` in both directions, for :math:`P` parameters a coordinate. Starts at the identity.
    """

    def __init__(self, univariate: Univariate, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate
        self.params = Hypernetwork((dim, univariate.num_params), context_dim)

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}"

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, log_slope = self.univariate.forward(x, self.params(context).expand(*x.shape, -1))
        return y, log_slope.sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, log_slope = self.univariate.inverse(y, self.params(context).expand(*y.shape, -1))
        return x, log_slope.sum(-1)
