"""Nets that say how fast a point moves, given the time: what continuous flows integrate."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import OptionError
from ..numerics import exact_divergence
from .masked import MaskedMLP
from .mlp import check_widths

__all__ = ["ACTIVATIONS", "AutoregressiveVelocity", "Time", "VelocityMLP"]

Time = float | Tensor  # a number, or a tensor that broadcasts to (*batch, 1)


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    y = torch.tanh(a)
    return y, 1 - y * y


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(a), torch.sigmoid(a)


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    s = torch.sigmoid(a)
    y = a * s
    return y, s + y * (1 - s)


ACTIVATIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"tanh": _tanh, "softplus": _softplus, "silu": _silu}  # value and slope


def in_time(linear: nn.Linear, t: Time, context: Tensor | None) -> Tensor:
    """A linear function of time and context, the time first: ``(H,)`` or ``(*batch, H)``."""
    by_time = t * linear.weight[:, 0]
    if context is not None:
        by_time = by_time + F.linear(context, linear.weight[:, 1:])
    return by_time if linear.bias is None else by_time + linear.bias


class _Layer(nn.Module):
    """``W h + b + U [t, c]``, and with ``squash`` the first term times ``sigmoid(V [t, c] + v)``."""

    def __init__(self, in_features: int, out_features: int, context_dim: int, squash: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features)
        self.shift = nn.Linear(1 + context_dim, out_features, bias=False)
        self.gate = nn.Linear(1 + context_dim, out_features) if squash else None

    def forward(self, h: Tensor, t: Time, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The output, and by what it scales the derivatives of ``W h``; ``None`` for one."""
        gate = None if self.gate is None else torch.sigmoid(in_time(self.gate, t, context))
        out = F.linear(h, self.linear.weight, self.linear.bias)
        return (out if gate is None else out * gate) + in_time(self.shift, t, context), gate


