"""What a model runs in: default dtype and checks; both put back at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pyro
import torch
from torch.distributions import Distribution

__all__ = ["running"]


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
