"""The autoregressive conditioner: a masked perceptron whose hidden units are sorted by degree, so that decoding costs one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    ) -> None:
        super().__init__()
        self.dim, self.out_per_input, self.widths = dim, out_per_input, check_widths(hidden_features)
        lowest = 0 if context_dim or dim == 1 else 1  # units of degree 0 see the context alone
        degrees = [torch.arange(1, dim + 1)]
        degrees += [lowest + torch.arange(w) * (dim - lowest) // w for w in self.widths]
        self.opened = [[int((d <= i).sum()) for i in range(dim + 1)] for d in degrees]  # units open when i inputs are known
        out_degrees = torch.arange(dim).repeat_interleave(out_per_input)  # row i may see units of degree <= i
        sizes = (dim, *self.widths)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in itertools.pairwise(sizes)] + [nn.Linear(sizes[-1], dim * out_per_input)])
        for i, above in enumerate([*degrees[1:], out_degrees]):
            self.register_buffer(f"mask_{i}", (above[:, None] >= degrees[i][None, :]).to(torch.get_default_dtype()), persistent=False)
        self.context = nn.Linear(context_dim, sum(self.widths) + dim * out_per_input, bias=False) if context_dim else None
        self.activation = activation()
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        if self.context is not None:
            with torch.no_grad():
                self.context.weight[sum(self.widths) :] = 0.0

    def _masked(self) -> list[Tensor]:
        return [layer.weight * getattr(self, f"mask_{i}") for i, layer in enumerate(self.layers)]  # type: ignore[misc, return-value]

    def _offsets(self, context: Tensor | None) -> list[Tensor]:
        """What each layer adds to its matrix product: the bias, and the context's share."""
        biases = [layer.bias for layer in self.layers]
        if self.context is None or context is None:
            return biases  # type: ignore[return-value]
        shares = self.context(context).split([*self.widths, self.dim * self.out_per_input], -1)
        return [b + s for b, s in zip(biases, shares, strict=True)]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h, weights, offsets = x, self._masked(), self._offsets(context)
        for w, b in zip(weights[:-1], offsets[:-1], strict=True):
            h = self.activation(F.linear(h, w) + b)
        return (F.linear(h, weights[-1]) + offsets[-1]).unflatten(-1, (self.dim, self.out_per_input))

    def decode(self, solve: Callable[[int, Tensor], Tensor], batch: torch.Size, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Find the inputs one after the other, each from the outputs that the ones before it determine.

        Args:
            solve: ``solve(i, params)`` gives input ``i`` of shape ``batch`` from its outputs of shape ``(*batch, P)``.
            batch: batch shape.
            context: as in :meth:`forward`.

        Returns:
            The inputs ``(*batch, D)`` and all outputs ``(*batch, D, P)``, equal to ``forward`` at the inputs.
        """
        weights, offsets = self._masked(), self._offsets(context)
        p = self.out_per_input
        known: list[list[Tensor]] = [[] for _ in weights]  # activations by layer, in slices that opened together
        outputs = []
        if self.opened[-1][0]:  # units of degree 0 in all hidden layers, or none at all
            self._open(0, known, weights, offsets, batch)
        for i in range(self.dim):
            seen = _join(known[-1])
            row = offsets[-1][..., i * p : (i + 1) * p]
            if seen is not None:
                row = F.linear(seen, weights[-1][i * p : (i + 1) * p, : seen.shape[-1]]) + row
            outputs.append(row.expand(*batch, p))
            known[0].append(solve(i, outputs[-1]).unsqueeze(-1))
            self._open(i + 1, known, weights, offsets, batch)
        return torch.cat(known[0], -1), torch.stack(outputs, -2)

    def _open(self, i: int, known: list[list[Tensor]], weights: list[Tensor], offsets: list[Tensor], batch: torch.Size) -> None:
        """Evaluate the hidden units that open when ``i`` inputs are known, layer by layer."""
        for layer in range(1, len(weights)):
            start, stop = self.opened[layer][i - 1] if i else 0, self.opened[layer][i]
            if start == stop:
                continue
            below = _join(known[layer - 1])
            new = offsets[layer - 1][..., start:stop].expand(*batch, stop - start)
            if below is not None:
                new = new + F.linear(below, weights[layer - 1][start:stop, : below.shape[-1]])
            known[layer].append(self.activation(new))


def _join(parts: list[Tensor]) -> Tensor | None:
    """One tensor from slices, kept joined so that each slice is copied once a step."""
    if not parts:
        return None
    if len(parts) > 1:
        parts[:] = [torch.cat(parts, -1)]
    return parts[0]