class VelocityMLP(nn.Module):
    """A perceptron whose every layer sees time and context.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of a context; 0 for none.
        hidden_features: widths of the hidden layers, at least one.
        activation: ``"tanh"``, ``"softplus"`` or ``"silu"``. With the first, points far out move at a bounded speed.
        layer: ``"concat"``: time and context shift each layer; ``"concat_squash"``: they also scale the hidden ones.

    Shape: ``t, x (*batch, D), context (*batch, C) -> (*batch, D)``; the time is a number, or broadcasts to ``(*batch, 1)``. Starts at zero.

    Derivatives go by the chain rule, in the same pass: :meth:`products` gives the Jacobian's products with given directions, and with one or two
    hidden layers the exact trace is as good as free in any dimension. Its gradient takes no second derivative by autograd.

    Reference: FFJORD: free-form continuous dynamics for scalable reversible generative models (Grathwohl et al., 2018),
    https://arxiv.org/abs/1810.01367
    """

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: str = "tanh",
        layer: Literal["concat", "concat_squash"] = "concat_squash",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise OptionError(f"activation={activation!r} is not known: choose one of {', '.join(ACTIVATIONS)}")
        if layer not in ("concat", "concat_squash"):
            raise OptionError(f'layer must be "concat" or "concat_squash", got {layer!r}')
        if not tuple(hidden_features):
            raise OptionError("hidden_features must name at least one layer")
        self.activation = activation
        sizes = (dim, *check_widths(hidden_features), dim)
        pairs, squash = list(itertools.pairwise(sizes)), layer == "concat_squash"
        layers = [_Layer(a, b, context_dim, squash and i < len(pairs) - 1) for i, (a, b) in enumerate(pairs)]
        self.layers: Any = nn.ModuleList(layers)
        last = layers[-1]
        for parameter in (*last.linear.parameters(), *last.shift.parameters()):
            nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        *hidden, last = self.layers
        for layer in hidden:
            x = ACTIVATIONS[self.activation](layer(x, t, context)[0])[0]
        return last(x, t, context)[0]

    def products(self, t: Time, x: Tensor, directions: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The velocity ``(*batch, D)``, and the Jacobian times each of the directions ``(K, *batch, D)``."""
        *hidden, last = self.layers
        for layer in hidden:
            x, gate = layer(x, t, context)
            x, slope = ACTIVATIONS[self.activation](x)
            directions = F.linear(directions, layer.linear.weight) * (slope if gate is None else slope * gate)
        return last(x, t, context)[0], F.linear(directions, last.linear.weight)

    @property
    def trace_products(self) -> int:
        """How many products of the Jacobian :meth:`velocity_and_trace` costs: none, or ``D`` with more than two hidden layers."""
        return 0 if len(self.layers) <= 3 else self.layers[0].linear.in_features

    def velocity_and_trace(self, t: Time, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""The velocity ``(*batch, D)``, and the trace of its Jacobian ``(*batch,)``.

        For two hidden layers the trace is a bilinear form of the activations' slopes: one product more with a matrix of the second layer's size,
        whatever ``D``. For one, it is linear in them.

        .. math:: \operatorname{tr}(W_3 \operatorname{diag}(s_2) W_2 \operatorname{diag}(s_1) W_1) = s_2^\top (W_2 \circ (W_1 W_3)^\top)\, s_1
        """
        if self.trace_products:
            divergence = exact_divergence(lambda x, directions: self.products(t, x, directions, context), x)
            return divergence.value, divergence.trace
        *hidden, last = self.layers
        slopes: list[Tensor] = []
        for layer in hidden:
            x, gate = layer(x, t, context)
            x, slope = ACTIVATIONS[self.activation](x)
            slopes.append(slope if gate is None else slope * gate)
        first, *middle, end = [layer.linear.weight for layer in self.layers]
        if middle:
            trace = (F.linear(slopes[0], middle[0] * (first @ end).mT) * slopes[1]).sum(-1)
        else:
            trace = slopes[0] @ (first * end.mT).sum(-1)
        return last(x, t, context)[0], trace


class AutoregressiveVelocity(nn.Module):
    r"""A velocity that depends on a coordinate itself and on those before it, so that the trace of its Jacobian is free.

    .. math:: f_i = s_i + \sum_{k=1}^{K} w_{ik} \tanh(a_k x_i + b_k + b_{ik}), \qquad (s_i, w_i, b_i) = \mathrm{net}(x_{<i}, t, c)

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of a context; 0 for none.
        hidden_features: widths of the net's hidden layers.
        units: the number :math:`K`.

    Shape: as :class:`VelocityMLP`. Starts at zero. Cost: one pass, with the trace.

    Reference: Neural networks with cheap differential operators (Chen and Duvenaud, 2019), https://arxiv.org/abs/1912.03579
    """

    def __init__(self, dim: int, context_dim: int = 0, hidden_features: Sequence[int] = (64, 64), units: int = 8) -> None:
        super().__init__()
        if not isinstance(units, int) or units < 1:
            raise OptionError(f"units must be a positive integer, got {units!r}")
        self.units = units
        self.net = MaskedMLP(dim, 1 + 2 * units, hidden_features, 1 + context_dim, nn.Tanh)
        self.slope = nn.Parameter(torch.linspace(0.5, 2.0, units))
        self.offset = nn.Parameter(torch.linspace(-2.0, 2.0, units))

    def extra_repr(self) -> str:
        return f"units={self.units}"

    def forward(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.velocity_and_trace(t, x, context)[0]

    def velocity_and_trace(self, t: Time, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The velocity ``(*batch, D)``, and the trace of its Jacobian ``(*batch,)``."""
        given = (x.new_zeros(x.shape[:-1] + (1,)) + t) if context is None else torch.cat([x.new_zeros(x.shape[:-1] + (1,)) + t, context], -1)
        shift, weight, offset = self.net(x, given).split([1, self.units, self.units], -1)
        y, slope = _tanh(self.slope * x.unsqueeze(-1) + self.offset + offset)
        return shift.squeeze(-1) + (weight * y).sum(-1), (weight * self.slope * slope).sum((-1, -2))
