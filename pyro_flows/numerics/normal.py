"""The normal distribution far out: its quantile from a log probability, and Mills' ratio, differentiable in the tails."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["log_ndtr", "mills", "ndtri_exp"]

_FAR = 8.0  # beyond, a probability is one in double precision; and erfcx of it would overflow once squared


def mills(x: Tensor) -> Tensor:
    r"""Mills' ratio :math:`(1 - \Phi(x)) / \varphi(x)`, which falls as :math:`1/x`; constant below -8, where it is above 1e14."""
    return math.sqrt(math.pi / 2) * torch.special.erfcx(x.clamp(min=-_FAR) / math.sqrt(2))


class _LogNdtr(torch.autograd.Function):
    """torch's own derivative is a difference of squares: nothing is left of it beyond a thousand in single precision."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.special.log_ndtr(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / mills(-ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _LogNdtr.apply(x), in_dims[0]  # type: ignore[no-untyped-call]


def log_ndtr(x: Tensor) -> Tensor:
    r""":math:`\log\Phi(x)`, as ``torch.special.log_ndtr``, with derivatives that are right in the tails too."""
    return _LogNdtr.apply(x)  # type: ignore[no-untyped-call]


class _Quantile(torch.autograd.Function):
    """The quantile as one node, with the derivative ``Phi(q) / phi(q)``, of any order since it is a function of the output."""

    @staticmethod
    def forward(log_p: Tensor) -> Tensor:
        near = torch.special.ndtri(log_p.clamp(min=-80.0).exp())
        t = (-2 * log_p.clamp(max=-40.0)).sqrt()
        far = -(t * t - math.log(2 * math.pi) - 2 * t.log()).sqrt()
        q = torch.where(log_p > -60.0, near, far)
        for _ in range(2):
            q = q - (torch.special.log_ndtr(q) - log_p) * mills(-q)
        return q

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * mills(-ctx.saved_tensors[0])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], log_p: Tensor) -> tuple[Tensor, int]:
        return _Quantile.apply(log_p), in_dims[0]  # type: ignore[no-untyped-call]


def ndtri_exp(log_p: Tensor) -> Tensor:
    r""":math:`\Phi^{-1}(e^{\ell})` for :math:`\ell \le \log\frac12`, finite however small the probability is."""
    return _Quantile.apply(log_p)  # type: ignore[no-untyped-call]
