"""What a guide does with each of its blocks in turn: find their layers, start them, fold them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..distributions import Flow
from ..transforms import Compose, FlowTransform, Standardize
from .block import Block, Layers, Start

__all__ = ["OfBlocks"]


class OfBlocks:
    """The part of a guide that knows its blocks. Its module ``flow`` holds their layers; by default there is one block, whose layers are all of them.

    Attributes:
        blocks: the blocks, in the order in which they depend on each other.
    """

    blocks: list[Block]
    _modules: dict[str, Any]

    # Parts of the flow, read past Pyro's module hooks: a parameter registered under two names would be stepped twice.

    @property
    def _parts(self) -> list[tuple[Block, Layers]]:
        """The blocks, each with its layers from the base to the sites."""
        return [(block, list(layers)) for block, layers in zip(self.blocks, self._layers_of(self._modules["flow"]), strict=True)]

    def _layers_of(self, flow: Any) -> list[Layers]:
        return [flow.transform.parts]

    @property
    def inner(self) -> list[FlowTransform]:
        """The layers between the base and those that hold location and spread: empty without a flow."""
        return [layer for block, layers in self._parts for layer in layers[: -block.num_outer]]

    @property
    def affine(self) -> FlowTransform | None:
        """The learned affine layer; ``None`` for a model without numbers."""
        return next((layers[-2] for block, layers in self._parts if block.manifold is None), None)

    @property
    def standardize(self) -> Standardize | None:
        """The fixed location and scale of the numbers; ``None`` without any."""
        return next((cast(Standardize, layers[-1]) for block, layers in self._parts if block.manifold is None), None)

    @property
    def loc(self) -> Tensor:
        """The point that the outermost layers put the guide around, ``(d,)``."""
        return self._join([block.loc(layers) for block, layers in self._parts]).clone()

    def _split(self, z: Tensor) -> Sequence[Tensor]:
        """The coordinates of each block."""
        return (z,)

    def _join(self, runs: Sequence[Tensor]) -> Tensor:
        """The inverse of :meth:`_split`."""
        return runs[0]

    @property
    def foldable(self) -> bool:
        """Whether what the affine layer has learned can be moved into the fixed one, see :meth:`fold`."""
        return all(block.foldable(layers) for block, layers in self._parts)

    def affine_flow(self) -> Flow:
        """The guide's distribution without the layers between the base and those of location and spread; it shares their parameters."""
        outer = [Compose(layers[-block.num_outer :]) for block, layers in self._parts]
        return Flow(self._modules["flow"].base, self._combine(outer))

    def _combine(self, parts: list[Compose]) -> FlowTransform:
        """One transform of the vector, from one for each block."""
        return parts[0]

    def lift(self, z: Tensor) -> tuple[Tensor, Tensor | float]:
        """The latent vector that a point of ``R^d`` stands for, and the log density that the point has beyond that of the vector.

        Numbers are themselves, angles are wrapped, and directions are divided by their lengths, log-normal and independent.
        """
        runs, extras = zip(*(block.lift(run) for (block, _), run in zip(self._parts, self._split(z), strict=True)), strict=True)
        return self._join(runs), sum(extras)

    def log_lengths(self) -> Tensor:
        """Logarithms of the lengths of the intervals that the coordinates of :meth:`lift`'s points live on, ``(d,)``: infinite but for angles."""
        lengths = torch.full_like(self.loc, torch.inf)
        for block in self.blocks:
            lengths[block.index.to(lengths.device)] = block.log_length
        return lengths

    @torch.no_grad()
    def start_at(self, loc: Tensor, scale_tril: Tensor, log_density: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Start at the Gaussian ``N(loc, scale_tril scale_tril^T)`` over :meth:`lift`'s points: numbers and angles have it, directions lie around its
        mean with its spread, and learned affine layers are set to the identity.

        With a ``log_density`` of such points, other modes of each angle and direction are looked for first.

        Returns:
            Whether there are directions that start evenly everywhere, since they are wide or have modes elsewhere than at a point and its antipode.
        """
        start, even = Start(loc, scale_tril, log_density), False
        before = torch.empty(0, dtype=torch.long, device=loc.device)
        for block, layers in self._parts:
            even |= block.start_at(layers, start, before)
            before = torch.cat([before, block.index.to(loc.device)])
        return even

    @torch.no_grad()
    def fold(self) -> None:
        """Move what the affine layer, a triangular one, has learned into the fixed one."""
        for block, layers in self._parts:
            block.fold(layers)
