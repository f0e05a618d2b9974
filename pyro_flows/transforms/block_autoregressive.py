"""The block neural autoregressive flow, onto all of R^D, and inverted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..nets import Hypernetwork
from ..nets.mlp import check_widths
from ..numerics import invert_monotone
from ..univariate.affine import soft_clamp
from .base import FlowTransform
from .planar import above_minus_one

__all__ = ["BlockAutoregressive"]

_MAX_LOG_SHARPNESS = 3.0  # of a unit's kappa, in natural logarithms


class Layer(NamedTuple):
    """A hidden layer: weights on the blocks before ``(D, n, D, m)`` and on the own ``(D, n, m)``, biases and sharpnesses ``(..., D, n)``."""

    across: Tensor
    within: Tensor
    bias: Tensor
    sharpness: Tensor


class BlockAutoregressive(FlowTransform):
    r"""One masked network as the map itself: each coordinate owns a block of units in every layer, and sees the blocks before its own freely.

    .. math:: h^{l}_{i} = \kappa^{-1} \tanh(\kappa p), \quad p = P^{l}_{ii} h^{l-1}_{i} + \sum_{j < i} W^{l}_{ij} h^{l-1}_{j} + b^l_i, \quad h^0 = x;
        \qquad y_i = x_i + c_i^\top h^L_i + \sum_{j < i} V_{ij} h^L_j + t_i

    The diagonal blocks :math:`P_{ii}` are positive with rows that sum to one, so that every unit increases with its own coordinate with a slope in
    (0, 1]. The weights :math:`c_i` may have either sign but sum to more than -1, hence :math:`0 < \partial y_i / \partial x_i`, and the residual
    :math:`x_i` makes the range all of :math:`\mathbb{R}`, which a plain network of bounded units misses. The log-det is the sum of
    :math:`\log(1 + c_i^\top \partial h^L_i / \partial x_i)`: products of small slopes are added to one, so none underflows to :math:`\log 0`.

    Args:
        dim: number of coordinates :math:`D`.
        hidden_factors: units of each hidden layer, per coordinate.
        context_dim: size of the context that :math:`b, \kappa, c, t` may depend on (linearly); 0 for none.

    Cost: forward one pass of a net with ``dim * hidden_factors`` units; the way back finds the coordinates one by one, each by a scalar equation that
    needs its own blocks only: :math:`D` dependent steps that take the arithmetic of a few passes. For a cheap density use ``.inv``.
    Domain: all of :math:`\mathbb{R}^D`. Starts at the identity.

    Raises:
        OptionError: ``hidden_factors`` is empty or holds anything but positive integers.

    Reference: Block neural autoregressive flow (De Cao et al., 2019), https://arxiv.org/abs/1904.04676
    """

    one_pass = "forward"
    below: Tensor

    def __init__(self, dim: int, hidden_factors: Sequence[int] = (8, 8), context_dim: int = 0) -> None:
        super().__init__(dim, context_dim)
        self.factors = check_widths(hidden_factors)
        if not self.factors:
            raise OptionError("BlockAutoregressive: hidden_factors must name at least one hidden layer")
        sizes = (1, *self.factors)
        self.register_buffer("below", torch.ones(dim, dim).tril(-1)[:, None, :, None], persistent=False)
        self.across = nn.ParameterList([torch.randn(dim, n, dim, m) / (dim * m) ** 0.5 for m, n in zip(sizes[:-1], sizes[1:], strict=True)])
        self.within = nn.ParameterList([torch.randn(dim, n, m) for m, n in zip(sizes[1:-1], sizes[2:], strict=True)])
        self.out = nn.Parameter(torch.zeros(dim, dim, sizes[-1]))
        self.splits = [*self.factors, *self.factors, sizes[-1], 1]
        self.vectors = Hypernetwork((dim, sum(self.splits)), context_dim)
        with torch.no_grad():  # units that differ; the weights of the last layer stay zero
            self.vectors.bias[:, : sum(self.factors)] = torch.randn(dim, sum(self.factors))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden_factors={self.factors}"

    def _parts(self, context: Tensor | None) -> tuple[list[Layer], Tensor, Tensor, Tensor]:
        """The hidden layers, and the last one's weights on other coordinates ``V``, on the own ``c``, and its shift ``t``."""
        across = [w * self.below for w in self.across]
        within = [torch.ones_like(across[0][:, :, 0]), *(w.softmax(-1) for w in self.within)]
        *units, raw, shift = self.vectors(context).split(self.splits, -1)
        depth = len(self.factors)
        sharpness = [soft_clamp(k, _MAX_LOG_SHARPNESS).exp() for k in units[depth:]]
        layers = [Layer(*parts) for parts in zip(across, within, units[:depth], sharpness, strict=True)]
        return layers, self.out * self.below.squeeze(1), above_minus_one(raw) / self.factors[-1], shift.squeeze(-1)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers, v, c, shift = self._parts(context)
        h = x.unsqueeze(-1)
        slope = torch.ones_like(h)
        for layer in layers:
            offset = layer.bias + torch.einsum("injm,...jm->...in", layer.across, h)
            h, slope = _units(h, slope, layer.within, offset, layer.sharpness)
        y = x + (c * h).sum(-1) + torch.einsum("ijm,...jm->...i", v, h) + shift
        return y, (c * slope).sum(-1).log1p().sum(-1)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        layers, v, c, shift = self._parts(context)
        batch = y.shape[:-1]
        c, offsets = c.expand(*batch, -1, -1), [layer.bias.expand(*batch, -1, -1) for layer in layers]  # grow by the coordinates that are known
        within, sharpness = [w.within.expand(*batch, -1, -1, -1) for w in layers], [w.sharpness.expand(*batch, -1, -1) for w in layers]
        rest, solved, slopes = y - shift, [], []
        for i in range(self.dim):
            blocks = [b for p, o, k in zip(within, offsets, sharpness, strict=True) for b in (p[..., i, :, :], o[..., i, :], k[..., i, :])]
            x = invert_monotone(_own_map, rest[..., i], c[..., i, :], *blocks)
            hidden, slope = _own_units(x, *blocks)
            inputs = [x.unsqueeze(-1), *hidden[:-1]]
            offsets = [o + torch.einsum("knm,...m->...kn", layer.across[:, :, i], h) for o, layer, h in zip(offsets, layers, inputs, strict=True)]
            rest = rest - torch.einsum("km,...m->...k", v[:, i], hidden[-1])
            solved.append(x)
            slopes.append((c[..., i, :] * slope).sum(-1))
        return torch.stack(solved, -1), -torch.stack(slopes, -1).log1p().sum(-1)


def _own_units(x: Tensor, *blocks: Tensor) -> tuple[list[Tensor], Tensor]:
    """A coordinate's units in every layer, the coordinates before it known, and the slopes of the last layer's.

    The blocks are ``within, offset, sharpness`` of each layer in turn.
    """
    h, hidden = x.unsqueeze(-1), []
    slope = torch.ones_like(h)
    for within, offset, sharpness in zip(blocks[::3], blocks[1::3], blocks[2::3], strict=True):
        h, slope = _units(h, slope, within, offset, sharpness)
        hidden.append(h)
    return hidden, slope


def _own_map(x: Tensor, c: Tensor, *blocks: Tensor) -> tuple[Tensor, Tensor]:
    """What a coordinate's own units make of it, and the log slope."""
    hidden, slope = _own_units(x, *blocks)
    return x + (c * hidden[-1]).sum(-1), (c * slope).sum(-1).log1p()


def _units(h: Tensor, slope: Tensor, within: Tensor, offset: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    """The units of a layer and their slopes in their own coordinate, from those below."""
    t = (sharpness * (torch.einsum("...nm,...m->...n", within, h) + offset)).tanh()
    return t / sharpness, (1 - t * t) * torch.einsum("...nm,...m->...n", within, slope)
