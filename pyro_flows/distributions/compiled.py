"""Transforms that run through ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from ..numerics.introspection import is_traced
from ..transforms import FlowTransform
from ..transforms.base import Conditioned

__all__ = ["Compiler", "Compiled"]

Fused = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


def _compile(apply: Fused) -> Fused:
    def run(value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return apply(value, context)

    # A code object of its own: dynamo counts recompilations by code object, so that a few flows would use up each other's.
    own = FunctionType(run.__code__.replace(), run.__globals__, run.__name__, None, run.__closure__)
    return torch.compile(own)


class Compiler:
    """The compiled maps of a transform, made when they are first needed; a copy or a pickle starts without any.

    A direction in which an autoregressive layer works step by step is not compiled: a graph of all steps takes minutes to make and wins little.
    """

    def __init__(self, transform: FlowTransform) -> None:
        self.transform = transform
        self._made: dict[str, Fused] = {}

    def __call__(self, way: str, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        apply: Fused = getattr(self.transform, f"{way}_and_ladj")
        if is_traced() or any(layer.one_pass not in ("both", way) for layer in self.transform.layers):
            return apply(value, context)
        if way not in self._made:
            self._made[way] = _compile(apply)
        return self._made[way](*self.transform._check(value, context))  # checked here, so that errors come from no compiler

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": {}}


class Compiled(Conditioned):
    """A transform at a context, or at none, whose maps go through a :class:`Compiler`."""

    def __init__(self, compiler: Compiler, context: Tensor | None) -> None:
        super().__init__(compiler.transform, context)
        self.compiler = compiler

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.compiler("forward", x, self.context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.compiler("inverse", y, self.context)
