"""What a model runs in: default dtype, checks, random numbers; all put back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch.distributions import Distribution

__all__ = ["running", "seeded"]


@contextmanager
def running(dtype: torch.dtype, validate: bool = False) -> Iterator[None]:
    """What a model runs in: the fit's dtype as default, and, unless ``validate``, no checks of arguments.

    Pyro's and torch's checks branch on values, which ``vmap`` refuses. All is put back at the end.
    """
    checks, default = Distribution._validate_args, torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with pyro.validation_enabled(validate and pyro.infer.util.is_validation_enabled()):
            yield
    finally:
        torch.set_default_dtype(default)
        Distribution.set_default_validate_args(checks)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from a seed, and the user's stream of them left where it was."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(seed)
        yield
