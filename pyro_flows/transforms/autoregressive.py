"""The autoregressive structure, in both directions: MAF and IAF are the same layer seen from either side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..nets import MaskedMLP
from ..nets.mlp import Activation
from ..univariate import Univariate
from .base import FlowTransform

__all__ = ["Autoregressive"]


class Autoregressive(FlowTransform):
    r"""Moves each coordinate by a map that the coordinates before it determine.

    .. math:: y_i = f(x_i; \theta_i), \qquad \theta_i = \mathrm{net}(v_{<i}, c)

    With ``direction="density"`` the conditioner sees the target side, :math:`v = y` (MAF): the inverse, and so a density, takes one pass of the
    masked net. With ``direction="sampling"`` it sees the base side, :math:`v = x` (IAF): the forward map, and so a sample, takes one pass. The other
    direction finds the coordinates one by one; because hidden units are sorted by degree, that too costs the arithmetic of one pass.

    Args:
        univariate: the map :math:`f`, from :mod:`pyro_flows.univariate`.
        dim: number of coordinates :math:`D`.
        direction: ``"density"`` or ``"sampling"``: which direction takes one pass.
        order: the order of the coordinates, a permutation of ``0 .. D-1``; stacks alternate it with its reverse. By default ``0, 1, .., D-1``.
        context_dim: size of the context :math:`c`; 0 for none.
        hidden_features: widths of the conditioner's hidden layers.
        activation: makes the conditioner's activation.

    Cost: one pass in the named direction; in the other the same arithmetic in :math:`D` dependent steps. Starts at the identity.

    References: Masked autoregressive flow for density estimation (Papamakarios et al., 2017), https://arxiv.org/abs/1705.07057;
    Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), https://arxiv.org/abs/1606.04934
    """

    order: Tensor
    back: Tensor

    def __init__(
        self,
        univariate: Univariate,
        dim: int,
        direction: Literal["density", "sampling"] = "density",
        order: Tensor | None = None,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(dim, context_dim)
        if direction not in ("density", "sampling"):
            raise OptionError(f'Autoregressive: direction must be "density" or "sampling", got {direction!r}')
        order = torch.arange(dim) if order is None else order
        if order.shape != (dim,) or not torch.equal(order.sort().values.cpu(), torch.arange(dim)):
            raise ShapeError(f"Autoregressive: order must hold each of 0..{dim - 1} once, got {order.tolist()}")
        self.univariate, self.direction = univariate, direction
        self.one_pass = "inverse" if direction == "density" else "forward"
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.net = MaskedMLP(dim, univariate.num_params, hidden_features, context_dim, activation)

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}, direction={self.direction!r}, order={self.order.tolist()}"

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, self.univariate.forward, self.univariate.inverse, self.direction == "sampling")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, context, self.univariate.inverse, self.univariate.forward, self.direction == "density")

    def _map(self, value, context, apply, undo, one_pass):  # type: ignore[no-untyped-def]
        value = value.index_select(-1, self.order)
        if one_pass:  # the conditioner sees the argument
            mapped, log_slope = apply(value, self.net(value, context))
        else:  # it sees the result, found one coordinate at a time
            mapped, params = self.net.decode(lambda i, row: apply(value[..., i], row)[0], value.shape[:-1], context)
            log_slope = -undo(mapped, params)[1]
        return mapped.index_select(-1, self.back), log_slope.sum(-1)
