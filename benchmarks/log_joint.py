"""The log joint of a Pyro model over one flat unconstrained vector; independent of pyro_flows: an oracle for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to


def init_small(scale: float, generator: torch.Generator, dtype: torch.dtype) -> Callable[[dict[str, Any]], Tensor]:
    """A per-site ``init_loc_fn``: N(0, scale) in the unconstrained space, for improper priors cannot be sampled."""

    def init(site: dict[str, Any]) -> Tensor:
        fn = site["fn"]
        bijection = biject_to(fn.support)
        shape = bijection.inverse_shape(fn.batch_shape + fn.event_shape)
        return bijection(scale * torch.randn(shape, generator=generator, dtype=dtype))

    return init


class LogJoint:
    """``log_joint(u)`` of one particle ``u`` (d,), with the constraints' log-Jacobian; ``batched(u)`` for (S, d)."""

    def __init__(
        self,
        model: Callable,
        args: tuple = (),
        kwargs: Mapping[str, Any] | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.model, self.args, self.kwargs = model, args, dict(kwargs or {})
        start = InitMessenger(init_small(0.1, torch.Generator().manual_seed(0), dtype))
        trace = prune_subsample_sites(poutine.trace(start(model)).get_trace(*args, **self.kwargs))
        self.sites = []
        for name, site in trace.iter_stochastic_nodes():
            bijection = biject_to(site["fn"].support)
            self.sites.append((name, bijection, bijection.inverse_shape(site["value"].shape)))
        self.dim = sum(shape.numel() for _, _, shape in self.sites)

    def unpack(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Site -> value ``(*batch, *shape)`` from ``u`` (*batch, d), and the log-Jacobian (*batch,)."""
        values, ladj, batch = {}, u.new_zeros(()), u.shape[:-1]
        parts = u.split([shape.numel() for _, _, shape in self.sites], -1)
        for (name, bijection, shape), part in zip(self.sites, parts, strict=True):
            part = part.reshape(batch + shape)
            values[name] = bijection(part)
            ladj = ladj + bijection.log_abs_det_jacobian(part, values[name]).reshape(*batch, -1).sum(-1)
        return values, ladj

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of ``unpack``: (S, d) from site -> ``(S, *shape)``."""
        return torch.cat(
            [bijection.inv(values[name]).reshape(len(values[name]), -1) for name, bijection, _ in self.sites], -1
        )

    def __call__(self, u: Tensor) -> Tensor:
        values, ladj = self.unpack(u)
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(self.model, data=values)).get_trace(*self.args, **self.kwargs)
            return trace.log_prob_sum() + ladj

    def batched(self, u: Tensor, chunk: int = 1000) -> Tensor:
        """The log joint of each row of ``u``: (S,)."""
        return torch.cat([torch.func.vmap(self)(rows) for rows in u.split(chunk)])

    def gradient(self, u: Tensor, chunk: int = 1000) -> Tensor:
        """The gradient of the log joint at each row of ``u``: (S, d)."""
        return torch.cat([torch.func.vmap(torch.func.grad(self))(rows) for rows in u.split(chunk)])
