"""Layers whose index the point itself tells: which cell of a partition it lies in, in which order its coordinates stand, which is largest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..nets import MLP
from .layer import Branches, DiscreteLayer, Law, Listed, Move

__all__ = ["Abs", "Max", "Partition", "Sort"]


def _softplus_inverse(y: Tensor) -> Tensor:
    """The number whose softplus is ``y > 0``."""
    y = y.clamp(min=torch.finfo(y.dtype).tiny)
    return y + torch.log(-torch.expm1(-y))


class Surjection(DiscreteLayer):
    r"""Towards the base no choice is left: the index is a function of the point, :math:`u = u(x)`, and the density is exact at any depth,

    .. math:: \log p(x) = \log p_Z(z) + \log p(u(x) \mid z) + \log|\det \partial z / \partial x|, \qquad z = F^{-1}(x; u(x))

    Each map goes from all of :math:`R^D` onto the cell of its index, and the cells cover the space once, so every branch that is drawn is possible.

    Subclasses implement ``cell``, ``onto``, ``back`` and, unless all indices have the same probability, ``log_prior``.
    """

    branch_count = 1

    def cell(self, x: Tensor) -> Tensor:
        """The index of each point."""
        raise NotImplementedError

    def onto(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The point in cell ``u``, and the log determinant."""
        raise NotImplementedError

    def back(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`onto`, and its log determinant, for points in cell ``u``."""
        raise NotImplementedError

    def log_prior(self, z: Tensor, u: Tensor, context: Tensor | None) -> Tensor:
        """Log probability of the index at ``z``."""
        raise NotImplementedError

    def sample_index(self, z: Tensor, context: Tensor | None) -> Tensor:
        """An index at ``z``."""
        raise NotImplementedError

    def draw(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Move]:
        u = self.sample_index(z, context)
        return u, self.push(z, u, context)

    def push(self, z: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        batch = torch.broadcast_shapes(z.shape[:-1], u.shape[:-1])
        z, u = z.expand(*batch, -1), u.expand(*batch, -1)
        x, ladj = self.onto(z, u)
        return Move(x, ladj, self.log_prior(z, u, context))

    def pull(self, x: Tensor, u: Tensor, context: Tensor | None = None) -> Move:
        """Move back; an index that is not the point's has probability zero."""
        batch = torch.broadcast_shapes(x.shape[:-1], u.shape[:-1])
        own = self.cell(x).expand(*batch, -1)
        z, ladj = self.back(x.expand(*batch, -1), own)
        log_prior = self.log_prior(z, own, context)
        return Move(z, ladj, torch.where((own == u).all(-1), log_prior, torch.full_like(log_prior, -torch.inf)))

    def branches(self, x: Tensor, context: Tensor | None = None) -> Branches:
        u = self.cell(x)
        z, ladj, log_prior = self.pull(x, u, context)
        return Branches(z.unsqueeze(-2), (ladj + log_prior).unsqueeze(-1), u.unsqueeze(-2))

    def infer(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> dist.TorchDistribution:
        return Listed(self.cell(x).unsqueeze(-2), x.new_zeros(*x.shape[:-1], 1))

    def index_logits(self, x: Tensor, context: Tensor | None = None, law: Law | None = None) -> Tensor:
        own = nn.functional.one_hot(self.cell(x), self.choices).bool()
        return torch.where(own, 0.0, -torch.inf).to(x)


class Gated(Surjection):
    """A surjection with one entry in its index, whose probabilities a net gives from the base-side point and the context."""

    def __init__(self, dim: int, choices: int, context_dim: int, hidden_features: Sequence[int]) -> None:
        super().__init__(dim, 1, context_dim)
        self.choices = choices
        self.gate = MLP(dim + context_dim, choices, hidden_features)

    def _logits(self, z: Tensor, context: Tensor | None) -> Tensor:
        given = z if context is None else torch.cat([z, context.expand(*z.shape[:-1], -1)], -1)
        return self.gate(given).log_softmax(-1)

    def log_prior(self, z: Tensor, u: Tensor, context: Tensor | None) -> Tensor:
        return self._logits(z, context).gather(-1, u).squeeze(-1)

    def sample_index(self, z: Tensor, context: Tensor | None) -> Tensor:
        return dist.Categorical(logits=self._logits(z, context), validate_args=False).sample().unsqueeze(-1)


class Partition(Gated):
    r"""Cuts one coordinate at fixed points; a net says which piece a point goes to (real and discrete, RAD).

    The piece between two cuts :math:`a, b` is reached by :math:`a + (b - a)\,\sigma(z)`, the outermost two by :math:`a \pm \mathrm{softplus}(\pm z)`.
    The density may jump at the cuts, and the cuts themselves have no gradient: put them where the data have gaps.

    Args:
        dim: number of coordinates.
        cuts: increasing numbers.
        coordinate: the one that is cut.
        context_dim: size of a context; 0 for none.
        hidden_features: of the gate's net.

    Cost: one pass of the gate; exact at any depth. Starts with equal probabilities.

    Raises:
        OptionError: cuts that do not increase. ShapeError: no such coordinate.

    Reference: A RAD approach to deep mixture models (Dinh et al., 2019), https://arxiv.org/abs/1903.07714
    """

    cuts: Tensor

    def __init__(
        self, dim: int, cuts: Sequence[float], coordinate: int = 0, context_dim: int = 0, hidden_features: Sequence[int] = (32,)
    ) -> None:
        points = torch.as_tensor(cuts, dtype=torch.get_default_dtype())
        if points.dim() != 1 or not len(points) or not bool((points.diff() > 0).all() and points.isfinite().all()):
            raise OptionError(f"Partition: cuts must be increasing finite numbers, got {list(cuts)}")
        if not 0 <= coordinate < dim:
            raise ShapeError(f"Partition: coordinate must lie in 0..{dim - 1}, got {coordinate}")
        super().__init__(dim, len(points) + 1, context_dim, hidden_features)
        self.coordinate = coordinate
        self.register_buffer("cuts", points)

    def cell(self, x: Tensor) -> Tensor:
        return torch.bucketize(x[..., self.coordinate].contiguous(), self.cuts).unsqueeze(-1)

    def _with(self, x: Tensor, value: Tensor) -> Tensor:
        i = self.coordinate
        return torch.cat([x[..., :i], value.unsqueeze(-1), x[..., i + 1 :]], -1)

    def _ends(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lower and upper cut of the piece, and whether it is the first or the last."""
        last = len(self.cuts)
        lower, upper = self.cuts[(u - 1).clamp(min=0)], self.cuts[u.clamp(max=last - 1)]
        return lower, upper, u == 0, u == last

    def onto(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        t = z[..., self.coordinate]
        lower, upper, first, last = self._ends(u.squeeze(-1))
        softplus, log_sigmoid = nn.functional.softplus, nn.functional.logsigmoid
        width = (upper - lower).clamp(min=torch.finfo(t.dtype).tiny)
        inner = lower + width * t.sigmoid()
        value = torch.where(first, upper - softplus(-t), torch.where(last, lower + softplus(t), inner))
        slope = torch.where(first, log_sigmoid(-t), torch.where(last, log_sigmoid(t), width.log() + log_sigmoid(t) + log_sigmoid(-t)))
        return self._with(z, value), slope

    def back(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        value = x[..., self.coordinate]
        lower, upper, first, last = self._ends(u.squeeze(-1))
        eps = torch.finfo(value.dtype).eps
        width = (upper - lower).clamp(min=torch.finfo(value.dtype).tiny)
        share = ((value - lower) / width).clamp(eps, 1 - eps)
        below = torch.where(first, upper - value, torch.ones_like(value))  # before the inverse: where() would not mask its gradient
        above = torch.where(last, value - lower, torch.ones_like(value))
        t = torch.where(first, -_softplus_inverse(below), torch.where(last, _softplus_inverse(above), share.log() - torch.log1p(-share)))
        z = self._with(x, t)
        return z, -self.onto(z, u)[1]


class Abs(Partition):
    r"""The absolute value of one coordinate: :math:`|x_i| = \mathrm{softplus}(z)`, with a sign that a net draws.

    Args:
        dim, coordinate, context_dim, hidden_features: see :class:`Partition`.

    Cost: one pass of the net; exact at any depth. Reference: SurVAE flows (Nielsen et al., 2020), https://arxiv.org/abs/2007.02731
    """

    def __init__(self, dim: int, coordinate: int = 0, context_dim: int = 0, hidden_features: Sequence[int] = (32,)) -> None:
        super().__init__(dim, [0.0], coordinate, context_dim, hidden_features)

    def onto(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        t, sign = z[..., self.coordinate], 2 * u.squeeze(-1) - 1
        return self._with(z, sign * nn.functional.softplus(t)), nn.functional.logsigmoid(t)

    def back(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        z = self._with(x, _softplus_inverse(x[..., self.coordinate].abs()))
        return z, -self.onto(z, u)[1]


class Max(Gated):
    r"""The largest coordinate, and how far the others stay below it: a net draws which one is largest.

    .. math:: x_k = z_1, \qquad x_j = z_1 - \mathrm{softplus}(z_i) \quad (j \ne k, \text{ in order})

    Args:
        dim, context_dim, hidden_features: see :class:`Partition`.

    Cost: one pass of the net; exact at any depth. Reference: SurVAE flows (Nielsen et al., 2020), https://arxiv.org/abs/2007.02731
    """

    def __init__(self, dim: int, context_dim: int = 0, hidden_features: Sequence[int] = (32,)) -> None:
        super().__init__(dim, dim, context_dim, hidden_features)

    def cell(self, x: Tensor) -> Tensor:
        return x.argmax(-1, keepdim=True)

    def _order(self, u: Tensor) -> Tensor:
        """Positions in ``x`` of the entries of ``z``: the largest, then the others in order."""
        rank = torch.arange(self.dim - 1, device=u.device).expand(*u.shape[:-1], -1)
        return torch.cat([u, rank + (rank >= u).long()], -1)

    def onto(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        top, rest = z[..., :1], z[..., 1:]
        value = torch.cat([top, top - nn.functional.softplus(rest)], -1)
        return torch.zeros_like(z).scatter(-1, self._order(u), value), nn.functional.logsigmoid(rest).sum(-1)

    def back(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        value = x.gather(-1, self._order(u))
        top, rest = value[..., :1], value[..., 1:]
        z = torch.cat([top, _softplus_inverse(top - rest)], -1)
        return z, -self.onto(z, u)[1]


class Sort(Surjection):
    r"""The sorted coordinates, in a random order: densities that do not change when coordinates are exchanged.

    .. math:: s_1 = z_1, \quad s_i = s_{i-1} + \mathrm{softplus}(z_i), \qquad x = \text{a permutation of } s, \text{ all } D! \text{ equally probable}

    Args:
        dim: number of coordinates.

    Cost: a sort; exact at any depth. Reference: SurVAE flows (Nielsen et al., 2020), https://arxiv.org/abs/2007.02731
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        self.choices = dim

    def cell(self, x: Tensor) -> Tensor:
        return x.argsort(-1).argsort(-1)  # the rank of each coordinate

    def sample_index(self, z: Tensor, context: Tensor | None) -> Tensor:
        return torch.rand_like(z).argsort(-1)

    def log_prior(self, z: Tensor, u: Tensor, context: Tensor | None) -> Tensor:
        return z.new_full(z.shape[:-1], -math.lgamma(self.dim + 1))

    def listing(self) -> Tensor:
        if self.dim > 6:
            return torch.zeros(0, self.dim, dtype=torch.long)
        every = super().listing()
        return every[(every.sort(-1).values == torch.arange(self.dim)).all(-1)]

    def onto(self, z: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        steps = nn.functional.softplus(z[..., 1:])
        ordered = torch.cat([z[..., :1], steps], -1).cumsum(-1)
        return ordered.gather(-1, u), nn.functional.logsigmoid(z[..., 1:]).sum(-1)

    def back(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        ordered = x.sort(-1).values
        z = torch.cat([ordered[..., :1], _softplus_inverse(ordered.diff(dim=-1))], -1)
        return z, -self.onto(z, u)[1]
