"""What a module holds, and who looks on while it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["is_traced", "tensors_of"]


def is_traced() -> bool:
    """Whether a compiler, a tracer or a function transform looks on, which wants to see a plain sequence of operations."""
    return (
        torch.compiler.is_compiling()
        or get_proxy_mode() is not None
        or torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        or torch._C._are_functorch_transforms_active()
    )


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, many times faster than ``parameters()``, which also names them and drops duplicates."""
    found = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
    for child in module._modules.values():
        if child is not None:
            found += tensors_of(child)
    return found
