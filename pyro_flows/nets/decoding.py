"""Decoding a masked net: its inputs one after the other, and the gradient of that, each at the cost of one pass.

Everything is laid out units first, ``(units, points)``: the units that open together are then neighbouring rows.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["Decodable", "Terms", "unroll", "decode_in_place", "pull_back"]

Step = Callable[[int, Tensor], tuple[Tensor, Tensor]]
Map = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Addmm = tuple[Tensor, Tensor, Tensor]  # what is added, and the two factors


class Terms(NamedTuple):
    """The layers' matrices, and what each adds to its product: ``(units,)``, or ``(*batch, units)`` where there is a context."""

    weights: list[Tensor]
    offsets: list[Tensor]


class Decodable(Protocol):
    """What decoding knows of a masked net whose hidden units are sorted by how many inputs they may see.

    Attributes:
        dim: number of inputs ``D``.
        out_per_input: outputs of each input ``P``.
        widths: of the hidden layers.
        opened: for the inputs and each hidden layer, how many of its units see no more than the first ``i`` inputs, for ``i`` from 0 to ``D``.
        added: for each hidden layer, whether it adds the units below to its own.
        activation: of the hidden units.
    """

    dim: int
    out_per_input: int
    widths: tuple[int, ...]
    opened: list[list[int]]
    added: list[bool]
    activation: nn.Module

    def masks(self) -> list[Tensor]:
        """One for each layer, zero where an output may not see an input."""
        ...


def _columns(offsets: list[Tensor]) -> list[Tensor]:
    """Offsets as columns: ``(units, 1)`` or ``(units, points)``."""
    return [o.unsqueeze(-1) if o.dim() == 1 else o.flatten(0, -2).mT for o in offsets]


def _by_input(rows: Tensor, dim: int) -> Tensor:
    """Output rows regrouped: all outputs of input 0, then of input 1, .."""
    return rows.unflatten(0, (-1, dim)).transpose(0, 1).flatten(0, 1)


def unroll(net: Decodable, step: Step, batch: torch.Size, terms: Terms) -> tuple[Tensor, Tensor]:
    """Find the inputs one after the other (``MaskedMLP.decode``), each by operations that autograd and tracers can follow.

    Args:
        net: the net, for its structure and activation.
        step: gives input ``i``, and a number that goes with it, both ``(points,)``, from its outputs ``(points, P)``.
        batch: batch shape, of so many points.
        terms: the layers' terms.
    """
    dim, p, points = net.dim, net.out_per_input, batch.numel()
    columns = _columns(terms.offsets)
    outputs = [_by_input(rows, dim).split(p) for rows in (terms.weights[-1], columns[-1])]
    known: list[Tensor | None] = [None] * (1 + len(net.widths))  # inputs and units, a layer each
    extras = []

    def sums(below: Tensor | None, weight: Tensor, column: Tensor) -> Tensor:
        return column.expand(-1, points) if below is None else torch.addmm(column, weight[:, : below.shape[0]], below)

    for i in range(dim):
        for layer, (opened, weight, column, added) in enumerate(zip(net.opened[1:], terms.weights, columns, net.added, strict=False)):
            rows = slice(opened[i - 1] if i else 0, opened[i])  # the units that open when i inputs are known
            if rows.start < rows.stop:
                new = net.activation(sums(known[layer], weight[rows], column[rows]))
                below = known[layer]
                if added and below is not None:
                    new = new + below[rows]
                known[layer + 1] = _joined(known[layer + 1], new)
        value, extra = step(i, sums(known[-1], outputs[0][i], outputs[1][i]).mT)
        known[0] = _joined(known[0], value.unsqueeze(0))
        extras.append(extra)
    return known[0].mT.reshape(*batch, dim), torch.stack(extras).mT.reshape(*batch, dim)  # type: ignore[union-attr]


def _joined(known: Tensor | None, new: Tensor) -> Tensor:
    return new if known is None else torch.cat([known, new])


def _overwriting(activation: nn.Module) -> Callable[[Tensor], Tensor]:
    """The activation, past the hooks of modules, which would cost a tenth of a step; it may write over its argument."""
    if isinstance(getattr(activation, "inplace", None), bool):
        activation = copy.copy(activation)
        activation.inplace = True  # type: ignore[assignment]
    return activation.forward


