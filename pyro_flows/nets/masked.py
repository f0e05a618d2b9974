"""The autoregressive conditioner: a masked perceptron whose hidden units are sorted by degree, so that decoding costs one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from .decoding import Terms, unroll
from .mlp import Activation, check_widths

__all__ = ["MaskedMLP"]


class MaskedMLP(nn.Module):
    r"""A perceptron whose ``i``-th row of outputs depends on the inputs before ``i`` only (MADE).

    Hidden units carry a degree, the number of inputs they may see, in increasing order. So the units that open when input ``i`` becomes known
    are one contiguous slice, and :meth:`decode` finds all inputs in turn at the cost of a single pass: each weight is used once.

    Args:
        dim: number of inputs :math:`D`.
        out_per_input: outputs for each input :math:`P`.
        hidden_features: widths of the hidden layers.
        context_dim: size of a context that every unit may see; 0 for none.
        activation: makes the activation module.
        residual: whether a hidden layer as wide as the one before it adds that one's units to its own.

    Shape: ``x (*batch, D), context (*batch, C) -> (*batch, D, P)``. Starts at zero.

    Cost: :math:`O(DH + H^2 + HDP)` a point, for the pass and for decoding alike.

    Reference: MADE: masked autoencoder for distribution estimation (Germain et al., 2015), https://arxiv.org/abs/1502.03509
    """

    def __init__(
        self,
        dim: int,
        out_per_input: int,
        hidden_features: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: Activation = nn.SiLU,
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.dim, self.out_per_input, self.widths = dim, out_per_input, check_widths(hidden_features)
        lowest = 0 if context_dim or dim == 1 else 1  # units of degree 0 see the context alone
        degrees = [torch.arange(1, dim + 1)]
        degrees += [lowest + torch.arange(w) * (dim - lowest) // w for w in self.widths]
        self.opened = [[int((d <= i).sum()) for i in range(dim + 1)] for d in degrees]  # units open when i inputs are known
        sizes = (dim, *self.widths)
        self.added = [residual and i > 0 and a == b for i, (a, b) in enumerate(itertools.pairwise(sizes))]  # equal widths have equal degrees
        out_degrees = torch.arange(dim).repeat(out_per_input)  # output i may see units of degree <= i
        self.layers: Any = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)] + [nn.Linear(sizes[-1], dim * out_per_input)])
        for i, above in enumerate([*degrees[1:], out_degrees]):
            self.register_buffer(f"mask_{i}", (above[:, None] >= degrees[i][None, :]).to(torch.get_default_dtype()), persistent=False)
        self.context = nn.Linear(context_dim, sum(self.widths) + dim * out_per_input, bias=False) if context_dim else None
        self.activation = activation()
        if not getattr(self.activation, "elementwise", True):
            raise OptionError(f"MaskedMLP: {type(self.activation).__name__} mixes units that may see different inputs: use an elementwise activation")
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        if self.context is not None:
            with torch.no_grad():
                self.context.weight[sum(self.widths) :] = 0.0

    def masks(self) -> list[Tensor]:
        """The matrices of zeros and ones, one for each layer, that its weights are multiplied by."""
        return [getattr(self, f"mask_{i}") for i in range(len(self.layers))]

    def terms(self, context: Tensor | None = None) -> Terms:
        """What each layer does to its input: the masked matrix, and what is added, the bias and the context's share."""
        layers: list[nn.Linear] = [*self.layers]
        weights = [layer.weight * mask for layer, mask in zip(layers, self.masks(), strict=True)]
        offsets: list[Tensor] = [layer.bias for layer in layers]
        if self.context is not None and context is not None:
            shares = self.context(context).split([*self.widths, self.dim * self.out_per_input], -1)
            offsets = [b + s for b, s in zip(offsets, shares, strict=True)]
        return Terms(weights, offsets)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.evaluate(x, self.terms(context))

    def evaluate(self, x: Tensor, terms: Terms) -> Tensor:
        """The outputs ``(*batch, D, P)`` at ``x``, given the layers' terms."""
        h = x
        *hidden, last = zip(terms.weights, terms.offsets, strict=True)
        for (weight, offset), added in zip(hidden, self.added, strict=True):
            new = self.activation(_affine(h, weight, offset))
            h = h + new if added else new
        return _affine(h, *last).unflatten(-1, (self.out_per_input, self.dim)).mT

    def decode(
        self, step: Callable[[int, Tensor], tuple[Tensor, Tensor]], batch: torch.Size, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find the inputs one after the other, each from the outputs that the ones before it determine.

        Args:
            step: ``step(i, params)`` gives input ``i``, and any number that goes with it, both ``(points,)``, from the outputs
                ``(points, P)`` of input ``i``.
            batch: batch shape, of so many points.
            context: as in :meth:`forward`.

        Returns:
            The inputs, and the numbers that go with them, both ``(*batch, D)``.
        """
        return unroll(self, step, batch, self.terms(context))


def _affine(x: Tensor, weight: Tensor, offset: Tensor) -> Tensor:
    return F.linear(x, weight, offset) if offset.dim() == 1 else F.linear(x, weight) + offset
