"""One competition for each coordinate, in an autoregressive order."""

from __future__ import annotations

from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..nets import MaskedMLP
from ..nets.mlp import Activation
from ..univariate import Affine, Univariate
from .competition import Competition, Rows
from .layer import Move
from .lwta import spread_out

__all__ = ["ARLWTA"]


class ARLWTA(Competition):
    r"""Each coordinate's maps compete on what the coordinates before it say: :math:`U^D` winners, whose sum is :math:`D` small sums.

    .. math::
        u_k \sim \mathrm{softmax}_u(\alpha_{k,u} + w_{k,u} z_k), \qquad x_k = f(z_k; \theta_{k,u_k}) + c_{k,u_k}, \qquad
        (\alpha, w, \theta)_k = \mathrm{net}(x_{<k}, c)

    Directly above a base of independent coordinates the winners are independent given :math:`x`, and

    .. math:: \log p(x) = \sum_k \log \sum_u p(z_k^{(u)})\, \mathrm{softmax}_u(\alpha_k + w_k z_k^{(u)})\, |\partial z_k^{(u)} / \partial x_k|

    is exact at the cost :math:`O(U^2 D)`. Above anything else it is a layer of :math:`U^D` branches.

    Args:
        dim: number of coordinates :math:`D`.
        units: competing maps of each coordinate ``U``.
        univariate: the units' map :math:`f`, affine by default.
        order: the order of the coordinates, a permutation of ``0 .. D-1``.
        context_dim: size of a context; 0 for none.
        hidden_features, activation: of the masked conditioner.
        spread: the constants :math:`c` start between ``-spread`` and ``spread``.

    Cost: densities one pass of the masked net; draws its arithmetic in ``D`` dependent steps. Starts at a mixture of shifts.

    Raises:
        ShapeError: ``order`` is no permutation.
        OptionError: units that are not positive.

    Reference: Nonparametric Bayesian deep networks with local competition (Panousis et al., 2019), https://arxiv.org/abs/1805.07624, for the
    gate; the layer is new.
    """

    order: Tensor
    back: Tensor

    def __init__(
        self,
        dim: int,
        units: int = 4,
        univariate: Univariate | None = None,
        order: Tensor | None = None,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        spread: float = 2.0,
    ) -> None:
        order = torch.arange(dim) if order is None else order
        if order.shape != (dim,) or not torch.equal(order.sort().values.cpu(), torch.arange(dim)):
            raise ShapeError(f"ARLWTA: order must hold each of 0..{dim - 1} once, got {order.tolist()}")
        super().__init__(dim, units, torch.arange(dim), context_dim)
        if units < 2:
            raise OptionError("ARLWTA: units must be at least 2: with one it is Autoregressive(univariate, dim)")
        self.univariate = univariate or Affine()
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        self.net = MaskedMLP(dim, units * (self.univariate.num_params + 2), hidden_features, context_dim, activation)
        self.shift = nn.Parameter(spread_out(units, 1, spread).expand(units, dim).clone())

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}, units={self.units}, order={self.order.tolist()}"

    def _units(self, outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters ``(..., U, P)``, constants and slopes ``(..., U)`` from a coordinate's outputs."""
        u, p = self.units, self.univariate.num_params
        params, constants, slopes = outputs.split([u * p, u, u], -1)
        return params.unflatten(-1, (u, p)), constants, slopes

    def candidates(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        value = x.index_select(-1, self.order)
        params, constants, slopes = self._units(self.net(value, context))  # in the order, (*batch, D, ...)
        z, log_slope = self.univariate.inverse(value.unsqueeze(-1) - self.shift.mT, params)
        gate = (constants.unsqueeze(-2) + slopes.unsqueeze(-2) * z.unsqueeze(-1)).log_softmax(-1)
        weight = gate.diagonal(0, -2, -1) + log_slope
        return z.index_select(-2, self.back).mT, weight.index_select(-2, self.back).mT

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        batch = torch.broadcast_shapes(x.shape[:-1], u.shape[:-1])
        value, won = (t.expand(*batch, -1).index_select(-1, self.order).unsqueeze(-1) for t in (x, u))
        params, constants, slopes = self._units(self.net(value.squeeze(-1), context))
        chosen = params.gather(-2, won.unsqueeze(-1).expand(*won.shape, params.shape[-1])).squeeze(-2)
        shift = self.shift.mT.expand(*won.shape[:-1], self.units).gather(-1, won).squeeze(-1)
        z, log_slope = self.univariate.inverse(value.squeeze(-1) - shift, chosen)
        gate = (constants + slopes * z.unsqueeze(-1)).log_softmax(-1).gather(-1, won).squeeze(-1)
        return Move(z.index_select(-1, self.back), log_slope.sum(-1), gate.sum(-1))

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        return self._decode(z, u, context)[1]

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        return self._decode(z, None, context)

    def _decode(self, z: Tensor, u: Tensor | None, context: Tensor | None) -> tuple[Tensor, Move]:
        """Move forward, coordinate after coordinate, by given winners or by such as are drawn on the way."""
        batch = z.shape[:-1] if u is None else torch.broadcast_shapes(z.shape[:-1], u.shape[:-1])
        columns = z.expand(*batch, -1).index_select(-1, self.order).reshape(-1, self.dim).unbind(-1)
        given = None if u is None else u.expand(*batch, -1).index_select(-1, self.order).reshape(-1, self.dim).unbind(-1)
        winners, priors = [], []

        def step(i: int, outputs: Tensor) -> tuple[Tensor, Tensor]:
            params, constants, slopes = self._units(outputs)
            gate = (constants + slopes * columns[i].unsqueeze(-1)).log_softmax(-1)
            won = (dist.Categorical(logits=gate, validate_args=False).sample() if given is None else given[i]).unsqueeze(-1)
            chosen = params.gather(-2, won.unsqueeze(-1).expand(*won.shape, params.shape[-1])).squeeze(-2)
            x, log_slope = self.univariate.forward(columns[i], chosen)
            winners.append(won.squeeze(-1))
            priors.append(gate.gather(-1, won).squeeze(-1))
            return x + self.shift[won.squeeze(-1), i], log_slope

        context = None if context is None else context.expand(*batch, -1)
        x, log_slope = self.net.decode(step, batch, context)
        won = torch.stack(winners, -1).view(*batch, self.dim).index_select(-1, self.back)
        prior = torch.stack(priors, -1).view(*batch, self.dim).sum(-1)
        return won, Move(x.index_select(-1, self.back), log_slope.sum(-1), prior)

    def rows(self, unit: int, group: int) -> Rows:
        u, d, p = self.units, self.dim, self.univariate.num_params
        position = int(self.back[group])  # of the coordinate in the order
        params = (unit * p + torch.arange(p)) * d + position
        constants, slopes = ((torch.arange(u)[unit : unit + 1] + (p + i) * u) * d + position for i in (0, 1))
        return Rows(params, constants, slopes, torch.tensor([position]))

    def _outputs(self) -> list[tuple[Tensor, int]]:
        last, context = self.net.layers[-1], self.net.context
        return [(last.weight, 0), (last.bias, 0)] + ([] if context is None else [(context.weight, sum(self.net.widths))])
