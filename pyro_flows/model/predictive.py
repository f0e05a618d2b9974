"""Simulating a model from given latent values: posterior and prior predictive draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from ..errors import ModelError, PyroFlowsError
from .context import InFitDtype, running
from .failures import in_a_line
from .sites import is_deterministic

__all__ = ["simulate"]

Tensors = dict[str, Tensor]


class _Unobserve(UnconditionMessenger):
    """Draws observed sites anew, but not deterministic ones, which Pyro writes as observed too. Remembers the last site that was met."""

    site = ""

    def _pyro_sample(self, msg: Any) -> None:
        self.site = msg["name"]
        if not is_deterministic(msg):
            super()._pyro_sample(msg)


@torch.no_grad()
def simulate(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    latents: Mapping[str, Tensor],
    num_samples: int,
    dtype: torch.dtype,
    parallel: bool = False,
) -> Tensors:
    """Run a model forward ``num_samples`` times, its observations drawn anew.

    Args:
        model, args, kwargs: the model and its arguments; observed values in them only give shapes.
        latents: site -> ``(num_samples, *shape)`` values to use; sites that are missing are drawn from the model.
        num_samples: number of runs.
        dtype: default dtype while the model runs.
        parallel: all runs at once, in a plate around the model, as Pyro's ``Predictive(parallel=True)``: fast, and right
            for models that declare every batch dimension as a plate.

    Returns:
        site -> ``(num_samples, *shape)`` for every site that is not in ``latents``, deterministic ones included.

    Cost: ``num_samples`` runs of the model, a millisecond or two each for a small one; two in all with ``parallel``.

    Raises:
        ModelError: the model fails, the message says near which site; a site that must be drawn cannot be (a flat prior, a
            distribution without a sampler); sites or shapes change from run to run; or ``parallel`` does not suit the model.
    """
    unobserve = _Unobserve()
    free = unobserve(model)

    def trace(values: Mapping[str, Tensor]) -> Trace:
        return poutine.trace(poutine.condition(free, data=dict(values))).get_trace(*args, **kwargs)

    def run(i: int) -> Trace:
        unobserve.site = ""
        try:
            return trace({k: v[i] for k, v in latents.items()})
        except Exception as error:
            raise _explained(error, unobserve.site, "posterior" if latents else "prior") from error

    with running(dtype, validate=True), poutine.block(), InFitDtype():  # hidden from handlers around the call, not from the plate of parallel runs
        first = run(0)
        shapes = {k: site["value"].shape for k, site in _drawn(first, latents).items()}
        if parallel:
            return _in_parallel(trace, latents, num_samples, first, shapes)
        runs = [first, *map(run, range(1, num_samples))]
    return {k: _stacked(k, runs, shape) for k, shape in shapes.items()}


def _explained(error: Exception, site: str, what: str) -> Exception:
    """What a model raised, as an error that says where and what to do."""
    if isinstance(error, PyroFlowsError):
        return error
    if isinstance(error, NotImplementedError):
        remedy = "leave prior predictive draws out, or give it a proper prior" if what == "prior" else "give it a distribution that has a sampler"
        return ModelError(f"site {site!r} of the model cannot be drawn, as one with a flat (improper) prior cannot: {remedy}")
    remedy = "check the arguments against those of the fit" if what == "posterior" else "the prior may be too wide for the model: look at its draws"
    return ModelError(f"the model failed in a {what} predictive run, {in_a_line(error, site=site)}. {remedy.capitalize()}")


def _stacked(name: str, runs: Sequence[Trace], shape: torch.Size) -> Tensor:
    values = [run.nodes[name]["value"] if name in run.nodes else None for run in runs]
    shapes_met = {None if value is None else tuple(value.shape) for value in values}
    if shapes_met != {tuple(shape)}:
        raise ModelError(
            f"site {name!r} is not the same in every predictive run (shapes {', '.join(sorted(map(str, shapes_met)))}; None where it is missing): "
            "give the model sites and shapes that do not depend on what it draws"
        )
    return torch.stack(values)  # type: ignore[arg-type]


def _drawn(trace: Trace, latents: Mapping[str, Tensor]) -> dict[str, Any]:
    sites = {k: v for k, v in trace.nodes.items() if v["type"] == "sample" and k not in latents}
    return {k: v for k, v in sites.items() if not isinstance(v["fn"], (Unit, _Subsample))}


def _in_parallel(
    trace: Callable[[Mapping[str, Tensor]], Trace],
    latents: Mapping[str, Tensor],
    num_samples: int,
    first: Trace,
    shapes: Mapping[str, torch.Size],
) -> Tensors:
    """All runs in one, inside a plate to the left of the model's own."""
    sites = [site for site in first.nodes.values() if site["type"] == "sample"]
    depth = max((-f.dim for site in sites for f in site["cond_indep_stack"] if f.vectorized), default=0)

    def spread(name: str, value: Tensor) -> Tensor:
        missing = depth - len(first.nodes[name]["fn"].batch_shape)
        return value.reshape(num_samples, *[1] * missing, *value.shape[1:])

    try:
        with pyro.plate("_pyro_flows_runs", num_samples, dim=-depth - 1):
            traced = trace({k: spread(k, v) for k, v in latents.items()})
        return {k: traced.nodes[k]["value"].reshape(num_samples, *shape) for k, shape in shapes.items()}
    except (RuntimeError, ValueError) as error:
        why = in_a_line(error, 200)
        advice = "leave parallel=True out, or declare every batch dimension as a plate"
        raise ModelError(f"the model fails inside one more plate ({why}): {advice}") from error
