"""What layers of competing units share: candidates coordinate by coordinate, their sums, and the care of dead units."""

from __future__ import annotations

import math

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError
from .layer import Branches, DiscreteLayer, Law

__all__ = ["Competition", "Independent", "Rows"]

_MOST_BRANCHES = 2**16
_JITTER = 0.1  # how far a revived unit is moved from the one it was copied from


class Rows:
    """The positions of one unit's numbers among the outputs of a conditioner, and its coordinates.

    Args:
        params, bias, slopes: rows of the map's parameters, of the activation's constant, and of its slopes.
        coordinates: the columns of the layer's shifts.
    """

    def __init__(self, params: Tensor, bias: Tensor, slopes: Tensor, coordinates: Tensor) -> None:
        self.all = torch.cat([params.reshape(-1), bias.reshape(-1), slopes.reshape(-1)])
        self.bias, self.coordinates = bias, coordinates


class Independent:
    """The law of independent coordinates, as a function that lets its factors be seen.

    Args:
        base: a univariate distribution of batch shape ``(D,)``, made one of points by ``.to_event(1)``.
    """

    def __init__(self, base: dist.TorchDistribution) -> None:
        self.base = base

    def __call__(self, z: Tensor) -> Tensor:
        return self.base.log_prob(z)


class Competition(DiscreteLayer):
    """Groups of coordinates, each of which ``units`` maps compete for; a winner a group.

    Args:
        dim: number of coordinates.
        units: competing maps of each group, ``U``.
        group: the group of each coordinate, ``(dim,)``; -1 for those that no unit moves.
        context_dim: size of a context.

    Subclasses implement :meth:`candidates`, the maps given winners, and where a unit's numbers stand in the conditioner: :meth:`rows` and
    ``_outputs``.
    """

    membership: Tensor  # (D, G): which coordinate belongs to which group
    group: Tensor  # of each coordinate
    table: Tensor  # all combinations of winners, (U^G, G)
    shift: nn.Parameter  # (U, D or so): where each unit puts its coordinates
    factorizes = True
    needs_law = True

    def __init__(self, dim: int, units: int, group: Tensor, context_dim: int = 0) -> None:
        if not isinstance(units, int) or units < 1:
            raise OptionError(f"{type(self).__name__}: units must be a positive integer, got {units!r}")
        groups = int(group.max()) + 1
        super().__init__(dim, groups, context_dim)
        self.units, self.groups, self.choices = units, groups, units
        membership = (group[:, None] == torch.arange(groups)).to(torch.get_default_dtype())
        self.register_buffer("membership", membership, persistent=False)
        self.register_buffer("group", group.clamp(min=0), persistent=False)
        count = units**groups
        self.branch_count = count if count <= _MOST_BRANCHES else None
        table = torch.cartesian_prod(*[torch.arange(units)] * groups).reshape(count, groups) if self.branch_count else group.new_zeros(0, groups)
        self.register_buffer("table", table, persistent=False)

    def candidates(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Each coordinate's preimage should unit ``u`` win its group, ``(*batch, U, D)``, and each group's log weight then, ``(*batch, U, G)``."""
        raise NotImplementedError

    def branches(self, x: Tensor, context: Tensor | None = None) -> Branches:
        if self.branch_count is None:
            raise OptionError(
                f"{type(self).__name__}: {self.units} units in {self.groups} groups have {self.units}^{self.groups} winners, too many to list: put "
                "the layer directly above the base, where its sum factorises, or use fewer groups"
            )
        z, weight = self.candidates(x, context)
        batch, table = z.shape[:-2], self.table
        indices = table.expand(*batch, *table.shape)
        if self.groups == 1:
            return Branches(z, weight.squeeze(-1), indices)
        chosen = table[:, self.group]  # the unit that each coordinate follows, (P, D)
        return Branches(z.gather(-2, chosen.expand(*batch, *chosen.shape)), weight.gather(-2, indices).sum(-1), indices)

    def listing(self) -> Tensor:
        return self.table

    def summands(self, base: dist.TorchDistribution, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The log density of the coordinates that no unit moves, ``(*batch,)``, and the summand of each unit in each group, ``(*batch, G, U)``.

        The sum over all ``U^G`` winners is a product of ``G`` sums. Cost: O(UD) once the candidates are there.
        """
        z, weight = self.candidates(x, context)
        each = base.base_dist.log_prob(z)
        impossible = (each == -torch.inf).to(each)  # counted apart: zero times infinity is not a number
        each = torch.where(each == -torch.inf, torch.zeros_like(each), each)
        unmoved, moved = 1 - self.membership.sum(-1), self.membership
        never = torch.full((), -torch.inf).to(each)
        below = torch.where(impossible[..., 0, :] @ unmoved > 0, never, each[..., 0, :] @ unmoved)
        return below, torch.where(impossible @ moved > 0, never, weight + each @ moved).mT

    def index_logits(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        return self.infer(x, context, law).base_dist.logits

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        """The winners' posterior; over a law of independent coordinates, as the standard normal is, group by group at the cost O(UD)."""
        law = Independent(dist.Normal(x.new_zeros(self.dim), 1.0, validate_args=False).to_event(1)) if law is None else law
        if not isinstance(law, Independent):
            return super().infer(x, context, law)
        return dist.Categorical(logits=self.summands(law.base, x, context)[1], validate_args=False).to_event(1)

    def best(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        q = self.infer(x, context, law)
        return q.base_dist.logits.argmax(-1) if isinstance(q, dist.Independent) else q.mode

    # Dead units

    def usage(self, u: Tensor) -> Tensor:
        return nn.functional.one_hot(u, self.units).to(self.shift).mean(0)

    def rows(self, unit: int, group: int) -> Rows:
        """Where a unit's numbers stand among the conditioner's outputs."""
        raise NotImplementedError

    def _outputs(self) -> list[tuple[Tensor, int]]:
        """Tensors whose rows are the conditioner's outputs, each with the row it starts at."""
        raise NotImplementedError

    @torch.no_grad()
    def revive(self, usage: Tensor, threshold: float = 1e-3) -> int:
        """Make a copy of its group's busiest unit of each unit that wins less often than ``threshold``; the two share the wins.

        The density changes by what the dead unit had, and by a small move that lets the copies part. Returns the number of units revived.

        Args:
            usage: how often each unit wins, ``(G, U)``.
        """
        count = 0
        for group, wins in enumerate(usage.clone()):
            for unit in (wins < threshold).nonzero()[:, 0].tolist():
                source = int(wins.argmax())
                new, old = self.rows(unit, group), self.rows(source, group)
                for tensor, start in self._outputs():
                    tensor[start + new.all] = tensor[start + old.all]
                bias, start = next((t, s) for t, s in self._outputs() if t.dim() == 1)
                bias[start + old.bias] -= math.log(2)
                bias[start + new.bias] = bias[start + old.bias]
                self.shift[unit, new.coordinates] = self.shift[source, old.coordinates]
                self.shift[unit, new.coordinates] += _JITTER * torch.randn_like(self.shift[unit, new.coordinates])
                wins[unit] = wins[source] = wins[source] / 2
                count += 1
        return count
