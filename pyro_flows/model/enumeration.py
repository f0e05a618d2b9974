"""Summing out discrete sites as Pyro does, in operations that ``torch.func`` and ``make_fx`` can trace."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import torch
from pyro.infer.mcmc.util import TraceEinsumEvaluator
from pyro.ops.contract import contract_to_tensor
from pyro.ops.rings import LogRing
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor

__all__ = ["EnumeratedDensity", "TraceableEnum"]


class TraceableEnum(EnumMessenger):
    """Pyro's parallel enumeration without its one use of ``.data``, which ``vmap`` refuses; only the shape is read."""

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if value is None:
            return super()._pyro_post_sample(msg)
        msg["value"] = SimpleNamespace(data=SimpleNamespace(shape=value.shape), dim=value.dim)
        try:
            super()._pyro_post_sample(msg)
        finally:
            msg["value"] = value


class EnumeratedDensity(TraceEinsumEvaluator):
    """Log density of an enumerated trace, its discrete sites summed out by variable elimination.

    Args:
        model_trace: one trace under :class:`TraceableEnum`, from which the plates and dimensions are learnt.
        max_plate_nesting: number of dimensions that the model's plates take.

    Cost: that of the cheapest elimination order found greedily; linear in the length of a ``pyro.markov`` chain.
    """

    def __init__(self, model_trace: Trace, max_plate_nesting: int) -> None:
        super().__init__(model_trace, True, max_plate_nesting)

    def log_prob(self, model_trace: Trace) -> Tensor:
        """The scalar log density of a trace of the same model."""
        return contract_to_tensor(self._get_log_factors(model_trace), self._enum_dims, ring=_EliminationRing())


class _EliminationRing(LogRing):
    """Pyro's ring of log densities with ``sumproduct`` as additions and ``logsumexp``, one eliminated symbol at a time.

    Pyro's own goes through ``opt_einsum`` and a ``torch.autograd.Function`` that ``torch.func`` does not take.
    """

    def sumproduct(self, terms: list[Any], dims: Iterable[str]) -> Any:
        inputs = tuple(term._pyro_dims for term in terms)
        pending = list(zip(inputs, terms, strict=True))
        for symbol in _elimination_order(inputs, frozenset(dims)):
            names, total = _add([term for term in pending if symbol in term[0]])
            at = names.index(symbol)
            pending = [term for term in pending if symbol not in term[0]]
            pending.append((names[:at] + names[at + 1 :], _logsumexp(total, at)))
        names, total = _add(pending)
        total = total.clone()  # a tensor of its own, for it to carry a name
        total._pyro_dims = names
        return total


def _add(terms: list[tuple[str, Tensor]]) -> tuple[str, Any]:
    """Sum of tensors whose dimensions are named by letters, broadcast by name; names come out sorted."""
    names = "".join(sorted(set("".join(n for n, _ in terms))))
    total: Any = 0.0
    for own, tensor in terms:
        order = [own.index(n) for n in sorted(own)]
        sizes = iter(tensor.permute(order).shape)
        total = total + tensor.permute(order).reshape([next(sizes) if n in own else 1 for n in names])
    return names, total


def _logsumexp(x: Tensor, dim: int) -> Tensor:
    """``torch.logsumexp`` with a zero instead of a NaN gradient where every entry is -inf."""
    peak = x.detach().amax(dim, keepdim=True)
    peak = torch.where(torch.isfinite(peak), peak, torch.zeros_like(peak))
    total = (x - peak).exp().sum(dim)
    safe = torch.where(total > 0, total, torch.ones_like(total))
    return torch.where(total > 0, safe.log() + peak.squeeze(dim), torch.full_like(total, -torch.inf))


@lru_cache(maxsize=256)
def _elimination_order(inputs: tuple[str, ...], dims: frozenset[str]) -> tuple[str, ...]:
    """Symbols to sum out, each time the one with the fewest neighbours."""
    neighbours: dict[str, set[str]] = {}
    for names in inputs:
        for name in names:
            neighbours.setdefault(name, set()).update(names)
    order = []
    left = sorted(dims & neighbours.keys())
    while left:
        best = min(left, key=lambda name: len(neighbours[name]))
        left.remove(best)
        order.append(best)
        joined = neighbours.pop(best) - {best}
        for name in joined:
            neighbours[name] |= joined
            neighbours[name].discard(best)
    return tuple(order)
