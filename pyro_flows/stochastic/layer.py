"""What a stochastic layer is: a bijection that an index picks, a kernel that draws the index, and one that infers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError

__all__ = ["Branches", "DiscreteLayer", "Move", "StochasticLayer"]

Law = Callable[[Tensor], Tensor]  # log density of points (*batch, D): (*batch,)


class Move(NamedTuple):
    """Where a layer takes a point, given its index.

    Args:
        value: the point, ``(*batch, D)``.
        ladj: log absolute determinant of the map applied, ``(*batch,)``.
        log_prior: ``log p(u | z)`` of the index at the base-side point, ``(*batch,)``, whichever way the map went.
    """

    value: Tensor
    ladj: Tensor
    log_prior: Tensor


class Branches(NamedTuple):
    """All preimages of a point that are possible, ``P`` of them.

    Args:
        z: ``(*batch, P, D)``.
        log_weight: ``log p(u | z_u) + log|det dz_u/dx|``, ``(*batch, P)``.
        indices: the index of each, ``(*batch, P, index_dim)``.
    """

    z: Tensor
    log_weight: Tensor
    indices: Tensor


class StochasticLayer(nn.Module):
    r"""A random map :math:`z \mapsto x = F(z; u)`, where :math:`u \sim p(u \mid z)` and each :math:`F(\cdot\,; u)` is a bijection.

    Its density is :math:`p(x) = \int p_Z(z_u)\, p(u \mid z_u)\, |\det dz_u/dx|\, du` with :math:`z_u = F^{-1}(x; u)`: the kernel is taken at the
    preimage that belongs to ``u``. Subclasses implement :meth:`draw`, :meth:`pull` and :meth:`infer`; those whose index can be named
    beforehand also :meth:`push`.

    Args:
        dim: number of coordinates :math:`D`.
        index_dim: number of entries of the index.
        context_dim: size of a context; 0 for none.
    """

    discrete = False  # whether indices are integers
    reparameterized = True  # whether draws carry the gradient of their law
    branch_count: int | None = None  # how many preimages a point has; None where they cannot be listed
    factorizes = False  # whether the branches' sum over a law of independent coordinates is a product of small sums

    def __init__(self, dim: int, index_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("index_dim", index_dim, 1), ("context_dim", context_dim, 0)):
            if not isinstance(value, int) or value < least:
                raise ShapeError(f"{type(self).__name__}: {name} must be an integer of at least {least}, got {value!r}")
        self.dim, self.index_dim, self.context_dim = dim, index_dim, context_dim

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        """Draw an index at ``z`` and move forward: ``(u, Move to x)``."""
        raise NotImplementedError

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        """Move forward by a given index; its batch shape and that of ``z`` are broadcast."""
        raise OptionError(f"{type(self).__name__} cannot move by a given index: its index is found on the way, use draw(z)")

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        """Move back by a given index; the log determinant is that of the inverse."""
        raise NotImplementedError

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        """The inference kernel ``q(u | x)``, with ``event_shape (index_dim,)``.

        Args:
            x: points on the target side.
            law: log density of the base-side points; layers whose posterior Bayes gives take it from there.
        """
        raise NotImplementedError

    def best(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        """The most probable index under :meth:`infer`."""
        return self.infer(x, context, law).mean

    def extra_repr(self) -> str:
        """Sizes at a glance."""
        return f"dim={self.dim}, index_dim={self.index_dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")


class DiscreteLayer(StochasticLayer):
    """A layer whose index is one of finitely many, so that its sum can be taken: the posterior follows from Bayes.

    Subclasses implement :meth:`branches` besides :meth:`draw`, :meth:`push` and :meth:`pull`, and set ``choices``.
    """

    discrete = True
    reparameterized = False
    choices: int  # values of each entry of the index

    def branches(self, x: Tensor, context: Tensor | None = None) -> Branches:
        """All preimages of each point, with their weights."""
        raise NotImplementedError

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        """Bayes: ``q(u | x)`` in proportion to the branch's weight times the law at its preimage; that of a standard normal by default."""
        found = self.branches(x, context)
        return Listed(found.indices, found.log_weight + (law or standard_normal)(found.z))

    def best(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        return self.infer(x, context, law).mode

    def listing(self) -> Tensor:
        """All indices that a base-side point may draw, ``(number, index_dim)``."""
        return torch.cartesian_prod(*[torch.arange(self.choices)] * self.index_dim).view(-1, self.index_dim)

    def index_logits(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        """Log probabilities of each entry's values under :meth:`infer`, ``(*batch, index_dim, choices)``, where entries are independent."""
        if self.index_dim > 1:
            raise OptionError(f"{type(self).__name__}: the entries of its index are not independent given a point")
        q = self.infer(x, context, law)
        values = torch.arange(self.choices, device=x.device).view(-1, *[1] * len(q.batch_shape), 1)
        return q.log_prob(values.expand(self.choices, *q.batch_shape, 1)).movedim(0, -1).unsqueeze(-2)


class Listed(dist.TorchDistribution):
    """A distribution over listed integer vectors.

    Args:
        values: ``(*batch, P, index_dim)``, all different.
        logits: ``(*batch, P)``.
    """

    arg_constraints: dict = {}
    support = dist.constraints.independent(dist.constraints.nonnegative_integer, 1)

    def __init__(self, values: Tensor, logits: Tensor) -> None:
        self.values, self.logits = values, logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], values.shape[-1:], validate_args=False)

    def _pick(self, place: Tensor) -> Tensor:
        """Values at the places ``(*sample, *batch)``."""
        values = self.values.expand(*place.shape, *self.values.shape[-2:])
        return values.gather(-2, place[..., None, None].expand(*place.shape, 1, values.shape[-1])).squeeze(-2)

    @torch.no_grad()
    def sample(self, sample_shape: torch.Size | tuple[int, ...] = ()) -> Tensor:
        return self._pick(dist.Categorical(logits=self.logits, validate_args=False).sample(torch.Size(sample_shape)))

    @property
    def mode(self) -> Tensor:
        """The most probable value."""
        return self._pick(self.logits.argmax(-1))

    def log_prob(self, value: Tensor) -> Tensor:
        same = (value.unsqueeze(-2) == self.values).all(-1)
        logits = self.logits.expand(same.shape)
        return torch.where(same, logits, torch.full_like(logits, -torch.inf)).logsumexp(-1)


def standard_normal(z: Tensor) -> Tensor:
    """Log density of independent standard normal coordinates."""
    return dist.Normal(torch.zeros_like(z), 1.0, validate_args=False).log_prob(z).sum(-1)


def log_total(log_weight: Tensor) -> Tensor:
    """``logsumexp`` over the last dimension, whose gradient is zero, not NaN, where all weights are zero."""
    none = (log_weight == -torch.inf).all(-1)
    total = torch.where(none.unsqueeze(-1), torch.zeros_like(log_weight), log_weight).logsumexp(-1)
    return torch.where(none, torch.full_like(total, -torch.inf), total)
