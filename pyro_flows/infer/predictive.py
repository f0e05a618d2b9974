"""Simulating a model from given latent values: posterior and prior predictive draws."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample, init_to_value
from torch import Tensor

from ..errors import ModelError
from .log_joint import running

__all__ = ["simulate"]


@torch.no_grad()
def simulate(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    latents: Mapping[str, Tensor],
    num_samples: int,
    dtype: torch.dtype,
    parallel: bool = False,
) -> dict[str, Tensor]:
    """Run a model forward ``num_samples`` times, its observations drawn anew, through Pyro's ``Predictive``.

    Args:
        model, args, kwargs: the model and its arguments; observed values in them only give shapes.
        latents: site -> ``(num_samples, *shape)`` values to use; sites that are missing are drawn from the model.
        num_samples: number of runs.
        dtype: default dtype while the model runs.
        parallel: all runs at once, in a plate around the model: fast, and right for models that declare every batch
            dimension as a plate.

    Returns:
        site -> ``(num_samples, *shape)`` for every site that is not in ``latents``, deterministic ones included.

    Cost: ``num_samples`` runs of the model, about a millisecond each for a small one; one with ``parallel``.

    Raises:
        ModelError: a site that must be drawn cannot be (a flat prior, a distribution without a sampler).
    """
    # Predictive first runs the model from its prior, to learn the shapes: a flat prior needs a value to start from.
    first = {k: v[0] for k, v in latents.items()}
    free = InitMessenger(init_to_value(values=first, fallback=init_to_sample))(poutine.uncondition(model))
    try:
        with running(dtype, validate=True), poutine.block(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            predictive = Predictive(free, posterior_samples=dict(latents), num_samples=num_samples, parallel=parallel)
            found = predictive(*args, **kwargs)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, NotImplementedError):
            what = "a site of the model cannot be drawn, such as one with a flat (improper) prior"
            remedy = "leave prior predictive draws out, or give it a proper prior"
            raise ModelError(f"{what}: {remedy}") from error
        if parallel:
            what = f"the model fails inside one more plate ({' '.join(str(error).split('Trace Shapes')[0].split())[:200]})"
            raise ModelError(f"{what}: leave parallel=True out, or declare every batch dimension as a plate") from error
        raise
    return {k: v.detach() for k, v in found.items() if v.numel()}
