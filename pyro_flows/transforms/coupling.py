"""The coupling structure: half of the coordinates decide how the other half moves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ShapeError
from ..nets import MLP, Hypernetwork
from ..nets.mlp import Activation
from ..univariate import Univariate
from .base import FlowTransform

__all__ = ["Coupling"]


def _as_runs(moved: Tensor) -> tuple[list[int], bool] | None:
    """The sizes of the two halves when one run of coordinates is kept and one moved, and whether the kept one stands first."""
    changes = int((moved[1:] != moved[:-1]).sum())
    if changes > 1:
        return None
    first = int((moved == moved[0]).cumprod(0).sum())
    kept_first = not bool(moved[0]) if changes else False
    sizes = [first, len(moved) - first]
    return sizes, kept_first


def check_moved(name: str, dim: int, moved: Tensor | None) -> Tensor:
    """Which coordinates move, the even ones by default; raises a ``ShapeError`` unless a boolean tensor ``(dim,)`` moves at least one."""
    moved = torch.arange(dim) % 2 == 0 if moved is None else moved
    if moved.shape != (dim,) or moved.dtype != torch.bool or not bool(moved.any()):
        remedy = ": in one dimension move the only coordinate, in every layer" if dim == 1 else ""
        raise ShapeError(f"{name}: moved must be a boolean tensor of shape ({dim},) with at least one true entry{remedy}")
    return moved


class Halved(nn.Module):
    """What transforms share that keep some coordinates and move the others: taking a point apart into the two, and joining them again."""

    kept_index: Tensor
    moved_index: Tensor
    back: Tensor

    def _divide(self, moved: Tensor) -> None:
        """Say which coordinates are moved."""
        # Integer indices, never boolean masks: those make graphs that no compiler can fix the shapes of.
        self.register_buffer("kept_index", (~moved).nonzero().squeeze(-1))
        self.register_buffer("moved_index", moved.nonzero().squeeze(-1))
        self.register_buffer("back", torch.cat([self.kept_index, self.moved_index]).argsort())
        self._runs = _as_runs(moved)

    def split(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """The kept and the moved coordinates of ``(*batch, D)``."""
        if self._runs is None:
            return value.index_select(-1, self.kept_index), value.index_select(-1, self.moved_index)
        parts = value.split(self._runs[0], -1)
        return parts if self._runs[1] else parts[::-1]

    def join(self, kept: Tensor, moved: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        if self._runs is None:
            return torch.cat([kept, moved], -1).index_select(-1, self.back)
        return torch.cat([kept, moved] if self._runs[1] else [moved, kept], -1)


class Coupling(Halved, FlowTransform):
    r"""Keeps some coordinates and moves the others by maps that the kept ones determine.

    .. math:: y_A = x_A, \qquad y_{B,i} = f(x_{B,i}; \theta_i), \quad \theta = \mathrm{net}(x_A, c)

    Args:
        univariate: the map :math:`f`, from :mod:`pyro_flows.univariate`.
        dim: number of coordinates :math:`D`.
        moved: boolean tensor of shape ``(D,)``, true where a coordinate is moved (the set :math:`B`, not empty). By default the even ones;
            stacks alternate it with its complement, so that every coordinate moves. Moving all of them (as ``dim=1`` does) is allowed: the
            parameters then depend on the context alone.
        context_dim: size of the context :math:`c`; 0 for none.
        hidden_features: widths of the conditioner's hidden layers.
        activation: makes the conditioner's activation.

    Cost: one pass of the conditioner in both directions. Starts at the identity.

    Reference: Density estimation using real NVP (Dinh et al., 2016), https://arxiv.org/abs/1605.08803
    """

    _inputs_per_kept = 1  # numbers that the conditioner sees of a kept coordinate

    def __init__(
        self,
        univariate: Univariate,
        dim: int,
        moved: Tensor | None = None,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
    ) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate
        moved = check_moved("Coupling", dim, moved)
        self._divide(moved)
        inputs, outputs = self._inputs_per_kept * len(self.kept_index) + context_dim, len(self.moved_index) * univariate.num_params
        self.net = MLP(inputs, outputs, hidden_features, activation) if inputs else Hypernetwork((outputs,))

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}, moved={self.moved_index.tolist()}"

    def _seen(self, kept: Tensor) -> Tensor:
        return kept

    def params(self, kept: Tensor, moved: Tensor, context: Tensor | None = None) -> Tensor:
        """The parameters of the map of each moved coordinate, ``(*moved.shape, P)``."""
        seen = self._seen(kept)
        given = seen if context is None else torch.cat([seen, context], -1)
        # One parameter of all coordinates after the other in memory: maps work through the parameters, not through the coordinates.
        return self.net(given).unflatten(-1, (self.univariate.num_params, moved.shape[-1])).mT.expand(*moved.shape, -1)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self.split(x)
        moved, log_slope = self.univariate.forward(moved, self.params(kept, moved, context))
        return self.join(kept, moved), log_slope.sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = self.split(y)
        moved, log_slope = self.univariate.inverse(moved, self.params(kept, moved, context))
        return self.join(kept, moved), log_slope.sum(-1)
