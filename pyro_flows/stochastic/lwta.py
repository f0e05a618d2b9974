"""The coupling of competing units: local winner takes all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..nets import MLP, Hypernetwork
from ..nets.mlp import Activation
from ..transforms.coupling import Halved, check_moved
from ..univariate import Affine, Univariate
from .competition import Competition, Rows
from .layer import Move

__all__ = ["LWTACoupling"]


def spread_out(units: int, size: int, spread: float) -> Tensor:
    """Where units put their coordinates at the start, ``(units, size)``: evenly on a line, at random in more dimensions; zero for a single unit."""
    if units == 1:
        return torch.zeros(1, size)
    return torch.linspace(-spread, spread, units)[:, None] if size == 1 else 0.5 * spread * torch.randn(units, size)


class LWTACoupling(Halved, Competition):
    r"""A coupling whose moved coordinates ``units`` maps compete for: local winner takes all.

    With :math:`z = (z_A, z_B)`, a conditioner of :math:`z_A` and the context gives each unit a map :math:`f_u` and an activation, and one unit wins:

    .. math::
        a_u(z) = \alpha_u(z_A) + \langle w_u(z_A), z_B \rangle, \qquad u \sim \mathrm{softmax}(a(z)), \qquad
        x_A = z_A, \quad x_B = f_u(z_B; z_A) + c_u

    The density is the sum over units, each with its activation at **its own** preimage :math:`z^{(u)}`,

    .. math:: p(x) = \sum_u p_Z(z^{(u)})\, \mathrm{softmax}_u(a(z^{(u)}))\, |\det \partial z^{(u)} / \partial x|

    and the winner's posterior, the summand over the sum, is the stochastic inverse. Since :math:`x_A = z_A`, one pass of the conditioner serves all
    units. Where the map tears space apart the activation's slope does it, not the map's: each :math:`f_u` may stay close to an isometry.

    Args:
        dim: number of coordinates :math:`D`.
        units: competing maps ``U``; with one the layer is a :class:`~pyro_flows.transforms.Coupling`.
        univariate: the units' map :math:`f`, affine by default; splines bend as well.
        moved: boolean tensor ``(D,)``, the set :math:`B`; by default the even coordinates.
        groups: local groups that the moved coordinates fall into, in order; each has a competition of its own, of units that see
            its own coordinates of :math:`z_B`.
        context_dim: size of a context; 0 for none.
        hidden_features, activation: of the conditioner.
        spread: the constants :math:`c_u` start between ``-spread`` and ``spread``: units that start together would stay together.

    Cost: one pass of the conditioner, and :math:`O(U^2 |B|)` activations a point for a density, :math:`O(U |B|)` for a draw. Does not start at
    the identity, but at a mixture of shifts that win equally often.

    Raises:
        ShapeError: ``moved`` moves nothing (as the complement of everything does in one dimension), or has the wrong shape.
        OptionError: units or groups that are not positive, or more groups than moved coordinates.

    Reference: Nonparametric Bayesian deep networks with local competition (Panousis et al., 2019), https://arxiv.org/abs/1805.07624, for the
    gate; the flow layer is new.

    Example:
        >>> import torch, pyro_flows as pf
        >>> flow = pf.stochastic.StochasticFlow(2, [LWTACoupling(2, units=3)])
        >>> flow().log_prob(torch.zeros(4, 2)).shape, flow().exact
        (torch.Size([4]), True)
    """

    local: Tensor

    def __init__(
        self,
        dim: int,
        units: int = 4,
        univariate: Univariate | None = None,
        moved: Tensor | None = None,
        groups: int = 1,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        spread: float = 2.0,
    ) -> None:
        moved = check_moved("LWTACoupling", dim, moved)
        size = int(moved.sum())
        if not isinstance(groups, int) or not 1 <= groups <= size:
            raise OptionError(f"LWTACoupling: groups must be an integer from 1 to {size}, the number of moved coordinates, got {groups!r}")
        local = torch.arange(size) * groups // size
        group = torch.full((dim,), -1)
        group[moved] = local
        super().__init__(dim, units, group, context_dim)
        self._divide(moved)
        self.univariate, self.size = univariate or Affine(), size
        self.register_buffer("local", local, persistent=False)
        inputs = dim - size + context_dim
        outputs = units * size * self.univariate.num_params + (units * (groups + size) if units > 1 else 0)
        self.net = MLP(inputs, outputs, hidden_features, activation) if inputs else Hypernetwork((outputs,))
        self.shift = nn.Parameter(torch.cat([spread_out(units, int((local == g).sum()), spread) for g in range(groups)], 1))

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}, units={self.units}, groups={self.groups}, moved={self.moved_index.tolist()}"

    # Shapes: *batch, then V maps' candidates, U units, B moved coordinates, P parameters, G groups.

    def _conditioned(self, kept: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Parameters of the maps ``(*batch, U, B, P)``, and constants ``(*batch, U, G)`` and slopes ``(*batch, U, B)`` of the activations."""
        u, g, b, p = self.units, self.groups, self.size, self.univariate.num_params
        given = kept if context is None else torch.cat([kept, context.expand(*kept.shape[:-1], -1)], -1)
        out = self.net(given) if given.shape[-1] else self.net().expand(*kept.shape[:-1], -1)
        if u == 1:
            return out.unflatten(-1, (1, p, b)).mT, out.new_zeros(1, g), out.new_zeros(1, b)
        params, constants, slopes = out.split([u * p * b, u * g, u * b], -1)
        return params.unflatten(-1, (u, p, b)).mT, constants.unflatten(-1, (u, g)), slopes.unflatten(-1, (u, b))

    def _activations(self, moved: Tensor, constants: Tensor, slopes: Tensor) -> Tensor:
        """All units' activations at points ``(*batch, V, B)``: ``(*batch, V, G, U)``."""
        if self.size == 1:
            sums = (moved * slopes.mT).unsqueeze(-2)
        elif self.groups == 1:
            sums = (moved @ slopes.mT).unsqueeze(-2)
        else:
            sums = ((slopes.unsqueeze(-3) * moved.unsqueeze(-2)) @ self.membership[self.moved_index]).mT
        return sums + constants.mT.unsqueeze(-3)

    def _log_gate(self, moved: Tensor, constants: Tensor, slopes: Tensor) -> Tensor:
        """Log probabilities of the winners at points ``(*batch, B)``: ``(*batch, G, U)``."""
        return self._activations(moved.unsqueeze(-2), constants, slopes).squeeze(-3).log_softmax(-1)

    def candidates(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self.split(x)
        params, constants, slopes = self._conditioned(kept, context)
        z, log_slope = self.univariate.inverse(moved.unsqueeze(-2) - self.shift, params)
        # each unit at its own preimage, (*batch, U, G)
        own = constants + (slopes * z) @ self.membership[self.moved_index]
        weight = own - self._activations(z, constants, slopes).logsumexp(-1) + log_slope @ self.membership[self.moved_index]
        return self.join(kept.unsqueeze(-2).expand(*z.shape[:-1], -1), z), weight

    def _chosen(self, params: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters ``(*batch, B, P)`` and shifts ``(*batch, B)`` of the winners ``(*batch, G)``, batch shapes broadcast."""
        unit = u[..., self.local]
        batch = torch.broadcast_shapes(unit.shape[:-1], params.shape[:-3])
        unit = unit.expand(*batch, -1)
        index = unit[..., None, :, None].expand(*batch, 1, self.size, params.shape[-1])
        chosen = params.expand(*batch, *params.shape[-3:]).gather(-3, index).squeeze(-3)
        return chosen, self.shift.gather(0, unit.reshape(-1, self.size)).view_as(unit)

    def _log_prior(self, u: Tensor, moved: Tensor, constants: Tensor, slopes: Tensor) -> Tensor:
        gate = self._log_gate(moved, constants, slopes)
        batch = torch.broadcast_shapes(u.shape[:-1], gate.shape[:-2])
        return gate.expand(*batch, *gate.shape[-2:]).gather(-1, u.expand(*batch, -1).unsqueeze(-1)).squeeze(-1).sum(-1)

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        kept, moved = self.split(z)
        return self._push(kept, moved, u, *self._conditioned(kept, context))

    def _push(self, kept: Tensor, moved: Tensor, u: Tensor, params: Tensor, constants: Tensor, slopes: Tensor) -> Move:
        chosen, shift = self._chosen(params, u)
        x, log_slope = self.univariate.forward(moved.expand(shift.shape), chosen)
        return Move(self.join(kept.expand(*x.shape[:-1], -1), x + shift), log_slope.sum(-1), self._log_prior(u, moved, constants, slopes))

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        kept, moved = self.split(z)
        params, constants, slopes = self._conditioned(kept, context)
        u = dist.Categorical(logits=self._log_gate(moved, constants, slopes), validate_args=False).sample()
        return u, self._push(kept, moved, u, params, constants, slopes)

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        kept, moved = self.split(x)
        params, constants, slopes = self._conditioned(kept, context)
        chosen, shift = self._chosen(params, u)
        z, log_slope = self.univariate.inverse(moved - shift, chosen)
        return Move(self.join(kept.expand(*z.shape[:-1], -1), z), log_slope.sum(-1), self._log_prior(u, z, constants, slopes))

    def gate(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        """Log probabilities of each group's winner at ``z``: ``(*batch, G, U)``."""
        kept, moved = self.split(z)
        _, constants, slopes = self._conditioned(kept, context)
        return self._log_gate(moved, constants, slopes).expand(*z.shape[:-1], -1, -1)

    def rows(self, unit: int, group: int) -> Rows:
        u, g, b, p = self.units, self.groups, self.size, self.univariate.num_params
        columns = (self.local == group).nonzero()[:, 0]
        params = torch.arange(u * p * b).view(u, p, b)[unit][:, columns.cpu()]
        constants = u * p * b + torch.arange(u * g).view(u, g)[unit, group : group + 1]
        return Rows(params, constants, u * (p * b + g) + torch.arange(u * b).view(u, b)[unit, columns.cpu()], columns)

    def _outputs(self) -> list[tuple[Tensor, int]]:
        net: Any = self.net
        if self.size < self.dim or self.context_dim:
            return [(net[-1].weight, 0), (net[-1].bias, 0)]
        return [(net.bias, 0)]  # of numbers that depend on nothing
