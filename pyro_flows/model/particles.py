"""Small things about values of many particles: gathered, compared, and why ``vmap`` refused them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .failures import in_a_line

__all__ = ["ByAutograd", "gather", "plainly", "same"]


class ByAutograd(torch.autograd.Function):
    """Values ``(N,)`` of a function of points ``(N, d)`` with slopes by plain autograd, for what ``torch.func`` cannot differentiate."""

    @staticmethod
    def forward(z: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            point = z.detach().requires_grad_()
            values = function(point)
            (slopes,) = torch.autograd.grad(values.sum(), point)
        return values.detach(), slopes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(output[1])
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor, None]:
        return slope.unsqueeze(-1) * ctx.saved_tensors[0], None


def plainly(error: Exception) -> str:
    """One line for what vmap says in many."""
    text = str(error)
    known = {
        "data-dependent control flow": "its control flow depends on the value of a latent site",
        ".item()": "it calls .item() (or float(), int()) on a latent value",
        "randomness": "it draws random numbers that nothing conditions",
        "dynamic": "the shape of a tensor depends on a latent value",
    }
    return next((plain for sign, plain in known.items() if sign in text), in_a_line(error, 200))


def gather(parts: list[Any], how: Callable[[list[Tensor]], Tensor]) -> Any:
    """Tensors, or dicts of them, put together by ``how``, such as ``torch.cat``."""
    if isinstance(parts[0], dict):
        return {k: how([part[k] for part in parts]) for k in parts[0]}
    return how(parts)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-8) -> bool:
    """Whether two values agree but for rounding; in single precision that is a thousandth."""
    tolerance = max(tolerance, 1e-3 if a.dtype in (torch.float32, torch.float16, torch.bfloat16) else 0.0)
    return bool(torch.isclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True).all())
