"""Transforms in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import OptionError, ShapeError, SupportError
from .base import FlowTransform

__all__ = ["Compose"]


class Compose(FlowTransform):
    r"""Applies transforms one after the other, base to target: :math:`y = f_n(\dots f_1(x))`.

    Args:
        parts: the transforms :math:`f_1, \dots, f_n`, of equal ``event_shape``; those with a context share one ``context_dim``.

    Cost: the sum of the parts'. Parts are reached by index, ``compose[0]``.

    Raises:
        OptionError: no parts, or a part that is not a ``FlowTransform``.
        ShapeError: parts of different ``event_shape`` or ``context_dim``.
        SupportError: parts of different manifolds, or of a manifold and of all of :math:`\mathbb{R}^D`.
    """

    def __init__(self, parts: Sequence[FlowTransform]) -> None:
        parts = list(parts)
        if not parts:
            raise OptionError("Compose: parts must hold at least one transform")
        for part in parts:
            if not isinstance(part, FlowTransform):
                raise OptionError(f"Compose: every part must be a pyro_flows FlowTransform, got {type(part).__name__}")
        shapes, contexts = {p.event_shape for p in parts}, {p.context_dim for p in parts} - {0}
        if len(shapes) > 1:
            raise ShapeError(f"Compose: parts have points of different shapes {sorted(map(tuple, shapes))}")
        if len(contexts) > 1:
            raise ShapeError(f"Compose: parts have different context_dims {sorted(contexts)}")
        if any(p.manifold != parts[0].manifold for p in parts):
            where = ", ".join(f"{type(p).__name__} on {p.manifold or 'R^D'}" for p in parts)
            raise SupportError(f"Compose: parts must live in the same place, got {where}: a flow of several sites has one flow for each")
        super().__init__(shapes.pop(), contexts.pop() if contexts else 0)
        self.parts: Any = nn.ModuleList(parts)
        self.domain, self.codomain, self.manifold = parts[0].domain, parts[-1].codomain, parts[0].manifold
        ways = {p.one_pass for p in parts} - {"both"}
        if len(ways) == 1:
            self.one_pass = ways.pop()

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> FlowTransform:
        return self._parts[index]

    @property
    def _parts(self) -> list[FlowTransform]:
        return [*self.parts]

    @property
    def layers(self) -> tuple[FlowTransform, ...]:
        return tuple(layer for part in self._parts for layer in part.layers)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[: -len(self.event_shape)])
        for part in self._parts:
            x, ladj = part.unchecked_forward(x, context if part.context_dim else None)
            total = total + ladj
        return x, total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(y.shape[: -len(self.event_shape)])
        for part in reversed(self._parts):
            y, ladj = part.unchecked_inverse(y, context if part.context_dim else None)
            total = total + ladj
        return y, total
