"""A stochastic flow as a Pyro model of rows, whose indices are sample sites."""

from __future__ import annotations

import builtins
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..errors import OptionError, ShapeError
from .flow import StochasticFlow

__all__ = ["DensityModel"]


class DensityModel:
    r"""The density of rows under a stochastic flow, as a Pyro model and guide whose latent sites are the indices.

    The model goes from a row towards the base. There :math:`p(u \mid z)` cannot be the distribution of a site, as ``z`` itself depends on
    ``u``; so an index is drawn from a fixed reference, and a factor turns that into the kernel. Sites are called
    ``{name}_u{layer}_{entry}`` (discrete) and ``{name}_u{layer}`` (continuous), layers counted from the base; rows are the plate
    ``{name}_rows``.

    Args:
        flow: the flow.
        enumerate: where discrete indices are summed out by ``TraceEnum_ELBO``. ``"model"``: in the model, with an empty guide: the loss is
            :math:`-\sum_n \log p(x_n)` exactly. ``"guide"``: over the inference kernels: the exact expectation of the ELBO. ``None``:
            nowhere: they are drawn from the inference kernels, as continuous indices are, for ``Trace_ELBO``. By default ``"model"``, and
            ``None`` for continuous ones.
        subsample_size: rows of a step, drawn at random; all by default.
        name: of the flow's module in Pyro's parameter store, and of the sites.

    Raises:
        OptionError: an unknown ``enumerate``, or continuous indices to enumerate.
        ShapeError: rows of another size.

    Example:
        >>> import torch, pyro_flows as pf
        >>> from pyro.infer import TraceEnum_ELBO
        >>> flow = pf.stochastic.StochasticFlow(2, [pf.stochastic.LWTACoupling(2, 3)])
        >>> density, x = DensityModel(flow), torch.zeros(5, 2)
        >>> loss = TraceEnum_ELBO(max_plate_nesting=1).loss(density.model, density.guide, x)
        >>> abs(loss + flow().log_prob(x).sum().item()) < 1e-4
        True
    """

    def __init__(
        self,
        flow: StochasticFlow,
        enumerate: Literal["auto", "model", "guide"] | None = "auto",
        subsample_size: int | None = None,
        name: str = "flow",
    ) -> None:
        if enumerate not in ("auto", "model", "guide", None):
            raise OptionError(f'DensityModel: enumerate must be "model", "guide" or None, got {enumerate!r}')
        discrete = all(layer.discrete for layer in flow.stochastic)
        if enumerate == "auto":
            enumerate = "model" if discrete else None
        if enumerate is not None and not discrete:
            raise OptionError(f"DensityModel: enumerate={enumerate!r} needs discrete indices, and this flow has continuous ones: use None")
        self.flow, self.enumerate, self.subsample_size, self.name = flow, enumerate, subsample_size, name

    @contextmanager
    def _rows(self, x: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        if x.dim() != 2 or x.shape[1] != self.flow.dim:
            raise ShapeError(f"DensityModel: x must have shape (N, {self.flow.dim}), got {tuple(x.shape)}")
        with pyro.plate(f"{self.name}_rows", len(x), subsample_size=self.subsample_size) as index:
            yield x[index], None if context is None else context[index]

    def _sites(self, i: int) -> list[str]:
        """Names of the sites of a layer's index; none for a layer without one."""
        layer = self.flow.steps[i]
        return [f"{self.name}_u{i}_{g}" for g in range(layer.index_dim)] if layer.discrete else [f"{self.name}_u{i}"]

    def _entries(self, i: int, logits: Tensor, enumerated: bool) -> Tensor:
        """A discrete index whose entries are sites, each with its row of ``logits (..., index_dim, choices)``."""
        infer = {"enumerate": "parallel"} if enumerated else {}
        entries = [pyro.sample(site, dist.Categorical(logits=logits[..., g, :]), infer=infer) for g, site in builtins.enumerate(self._sites(i))]
        return torch.stack(torch.broadcast_tensors(*entries), -1) if entries else torch.zeros(0, dtype=torch.long, device=logits.device)

    def _index(self, i: int, like: Tensor) -> tuple[Tensor, Tensor | float]:
        """An index from its reference, and minus the reference's log density."""
        layer = self.flow.steps[i]
        if not layer.discrete:
            reference = dist.Normal(like.new_zeros(layer.index_dim), 1.0).to_event(1)
            u = pyro.sample(self._sites(i)[0], reference)
            return u, -reference.log_prob(u)
        uniform = like.new_zeros(layer.index_dim, layer.choices)
        return self._entries(i, uniform, self.enumerate == "model"), layer.index_dim * math.log(layer.choices)

    def model(self, x: Tensor, context: Tensor | None = None) -> None:
        """The model of rows ``x (N, D)``, with a context ``(N, context_dim)`` where the flow takes one."""
        pyro.module(self.name, self.flow)
        flow, fold = self.flow, self.flow.folds and self.enumerate == "model"
        with self._rows(x, context) as (z, context):
            for i in reversed(range(fold, len(flow.steps))):
                layer = flow.steps[i]
                u, constant = self._index(i, z)
                z, ladj, log_prior = layer.pull(z, u, layer.own_context(context))
                pyro.factor(f"{self.name}_w{i}", log_prior + ladj + constant)
            base = flow.base(context)
            if fold:
                self._sum_at_base(base, z, context)
            else:
                pyro.factor(f"{self.name}_base", base.log_prob(z))

    def _sum_at_base(self, base: dist.TorchDistribution, z: Tensor, context: Tensor | None) -> None:
        """Winners next to the base are independent given what is above: a factor each, so that their sums are taken one by one."""
        first = self.flow.steps[0]
        unmoved, weight = first.summands(base, z, first.own_context(context))
        pyro.factor(f"{self.name}_base", unmoved)
        for g, site in builtins.enumerate(self._sites(0)):
            u = pyro.sample(site, dist.Categorical(logits=z.new_zeros(first.choices)), infer={"enumerate": "parallel"})
            batch = torch.broadcast_shapes(u.shape, weight.shape[:-2])
            chosen = weight[..., g, :].expand(*batch, -1).gather(-1, u.expand(batch).unsqueeze(-1)).squeeze(-1)
            pyro.factor(f"{self.name}_w0_{g}", chosen + math.log(first.choices))

    def guide(self, x: Tensor, context: Tensor | None = None) -> None:
        """The guide: the inference kernels, from the target to the base; empty where the model sums."""
        if self.enumerate == "model":
            return
        flow = self.flow
        with self._rows(x, context) as (z, context):
            for i in reversed(range(len(flow.steps))):
                layer = flow.steps[i]
                at = layer.own_context(context)
                if layer.discrete:
                    u = self._entries(i, layer.index_logits(z, at, flow.law(i)), self.enumerate == "guide")
                else:
                    u = pyro.sample(self._sites(i)[0], layer.infer(z, at))
                z = layer.pull(z, u, at).value
