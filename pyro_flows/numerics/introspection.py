"""What a module holds, and who looks on while it computes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["floating_tensor", "is_traced", "tensors_of"]


def is_traced() -> bool:
    """Whether a compiler, a tracer or a function transform looks on, which wants to see a plain sequence of operations."""
    return (
        torch.compiler.is_compiling()
        or get_proxy_mode() is not None
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )


def tensors_of(module: nn.Module) -> list[Tensor]:
    """All parameters and buffers, many times faster than ``parameters()``, which also names them and drops duplicates."""
    tensors, modules = [], [module]
    for parent in modules:  # grows on the way
        for tensor in (*parent._parameters.values(), *parent._buffers.values()):
            if tensor is not None:
                tensors.append(tensor)
        for child in parent._modules.values():
            if child is not None:
                modules.append(child)
    return tensors


def floating_tensor(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter, or else buffer; ``None`` where there is neither. It says dtype and device of the whole."""
    buffers: list[Tensor | None] = []
    modules = [module]
    while modules:
        parent = modules.pop()
        for parameter in parent._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter
        buffers += parent._buffers.values()
        modules += [child for child in reversed(parent._modules.values()) if child is not None]
    return next((tensor for tensor in buffers if tensor is not None and tensor.is_floating_point()), None)
