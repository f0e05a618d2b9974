"""A perceptron whose Lipschitz constant is bounded, guaranteed and without state: what contractive residual layers add to the identity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from .mlp import check_widths

__all__ = ["LipSwish", "LipschitzMLP", "induced_norm", "mixed_norm", "spectral_norm"]

Norm = float | Sequence[float] | Literal["learned"]

SQUARINGS = 6  # of the Gram matrix: the exponent of the Schatten norm is 4 * 2 ** SQUARINGS


def spectral_norm(weight: Tensor) -> Tensor:
    r"""An upper bound of a matrix's spectral norm: its Schatten norm :math:`(\sum_i \sigma_i^p)^{1/p}` with :math:`p = 256`.

    It exceeds the largest singular value by a factor :math:`n^{1/256}` at most, 1.6 per cent for 64 equal ones, and is smooth. It is a power
    iteration of the Gram matrix by squaring: nothing is kept from call to call that an optimiser's step could make stale, and unlike a power
    iteration of vectors it never falls short.

    Shape: ``(m, n) -> ()``. Cost: 7 products of matrices of size ``min(m, n)``.

    Reference: Efficient bound of Lipschitz constant for convolutional layers by Gram iteration (Delattre et al., 2023),
    https://arxiv.org/abs/2305.16173
    """
    tiny = torch.finfo(weight.dtype).tiny
    gram = weight @ weight.mT if weight.shape[0] <= weight.shape[1] else weight.mT @ weight
    log_scale = weight.new_zeros(())
    for _ in range(SQUARINGS):
        size = gram.norm().clamp_min(tiny)
        gram = gram / size
        gram, log_scale = gram @ gram, 2 * (log_scale + size.log())
    return ((log_scale + gram.norm().clamp_min(tiny).log()) / 2 ** (SQUARINGS + 1)).exp()


def induced_norm(weight: Tensor, inverse_p: Tensor) -> Tensor:
    r"""An upper bound of :math:`\max_x \|Wx\|_p / \|x\|_p`, given :math:`1/p` in ``[0, 1]``: exact at 1 and infinity, and at 2 :func:`spectral_norm`.

    Between them it is interpolated by the theorem of Riesz and Thorin, for example
    :math:`\|W\|_p \le \|W\|_1^{2/p - 1} \|W\|_2^{2 - 2/p}` for :math:`1 \le p \le 2`, so it is an upper bound for every ``p``, and
    differentiable in it.
    """
    tiny = torch.finfo(weight.dtype).tiny
    sizes = weight.abs()
    log_1, log_2, log_inf = (n.clamp_min(tiny).log() for n in (sizes.sum(0).amax(), spectral_norm(weight), sizes.sum(1).amax()))
    a = 2 * inverse_p - 1
    to_1, to_inf = a.clamp_min(0.0), (-a).clamp_min(0.0)  # both have a slope at p = 2, so that a learned p can leave it
    return (to_1 * log_1 + (1 - to_1 - to_inf) * log_2 + to_inf * log_inf).exp()


def mixed_norm(weight: Tensor, p: float, q: float) -> Tensor:
    r"""An upper bound of :math:`\max_x \|Wx\|_q / \|x\|_p`, for :math:`p` and :math:`q` from 1 to infinity.

    It is exact where :math:`p = 1` (the largest :math:`q`-norm of a column) or :math:`q = \infty` (the largest norm of a row, of the exponent dual to
    :math:`p`), and :func:`spectral_norm` at :math:`p = q = 2`. For other :math:`p \le q` the theorem of Riesz and Thorin says that the logarithm is
    convex in :math:`(1/p, 1/q)`: it is interpolated on the line from :math:`(1/2, 1/2)` to one of those edges. For :math:`p > q` it is the smaller of
    :math:`n^{1/q - 1/p} \|W\|_{q \to q}` and :math:`m^{1/q - 1/p} \|W\|_{p \to p}`; the norm itself is hard to compute there.

    Shape: ``(m, n) -> ()``. Cost: that of :func:`spectral_norm`.
    """
    s, t = 1 / p, 1 / q
    if s < t:
        m, n = weight.shape
        return torch.minimum(n ** (t - s) * mixed_norm(weight, q, q), m ** (t - s) * mixed_norm(weight, p, p))
    share = max(2 * s - 1, 1 - 2 * t)  # of the edge, on the line from the middle
    if share == 0:
        return spectral_norm(weight)
    exponent, over = (0.5 + (t - 0.5) / share, 0) if 2 * s - 1 == share else (0.5 + (0.5 - s) / share, 1)
    scale = weight.detach().abs().amax().clamp_min(torch.finfo(weight.dtype).tiny)  # powers as high as 1 / exponent overflow, or vanish
    edge = scale * torch.linalg.vector_norm(weight / scale, 1 / exponent if exponent > 1e-12 else math.inf, over).amax()
    if share == 1:
        return edge
    tiny = torch.finfo(weight.dtype).tiny
    return edge.clamp_min(tiny) ** share * spectral_norm(weight).clamp_min(tiny) ** (1 - share)


class LipSwish(nn.Module):
    r"""The activation :math:`x\,\sigma(\beta x) / 1.1`, with a learned :math:`\beta > 0`: smooth, with Lipschitz constant below 1.

    Reference: Residual flows for invertible generative modeling (Chen et al., 2019), https://arxiv.org/abs/1906.02735
    """

    def __init__(self) -> None:
        super().__init__()
        self.raw_beta = nn.Parameter(torch.tensor(0.5))

    def beta(self) -> Tensor:
        """The sharpness, positive."""
        return F.softplus(self.raw_beta)

    def forward(self, x: Tensor) -> Tensor:
        return lip_swish(x, self.beta())


def lip_swish(x: Tensor, beta: Tensor) -> Tensor:
    """:class:`LipSwish` as a function; its slope is at most 1.0999 / 1.1 whatever beta."""
    return x * torch.sigmoid(beta * x) / 1.1


class LipschitzMLP(nn.Module):
    r"""A perceptron with :math:`\|g(x, c) - g(x', c)\|_p \le L \|x - x'\|_p`: a weight whose norm exceeds its share of ``L`` is scaled down to it.

    With a sequence of :math:`p` the norms are mixed: layer :math:`i` is bounded from the :math:`p_i`-norm of its input to the
    :math:`p_{i+1}`-norm of its output, the next layer's, and the last back to :math:`p_0`, which is the norm of the whole.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        hidden_features: widths of the hidden layers.
        context_dim: size of a context that moves every layer's bias, and so is free of the constraint; 0 for none.
        lipschitz: the bound :math:`L`; each of the ``n`` layers has an ``n``-th root of it.
        norm: the :math:`p` of the norm, from 1 to infinity; ``"learned"``; or one a layer, for mixed norms.

    Shape: ``x (*batch, in_features), context (*batch, context_dim) -> (*batch, out_features)``. Starts at zero.

    :meth:`tensors` gives all that a context determines, normalised once; :meth:`evaluate` is a pure function of them.

    References: Spectral normalization for generative adversarial networks (Miyato et al., 2018), https://arxiv.org/abs/1802.05957;
    Residual flows for invertible generative modeling (Chen et al., 2019), https://arxiv.org/abs/1906.02735
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_features: Sequence[int] = (64, 64),
        context_dim: int = 0,
        lipschitz: float = 0.97,
        norm: Norm = 2.0,
    ) -> None:
        super().__init__()
        if not 0 < lipschitz:
            raise OptionError(f"lipschitz must be positive, got {lipschitz}")
        sizes = (in_features, *check_widths(hidden_features), out_features)
        each = norm if isinstance(norm, (tuple, list)) else [norm] * (len(sizes) - 1)
        if norm != "learned" and (len(each) != len(sizes) - 1 or any(not isinstance(p, (int, float)) or not p >= 1 for p in each)):
            raise OptionError(f'norm must be a number from 1 to infinity, "learned", or one number for each of {len(sizes) - 1} layers, got {norm!r}')
        self.lipschitz, self.norm = lipschitz, norm
        self._norms = (*each, each[0])
        self.layers: Any = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)])
        self.activations: Any = nn.ModuleList([LipSwish() for _ in sizes[1:-1]])
        self.context = nn.Linear(context_dim, sum(sizes[1:]), bias=False) if context_dim else None
        if norm == "learned":
            self.raw_p = nn.Parameter(torch.zeros(()))
        with torch.no_grad():
            for parameter in self.layers[-1].parameters():
                parameter.zero_()
            if self.context is not None:
                self.context.weight[-out_features:] = 0.0

    def extra_repr(self) -> str:
        return f"lipschitz={self.lipschitz}, norm={self.norm!r}"

    def tensors(self, context: Tensor | None = None) -> tuple[Tensor, ...]:
        """The normalised weights, then the biases at the context, then the activations' betas: the arguments of :meth:`evaluate`."""
        biases = [layer.bias for layer in self.layers]
        if self.context is not None:
            shares = self.context(context).split([layer.out_features for layer in self.layers], -1)
            biases = [b + s for b, s in zip(biases, shares, strict=True)]
        ends = itertools.pairwise(self._norms)
        weights = [self._normalised(layer.weight, p, q) for layer, (p, q) in zip(self.layers, ends, strict=True)]
        return *weights, *biases, *(a.beta() for a in self.activations)

    def _normalised(self, weight: Tensor, p: float, q: float) -> Tensor:
        size = induced_norm(weight, torch.sigmoid(self.raw_p)) if self.norm == "learned" else mixed_norm(weight, p, q)
        share = self.lipschitz ** (1 / len(self.layers))
        return weight / (size / share).clamp_min(1.0)

    @staticmethod
    def evaluate(x: Tensor, *tensors: Tensor) -> Tensor:
        """The net at ``x`` as a function of what :meth:`tensors` gives."""
        depth = math.ceil(len(tensors) / 3)  # a weight and a bias each, and a beta between them
        weights, biases, betas = tensors[:depth], tensors[depth : 2 * depth], tensors[2 * depth :]
        for weight, bias, beta in zip(weights, biases, betas, strict=False):
            x = lip_swish(F.linear(x, weight) + bias, beta)
        return F.linear(x, weights[-1]) + biases[-1]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.evaluate(x, *self.tensors(context))
