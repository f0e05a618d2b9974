"""The autoregressive structure, in both directions: MAF and IAF are the same layer seen from either side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError
from ..nets import MaskedMLP
from ..nets.decoding import Map, Terms, decode_in_place, pull_back, unroll
from ..nets.mlp import Activation
from ..numerics.introspection import is_traced
from ..univariate import Univariate
from .base import FlowTransform

__all__ = ["Autoregressive"]

_LARGE = 2**16  # products in a pass, for each coordinate, from which passes cost their arithmetic


class Ordered(FlowTransform):
    """What transforms share that move one coordinate after the other: the order, and the direction that takes one pass."""

    univariate: Univariate
    direction: str
    order: Tensor
    back: Tensor

    def _arrange(self, dim: int, direction: str, order: Tensor | None) -> None:
        """Say in which order coordinates move, by default ``0, 1, .., D-1``, and which direction takes one pass."""
        name = type(self).__name__
        if direction not in ("density", "sampling"):
            raise OptionError(f'{name}: direction must be "density" or "sampling", got {direction!r}')
        order = torch.arange(dim) if order is None else order
        if order.shape != (dim,) or not torch.equal(order.sort().values.cpu(), torch.arange(dim)):
            raise ShapeError(f"{name}: order must hold each of 0..{dim - 1} once, got {order.tolist()}")
        self.direction, self.one_pass = direction, "inverse" if direction == "density" else "forward"
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())

    def extra_repr(self) -> str:
        return f"{self.univariate}, {super().extra_repr()}, direction={self.direction!r}, order={self.order.tolist()}"


class Autoregressive(Ordered):
    r"""Moves each coordinate by a map that the coordinates before it determine.

    .. math:: y_i = f(x_i; \theta_i), \qquad \theta_i = \mathrm{net}(v_{<i}, c)

    With ``direction="density"`` the conditioner sees the target side, :math:`v = y` (MAF): the inverse, and so a density, takes one pass of the
    masked net. With ``direction="sampling"`` it sees the base side, :math:`v = x` (IAF): the forward map, and so a sample, takes one pass.

    The other direction finds the coordinates one by one; because hidden units are sorted by degree, that too costs the arithmetic of one pass. On
    accelerators, and for small batches, where launching :math:`D` steps costs more than their arithmetic, all coordinates are found at once by
    repeated passes (Jacobi iteration), which stop when nothing changes: after a few, at most :math:`D`. Gradients solve the triangular system of the
    implicit function theorem in one pass, from the last coordinate to the first.

    Args:
        univariate: the map :math:`f`, from :mod:`pyro_flows.univariate`.
        dim: number of coordinates :math:`D`.
        direction: ``"density"`` or ``"sampling"``: which direction takes one pass.
        order: the order of the coordinates, a permutation of ``0 .. D-1``; stacks alternate it with its reverse. By default ``0, 1, .., D-1``.
        context_dim: size of the context :math:`c`; 0 for none.
        hidden_features: widths of the conditioner's hidden layers.
        activation: makes the conditioner's activation.
        residual: whether the conditioner's hidden layers of equal width add up.

    Cost: one pass in the named direction; in the other the same arithmetic in :math:`D` dependent steps. In memory that other direction keeps its
    result between forward and backward, and :math:`O(H)` a point while it runs; traced, compiled, or differentiated twice it is the plain sequence of
    steps, and :math:`O(DH)`. Starts at the identity.

    References: Masked autoregressive flow for density estimation (Papamakarios et al., 2017), https://arxiv.org/abs/1705.07057;
    Improved variational inference with inverse autoregressive flow (Kingma et al., 2016), https://arxiv.org/abs/1606.04934
    """

    def __init__(
        self,
        univariate: Univariate,
        dim: int,
        direction: Literal["density", "sampling"] = "density",
        order: Tensor | None = None,
        context_dim: int = 0,
        hidden_features: Sequence[int] = (64, 64),
        activation: Activation = nn.SiLU,
        residual: bool = False,
    ) -> None:
        super().__init__(dim, context_dim)
        self.univariate = univariate
        self._arrange(dim, direction, order)
        self.net = MaskedMLP(dim, univariate.num_params, hidden_features, context_dim, activation, residual)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(x, context, self.univariate.forward, self.direction == "sampling")

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._map(y, context, self.univariate.inverse, self.direction == "density")

    def _map(self, value: Tensor, context: Tensor | None, apply: Map, one_pass: bool) -> tuple[Tensor, Tensor]:
        value, terms = value.index_select(-1, self.order), self.net.terms(context)
        if one_pass:  # the conditioner sees the argument
            mapped, log_slope = apply(value, self.net.evaluate(value, terms))
        elif is_traced() or next(self.net.activation.parameters(), None) is not None:
            mapped, log_slope = _unrolled(self.net, apply, value, terms)
        else:
            mapped, log_slope = _decode(self.net, apply, value, *terms.weights, *terms.offsets)
        return mapped.index_select(-1, self.back), log_slope.sum(-1)


def _unrolled(net: MaskedMLP, apply: Map, value: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    columns = value.reshape(-1, net.dim).mT.contiguous().unbind(0)
    return unroll(net, lambda i, params: apply(columns[i], params), value.shape[:-1], terms)


def _at_once(net: MaskedMLP, value: Tensor) -> bool:
    """Whether several passes are cheaper than ``D`` steps: where launching operations costs more than their arithmetic."""
    weights = sum(layer.weight.numel() for layer in net.layers)
    return value.device.type != "cpu" or value.numel() // net.dim * weights < _LARGE * net.dim


class _Decode(torch.autograd.Function):
    """The conditioner sees the result, which is found by a sequence; the gradient solves the triangular system of the implicit function theorem.

    With ``v_i = f(z_i, theta_i(v_<i))`` the gradient by ``v`` is that from outside plus what comes through the later ``theta``: a triangular system,
    solved from the last coordinate to the first, again at the cost of one pass.
    """

    @staticmethod
    def forward(ctx: Any, net: MaskedMLP, apply: Map, value: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        terms, rows, at_once = _terms(tensors), value.reshape(-1, net.dim), _at_once(net, value)
        mapped, log_slope = decode_in_place(net, apply, rows, terms, at_once)
        if at_once and not bool(mapped.isfinite().all()):  # a sweep may have overflowed on its way
            mapped, log_slope = decode_in_place(net, apply, rows, terms, False)
        mapped, log_slope = mapped.reshape(value.shape), log_slope.reshape(value.shape)
        ctx.net, ctx.map = net, apply
        ctx.save_for_backward(mapped, value, *tensors)
        return mapped, log_slope

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mapped, value, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled() or is_traced():  # a gradient of the gradient is asked for
            outputs = _unrolled(ctx.net, ctx.map, value, _terms(tensors))
            outputs, grads = zip(*((o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad), strict=True)
            wanted = [t for t in (value, *tensors) if t.requires_grad]
            gradients = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, materialize_grads=True))
            return None, None, *(next(gradients) if t.requires_grad else None for t in (value, *tensors))
        return None, None, *_gradient(ctx.net, ctx.map, mapped, value, _terms(tensors), *grads)


_decode: Callable[..., tuple[Tensor, Tensor]] = _Decode.apply


def _terms(tensors: Sequence[Tensor]) -> Terms:
    half = len(tensors) // 2
    return Terms(list(tensors[:half]), list(tensors[half:]))


def _gradient(net: MaskedMLP, apply: Map, mapped: Tensor, value: Tensor, terms: Terms, by_mapped: Tensor, by_slope: Tensor) -> list[Tensor]:
    """The gradient by ``value`` and by the terms."""
    with torch.enable_grad():
        z, params = value.detach().requires_grad_(), net.evaluate(mapped, terms).detach().requires_grad_()
        v, log_slope = apply(z, params)
        to_v = torch.autograd.grad(v.sum(), (z, params), retain_graph=True, materialize_grads=True)
        to_slope: Sequence[Tensor] = [torch.zeros_like(t) for t in (z, params)]
        if log_slope.requires_grad:
            to_slope = torch.autograd.grad(log_slope, (z, params), by_slope, materialize_grads=True)
    points, dim = value.shape[:-1].numel(), net.dim
    scale, shift = (t.reshape(points, dim, net.out_per_input).permute(1, 2, 0).contiguous() for t in (to_v[1], to_slope[1]))
    total = by_mapped.reshape(points, dim).mT.contiguous()

    def step(i: int, through: Tensor) -> Tensor:
        total[i] += through
        return torch.addcmul(shift[i], scale[i], total[i])

    by_terms = pull_back(net, mapped.reshape(points, dim), terms, step)
    by_value = total.mT.reshape(value.shape) * to_v[0] + to_slope[0]
    return [by_value, *by_terms.weights, *by_terms.offsets]