def decode_in_place(net: Decodable, apply: Map, given: Tensor, terms: Terms, at_once: bool) -> tuple[Tensor, Tensor]:
    """Find the inputs in memory laid out beforehand: in turn, or all at once by sweeps ``x <- apply(given, net(x))`` (Jacobi iteration).

    In turn each weight is used once: the arithmetic of one pass in ``D`` dependent steps. What comes from below is summed up in two parts: at the
    start of a panel of inputs one large product sums up all that is known; a step then adds what became known since, as small products alone would
    read all activations anew each step. At once, input ``i`` is exact after ``i`` sweeps; they end where nothing changes any more.

    Args:
        net: the net, for its structure and activation.
        apply: gives inputs, and numbers that go with them, from ``given`` and the outputs; elementwise.
        given: ``(points, D)``.
        terms: the layers' terms.
        at_once: whether to find all at once.

    Returns:
        Inputs and numbers, both ``(points, D)``.
    """
    dim, p, points = net.dim, net.out_per_input, given.shape[0]
    weights, columns = ([*ts[:-1], ts[-1].unflatten(0, (p, dim))] for ts in (terms.weights, _columns(terms.offsets)))
    values = [given.new_zeros(rows, points) for rows in (dim, *net.widths)]  # zero where nothing is known yet
    extras, given = [], given.mT.contiguous()
    width = dim if at_once else math.isqrt(2 * dim)
    for first in range(0, dim, width):
        panel = _Panel.of(net, first, min(first + width, dim), at_once)
        extras += _fill(net, apply, given, values, panel, _layer_terms(panel, values, weights, columns, at_once), at_once)
    return values[0].mT, torch.cat(extras).mT


class _Panel(NamedTuple):
    """A run of inputs, whose sums of what was known before it are made by one large product a layer."""

    first: int  # input
    last: int  # input, which is not in it
    begins: list[int]  # the first row that opens in it: of the inputs, and of each hidden layer
    counts: list[int]  # rows that open in it
    sizes: list[list[int]]  # the same for each of its steps

    @staticmethod
    def of(net: Decodable, first: int, last: int, at_once: bool) -> _Panel:
        """The inputs from ``first`` on, in one step or in one step each."""
        starts = [list(range(net.dim + 1)), *([0, *opened[:-1], opened[-1]] for opened in net.opened[1:])]  # the rows of step i begin there
        steps = [first, last] if at_once else list(range(first, last + 1))
        sizes = [[start[b] - start[a] for a, b in itertools.pairwise(steps)] for start in starts]
        return _Panel(first, last, [start[first] for start in starts], [start[last] - start[first] for start in starts], sizes)


def _slots(panel: _Panel, values: list[Tensor]) -> list[Tensor]:
    """The rows that open in a panel: of the inputs, and of each hidden layer."""
    return [v.narrow(0, begin, count) for v, begin, count in zip(values, panel.begins, panel.counts, strict=True)]


def _layer_terms(
    panel: _Panel, values: list[Tensor], weights: list[Tensor], columns: list[Tensor], at_once: bool
) -> list[list[Addmm]]:
    """For each layer and step of a panel the arguments of ``addmm``: sums of what was known before the panel, weights, and what opens in it."""
    layers: list[list[Addmm]] = []
    slots, points = _slots(panel, values), values[0].shape[1]
    for i, (weight, sums) in enumerate(zip(weights, columns, strict=True)):
        output = i == len(weights) - 1
        rows = (panel.first, panel.last - panel.first) if output else (panel.begins[i + 1], panel.counts[i + 1])
        weight, sums = weight.narrow(-2, *rows), sums.narrow(-2, *rows)
        if panel.begins[i]:
            before = weight[..., : panel.begins[i]].flatten(0, -2)
            sums = torch.addmm(sums.flatten(0, -2), before, values[i][: panel.begins[i]]).view(*weight.shape[:-1], points)
        weight = weight.narrow(-1, panel.begins[i], panel.counts[i])
        split: Iterable[tuple[Tensor, Tensor]]
        if not output:
            split = zip(sums.split_with_sizes(panel.sizes[i + 1]), weight.split_with_sizes(panel.sizes[i + 1]), strict=True)
        elif at_once:
            split = [(sums.flatten(0, 1), weight.flatten(0, 1))]
        else:
            split = zip(sums.unbind(1), weight.unbind(1), strict=True)
        layers.append([(added, matrix, slots[i]) for added, matrix in split])
    return layers


