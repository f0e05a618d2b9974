"""The normal distribution far out: its quantile from a log probability, and Mills' ratio, differentiable in the tails."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["log_ndtr", "mills", "ndtri_exp"]

_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)
_FAR = 8.0  # beyond, a probability is one in double precision; and erfcx of it would overflow once squared


def mills(x: Tensor) -> Tensor:
    r"""Mills' ratio :math:`(1 - \Phi(x)) / \varphi(x)`, which falls as :math:`1/x`; constant below -8, where it is above 1e14."""
    return math.sqrt(math.pi / 2) * torch.special.erfcx(x.clamp(min=-_FAR) / math.sqrt(2))


def log_ndtr(x: Tensor) -> Tensor:
    r""":math:`\log\Phi(x)`, as ``torch.special.log_ndtr``, whose derivative is noise beyond a thousand in single precision."""
    low, high = x.clamp(max=0.0), x.clamp(min=0.0, max=_FAR)  # before evaluating: where() would not mask the gradient
    lower = mills(-low).log() - 0.5 * low * low - _LOG_ROOT_2PI
    upper = torch.log1p(-mills(high) * (-0.5 * high * high - _LOG_ROOT_2PI).exp())
    return torch.where(x < 0, lower, upper)


def _quantile(log_p: Tensor) -> Tensor:
    near = torch.special.ndtri(log_p.clamp(min=-80.0).exp())
    t = (-2 * log_p.clamp(max=-40.0)).sqrt()
    far = -(t * t - 2 * _LOG_ROOT_2PI - 2 * t.log()).sqrt()
    return _newton(_newton(torch.where(log_p > -60.0, near, far), log_p), log_p)


def _newton(q: Tensor, log_p: Tensor) -> Tensor:
    return q - (log_ndtr(q) - log_p) * mills(-q)


class _Quantile(torch.autograd.Function):
    """The quantile as one node, with the derivative ``Phi(q) / phi(q)``, of any order since it is a function of the output."""

    @staticmethod
    def forward(log_p: Tensor) -> Tensor:
        return _quantile(log_p)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return tangents[0] * mills(-ctx.saved_tensors[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * mills(-ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], log_p: Tensor) -> tuple[Tensor, int]:
        return _quantile_node(log_p), in_dims[0]


_quantile_node: Callable[[Tensor], Tensor] = _Quantile.apply


def ndtri_exp(log_p: Tensor) -> Tensor:
    r""":math:`\Phi^{-1}(e^{\ell})` for :math:`\ell \le \log\frac12`, finite however small the probability is."""
    if torch.compiler.is_compiling():  # Dynamo makes an instance of every Function, which torch warns of; two steps: right up to the third order
        return _newton(_newton(_quantile(log_p.detach()).detach(), log_p), log_p)
    return _quantile_node(log_p)
