"""Transforms in a row."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..errors import OptionError, ShapeError, SupportError
from .base import FlowTransform, Inverse

__all__ = ["Compose", "layers_of"]


class Compose(FlowTransform):
    r"""Applies transforms one after the other, base to target: :math:`y = f_n(\dots f_1(x))`.

    Args:
        parts: the transforms :math:`f_1, \dots, f_n`, of equal ``dim``; those with a context share one ``context_dim``.

    Cost: the sum of the parts'. Parts are reached by index, ``compose[0]``.

    Raises:
        OptionError: no parts, or a part that is not a ``FlowTransform``.
        ShapeError: parts of different ``dim`` or ``context_dim``.
        SupportError: parts of different manifolds, or of a manifold and of all of :math:`\mathbb{R}^D`.
    """

    def __init__(self, parts: Sequence[FlowTransform]) -> None:
        parts = list(parts)
        if not parts:
            raise OptionError("Compose: parts must hold at least one transform")
        for part in parts:
            if not isinstance(part, FlowTransform):
                raise OptionError(f"Compose: every part must be a pyro_flows FlowTransform, got {type(part).__name__}")
        dims, contexts = {p.dim for p in parts}, {p.context_dim for p in parts} - {0}
        if len(dims) > 1:
            raise ShapeError(f"Compose: parts have different dims {sorted(dims)}")
        if len(contexts) > 1:
            raise ShapeError(f"Compose: parts have different context_dims {sorted(contexts)}")
        if any(p.manifold != parts[0].manifold for p in parts):
            places = ", ".join(f"{type(p).__name__} on {p.manifold or 'R^D'}" for p in parts)
            raise SupportError(f"Compose: parts must live in the same place, got {places}: a flow of several sites has one flow for each")
        super().__init__(dims.pop(), contexts.pop() if contexts else 0)
        self.parts = nn.ModuleList(parts)
        self.domain, self.codomain, self.manifold = parts[0].domain, parts[-1].codomain, parts[0].manifold
        ways = {p.one_pass for p in parts} - {"both"}
        self.one_pass = ways.pop() if len(ways) == 1 else "both"  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> FlowTransform:
        return self.parts[index]  # type: ignore[return-value]

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[:-1])
        for part in self.parts:
            x, ladj = part.forward_and_ladj(x, context if part.context_dim else None)  # type: ignore[operator]
            total = total + ladj
        return x, total

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = y.new_zeros(y.shape[:-1])
        for part in reversed(self.parts):
            y, ladj = part.inverse_and_ladj(y, context if part.context_dim else None)  # type: ignore[operator]
            total = total + ladj
        return y, total


def layers_of(transform: FlowTransform) -> list[FlowTransform]:
    """The transforms that a transform is composed of, base to target, with compositions, and inverses of them, taken apart at every depth."""
    if isinstance(transform, Inverse) and isinstance(transform.transform, Compose):
        return [layer.inv for layer in reversed(layers_of(transform.transform))]
    if not isinstance(transform, Compose):
        return [transform]
    return [layer for part in transform.parts for layer in layers_of(part)]  # type: ignore[arg-type]
