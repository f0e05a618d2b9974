"""What a stochastic layer is: a bijection that an index picks, a kernel that draws the index, and one that infers it; a transform is one too."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..transforms import FlowTransform

__all__ = ["Branches", "Deterministic", "DiscreteLayer", "Move", "StochasticLayer"]

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
    preimage that belongs to ``u``. Subclasses implement :meth:`draw`, :meth:`pull` and :meth:`infer`, and :meth:`push` where the index can be
    chosen beforehand. The class attributes below say what else a flow may ask of the layer.

    Args:
        dim: number of coordinates :math:`D`.
        index_dim: number of entries of the index; 0 for a layer without one.
        context_dim: size of a context; 0 for none.
    """

    discrete = False  # whether indices are integers
    reparameterized = True  # whether draws carry the gradient of their law
    branch_count: int | None = None  # how many preimages a point has; None where they cannot be listed
    factorizes = False  # whether the branches' sum over a law of independent coordinates is a product of small sums, as `over` takes it
    needs_law = False  # whether `infer` depends on a law of the base-side points that is to be fitted
    choices: int = 0  # values of each entry of a discrete index

    def __init__(self, dim: int, index_dim: int, context_dim: int = 0) -> None:
        super().__init__()
        for name, value, least in (("dim", dim, 1), ("index_dim", index_dim, 0), ("context_dim", context_dim, 0)):
            if not isinstance(value, int) or value < least:
                raise ShapeError(f"{type(self).__name__}: {name} must be an integer of at least {least}, got {value!r}")
        self.dim, self.index_dim, self.context_dim = dim, index_dim, context_dim

    @property
    def has_index(self) -> bool:
        """Whether the layer draws anything."""
        return self.index_dim > 0

    @property
    def num_outcomes(self) -> int | None:
        """How many points a base-side point may become; ``None`` where they cannot be listed."""
        return None

    def own_context(self, context: Tensor | None) -> Tensor | None:
        """A flow's context as this layer takes it: ``None`` for a layer without one."""
        return context if self.context_dim else None

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        """Draw an index at ``z`` and move forward: ``(u, Move to x)``."""
        raise NotImplementedError

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        """Move forward by a given index; its batch shape and that of ``z`` are broadcast."""
        raise OptionError(f"{type(self).__name__} cannot move by a given index: its index results from the draw, use draw(z)")

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

    def select(
        self, x: Tensor, context: Tensor | None = None, law: Law | None = None, given: Tensor | None = None, best: bool = False
    ) -> tuple[Tensor, Tensor | float]:
        """An index for each point, and its log probability under :meth:`infer`: the given one, a draw, or the best one without its probability."""
        if best:
            return self.best(x, context, law), 0.0
        q = self.infer(x, context, law)
        u = given if given is not None else q.rsample() if q.has_rsample and torch.is_grad_enabled() else q.sample()
        return u, q.log_prob(u)

    # What a layer with finitely many indices answers

    def branches(self, x: Tensor, context: Tensor | None = None) -> Branches:
        """All preimages of each point, with their weights; for layers with a ``branch_count``."""
        raise OptionError(f"{type(self).__name__}: the preimages of a point cannot be listed")

    def outcomes(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All points that ``z`` may become, ``(*batch, P, D)``, and their log probabilities, ``(*batch, P)``; for layers with ``num_outcomes``."""
        raise OptionError(f"{type(self).__name__}: the points that a point may become cannot be listed")

    def index_logits(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        """Log probabilities of each entry's values under :meth:`infer`, ``(*batch, index_dim, choices)``, where entries are independent."""
        raise OptionError(f"{type(self).__name__}: its index is not discrete")

    def summands(self, base: dist.TorchDistribution, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the density over a base of independent coordinates is made of, see :meth:`over`; for layers that factorise."""
        raise OptionError(f"{type(self).__name__}: its sum over independent coordinates is not a product")

    def over(self, base: dist.TorchDistribution, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density over a base of independent coordinates, ``(*batch,)``; for layers that factorise."""
        remaining, weight = self.summands(base, x, context)
        return remaining + log_total(weight).sum(-1)

    # What a layer of competing units answers

    def usage(self, u: Tensor) -> Tensor | None:
        """How often each unit wins among indices ``(N, index_dim)``: shares ``(groups, units)``; ``None`` for a layer without competing units."""
        return None

    def revive(self, usage: Tensor, threshold: float = 1e-3) -> int:
        """Put units that win less often than ``threshold`` to new use; returns how many there were."""
        return 0

    def extra_repr(self) -> str:
        """Sizes at a glance."""
        return f"dim={self.dim}, index_dim={self.index_dim}" + (f", context_dim={self.context_dim}" if self.context_dim else "")


class DiscreteLayer(StochasticLayer):
    """A layer whose index is one of finitely many, so that its sum can be taken: the posterior follows from Bayes.

    Subclasses implement :meth:`branches` besides :meth:`draw`, :meth:`push` and :meth:`pull`, and set ``choices``.
    """

    discrete = True
    reparameterized = False

    @property
    def num_outcomes(self) -> int | None:
        return len(self.listing()) or None

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        """Bayes: ``q(u | x)`` in proportion to the branch's weight times the law at its preimage; that of a standard normal by default."""
        branches = self.branches(x, context)
        return Listed(branches.indices, branches.log_weight + (law or standard_normal)(branches.z))

    def best(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        return self.infer(x, context, law).mode

    def listing(self) -> Tensor:
        """All indices that a base-side point may draw, ``(number, index_dim)``; empty where there are too many."""
        return torch.cartesian_prod(*[torch.arange(self.choices)] * self.index_dim).view(-1, self.index_dim)

    def outcomes(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        move = self.push(z.unsqueeze(-2), self.listing().to(z.device), context)
        return move.value, move.log_prior

    def index_logits(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        if self.index_dim > 1:
            raise OptionError(f"{type(self).__name__}: the entries of its index are not independent given a point")
        q = self.infer(x, context, law)
        values = torch.arange(self.choices, device=x.device).view(-1, *[1] * len(q.batch_shape), 1)
        return q.log_prob(values.expand(self.choices, *q.batch_shape, 1)).movedim(0, -1).unsqueeze(-2)


class Deterministic(DiscreteLayer):
    """A transform as a stochastic layer, whose index is empty: nothing is drawn, and each point has one preimage.

    :class:`~pyro_flows.stochastic.StochasticFlow` takes transforms as they are, and wraps each in one of these.

    Args:
        transform: the transform.

    Cost: that of the transform.

    Example:
        >>> import torch, pyro_flows as pf
        >>> layer = Deterministic(pf.transforms.Affine(2))
        >>> u, move = layer.draw(torch.zeros(3, 2))
        >>> u.shape, move.value.shape, layer.has_index
        (torch.Size([3, 0]), torch.Size([3, 2]), False)
    """

    reparameterized = True
    branch_count = 1
    choices = 1

    def __init__(self, transform: FlowTransform) -> None:
        super().__init__(transform.dim, 0, transform.context_dim)
        self.transform = transform

    @staticmethod
    def _index(points: Tensor) -> Tensor:
        """The empty index of each point."""
        return points.new_zeros(*points.shape[:-1], 0, dtype=torch.long)

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        return self._index(z), self.push(z, self._index(z), context)

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        x, ladj = self.transform.forward_and_ladj(z, context)
        return Move(x, ladj, torch.zeros_like(ladj))

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        z, ladj = self.transform.inverse_and_ladj(x, context)
        return Move(z, ladj, torch.zeros_like(ladj))

    def select(
        self, x: Tensor, context: Tensor | None = None, law: Law | None = None, given: Tensor | None = None, best: bool = False
    ) -> tuple[Tensor, Tensor | float]:
        return self._index(x), 0.0  # drawing the empty index would use up random numbers

    def branches(self, x: Tensor, context: Tensor | None = None) -> Branches:
        z, ladj, _ = self.pull(x, self._index(x), context)
        return Branches(z.unsqueeze(-2), ladj.unsqueeze(-1), self._index(z).unsqueeze(-2))

    def listing(self) -> Tensor:
        return torch.zeros(1, 0, dtype=torch.long)

    def outcomes(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, _, log_prior = self.push(z, self._index(z), context)
        return x.unsqueeze(-2), log_prior.unsqueeze(-1)

    def index_logits(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        return x.new_zeros(*x.shape[:-1], 0, 1)


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

    def _pick(self, position: Tensor) -> Tensor:
        """Values at the positions ``(*sample, *batch)``."""
        values = self.values.expand(*position.shape, *self.values.shape[-2:])
        return values.gather(-2, position[..., None, None].expand(*position.shape, 1, values.shape[-1])).squeeze(-2)

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
