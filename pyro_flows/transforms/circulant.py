"""Circular convolution, by the fast Fourier transform."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .linear import Linear, zeros

__all__ = ["CirculantLinear"]


class CirculantLinear(Linear):
    r"""A circular convolution: :math:`y_i = \sum_j w_{(i-j) \bmod D}\, x_j + t_i`, whose matrix is circulant.

    The filter is given by its spectrum, :math:`\hat w_k = e^{a_k + i \varphi_k}` for :math:`k = 0, \dots, \lfloor D/2 \rfloor`, with
    :math:`\varphi = 0` at the frequencies where a real filter's spectrum is real (0, and :math:`D/2` for even :math:`D`): :math:`D` numbers for the
    :math:`D` taps. It is never 0, so the layer is always invertible. The inverse is the filter of spectrum :math:`1/\hat w`;
    :math:`\log|\det|` is the sum of :math:`\log|\hat w_k|` over all :math:`D` frequencies; the
    condition number is :math:`e^{\max a - \min a}`.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context that all parameters may depend on (linearly); 0 for none.

    Cost: :math:`O(D \log D)` a point in both directions. Starts at the identity.

    Reference: Invertible convolutional flow (Karami et al., 2019),
    https://papers.neurips.cc/paper/2019/hash/b1f62fa99de9f27a048344d55c5ef7a6-Abstract.html

    Example:
        >>> import torch
        >>> layer = CirculantLinear(4)
        >>> layer.log_gain.data = torch.tensor([3.0, 1.0, 0.5]).log()
        >>> layer.weight()[:2].detach()
        tensor([[1.3750, 0.6250, 0.3750, 0.6250],
                [0.6250, 1.3750, 0.6250, 0.3750]])
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(dim, context_dim, log_gain=zeros(dim // 2 + 1), phase=zeros((dim - 1) // 2), shift=zeros(dim))

    def _log_det(self, at: Any) -> Tensor:
        twice = at.log_gain[..., 1 : 1 + at.phase.shape[-1]]  # all but the real frequencies stand for two
        return at.log_gain.sum(-1) + twice.sum(-1)

    def _filter(self, x: Tensor, log_gain: Tensor, phase: Tensor) -> Tensor:
        if x.numel() == 0:  # which not every FFT library takes
            return x
        turned = nn.functional.pad(phase, (1, log_gain.shape[-1] - 1 - phase.shape[-1]))
        return torch.fft.irfft(torch.fft.rfft(x) * torch.polar(log_gain.exp(), turned), n=self.dim)

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return self._filter(x, at.log_gain, at.phase)

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return self._filter(y, -at.log_gain, -at.phase)
