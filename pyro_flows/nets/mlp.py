"""The plain conditioner: a multilayer perceptron that starts at zero."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import OptionError

__all__ = ["MLP", "Hypernetwork"]

Activation = Callable[[], nn.Module]


def check_widths(hidden_features: Sequence[int]) -> tuple[int, ...]:
    """The hidden widths as a tuple; raises an ``OptionError`` unless all are positive integers."""
    widths = tuple(hidden_features)
    if any(not isinstance(w, int) or w < 1 for w in widths):
        raise OptionError(f"hidden_features must be positive integers, got {widths}")
    return widths


class MLP(nn.Sequential):
    """A multilayer perceptron whose last layer starts at zero, so that what it conditions starts at the identity.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        hidden_features: widths of the hidden layers.
        activation: makes the activation module.

    Shape: ``(*batch, in_features) -> (*batch, out_features)``.
    """

    def __init__(
        self, in_features: int, out_features: int, hidden_features: Sequence[int] = (64, 64), activation: Activation = nn.SiLU
    ) -> None:
        sizes = (in_features, *check_widths(hidden_features))
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), activation()]
        last = nn.Linear(sizes[-1], out_features)
        nn.init.zeros_(last.weight), nn.init.zeros_(last.bias)
        super().__init__(*layers, last)


class Hypernetwork(nn.Module):
    """Parameters of a given shape, free when there is no context, plus a linear function of the context when there is one.

    Args:
        shape: shape of the parameters.
        context_dim: size of the context; 0 for none.

    Shape: ``context (*batch, context_dim) -> (*batch, *shape)``, or ``None -> shape``. Starts at zero.
    """

    def __init__(self, shape: Sequence[int], context_dim: int = 0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(*shape))
        self.linear = nn.Linear(context_dim, self.bias.numel(), bias=False) if context_dim else None
        if self.linear is not None:
            nn.init.zeros_(self.linear.weight)

    def forward(self, context: Tensor | None = None) -> Tensor:
        if self.linear is None or context is None:
            return self.bias
        return self.bias + self.linear(context).unflatten(-1, self.bias.shape)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.bias.shape)}"