def _fill(
    net: Decodable,
    apply: Map,
    given: Tensor,
    values: list[Tensor],
    panel: _Panel,
    layers: list[list[Addmm]],
    at_once: bool,
) -> list[Tensor]:
    """Find the inputs of a panel, and write them and the units that they open into ``values``; returns the numbers that go with the inputs."""
    count, p, close = panel.last - panel.first, net.out_per_input, 4 * torch.finfo(given.dtype).eps
    together = net.dim if at_once else 1  # inputs a step
    sheets = given.new_empty(count // together, p, together, given.shape[1])
    products, params = sheets.flatten(1, 2).unbind(0), sheets.movedim(1, -1).unbind(0)
    slots = [slot.split_with_sizes(size) for slot, size in zip(_slots(panel, values), panel.sizes, strict=True)]
    activation, extras = _overwriting(net.activation), []
    *hidden, outputs = layers
    for j, z in enumerate(given.narrow(0, panel.first, count).split_with_sizes(panel.sizes[0])):
        for sweep in range(panel.sizes[0][j]):
            for i, layer in enumerate(hidden):
                if panel.sizes[i + 1][j]:
                    slot = slots[i + 1][j]
                    new = activation(torch.addmm(*layer[j], out=slot))
                    if net.added[i]:
                        torch.add(new, slots[i][j], out=slot)
                    elif new is not slot:  # the activation has not written there, or not all that it does
                        slot.copy_(new)
            torch.addmm(*outputs[j], out=products[j])
            new, extra = apply(z, params[j])
            settled = sweep + 1 < panel.sizes[0][j] and torch.allclose(new, slots[0][j], close, close)
            slots[0][j].copy_(new)
            if settled:
                break
        extras.append(extra)
    return extras


def pull_back(net: Decodable, x: Tensor, terms: Terms, step: Callable[[int, Tensor], Tensor]) -> Terms:
    """The gradient of decoding: its steps in reverse order, so that one pass finds the solution of the whole triangular system.

    Args:
        net: the net, for its structure and activation.
        x: the decoded inputs, ``(points, D)``.
        terms: the layers' terms.
        step: ``step(i, gradient)`` takes the gradient by input ``i`` that came through later outputs, ``(points,)``, and gives that by
            the outputs of input ``i``, ``(P, points)``. It is called for the last input first.

    Returns:
        The gradient by the terms.
    """
    dim, p, layers = net.dim, net.out_per_input, len(net.widths)
    offsets = _columns(terms.offsets)
    units, slopes = [x.mT], []
    for weight, offset, added in zip(terms.weights[:-1], offsets[:-1], net.added, strict=True):
        with torch.enable_grad():
            before = torch.addmm(offset, weight, units[-1]).requires_grad_()
            new = net.activation(before)
            slopes.append(torch.autograd.grad(new.sum(), before)[0])
        units.append(units[-1] + new.detach() if added else new.detach())
    by_units = [torch.zeros_like(u) for u in units]
    by_sums = [*(torch.zeros_like(u) for u in units[1:]), x.new_zeros(dim * p, x.shape[0])]
    weights = [*terms.weights[:-1], _by_input(terms.weights[-1], dim)]

    def close_units(known: int) -> None:
        """The gradients by the units that see ``known`` inputs, and that by the last of those."""
        for i in range(layers, -1, -1):
            start, stop = net.opened[i][known - 1] if known else 0, net.opened[i][known]
            if start == stop:
                continue
            above = known * p if i == layers else net.opened[i + 1][known - 1] if known else 0
            grad = weights[i][above:, start:stop].mT @ by_sums[i][above:]
            if i < layers and net.added[i]:
                grad = grad + by_units[i + 1][start:stop]
            by_units[i][start:stop] = grad
            if i:
                by_sums[i - 1][start:stop] = grad * slopes[i - 1][start:stop]

    for i in range(dim - 1, -1, -1):
        close_units(i + 1)
        by_sums[-1][i * p : (i + 1) * p] = step(i, by_units[0][i])
    close_units(0)
    by_sums[-1] = by_sums[-1].unflatten(0, (dim, p)).transpose(0, 1).flatten(0, 1)
    # Masked weights have no gradient, even where the product that stands in their place overflows.
    by_weights = [(g @ u.mT).masked_fill(mask == 0, 0.0) for g, u, mask in zip(by_sums, units, net.masks(), strict=True)]
    by_offsets = [g.sum(-1) if o.dim() == 1 else g.mT.reshape(o.shape) for g, o in zip(by_sums, terms.offsets, strict=True)]
    return Terms(by_weights, by_offsets)
