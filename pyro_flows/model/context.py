"""What a model runs in: default dtype and checks, both put back at the end; and the model itself, as its author wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch.distributions import Distribution

from ..numerics.random import exclusive

__all__ = ["running", "without_init"]


@contextmanager
def running(dtype: torch.dtype, validate: bool = False) -> Iterator[None]:
    """What a model runs in: the fit's dtype as default, and, unless ``validate``, no checks of arguments.

    Pyro's and torch's checks branch on values, which ``vmap`` refuses. All is put back at the end.
    """
    with exclusive():
        checks, default = Distribution._validate_args, torch.get_default_dtype()
        try:
            torch.set_default_dtype(dtype)
            with pyro.validation_enabled(validate and pyro.infer.util.is_validation_enabled()):
                yield
        finally:
            torch.set_default_dtype(default)
            Distribution.set_default_validate_args(checks)


def without_init(model: Callable[..., Any]) -> Callable[..., Any]:
    """The user's model, where a guide has wrapped it (``guide.model``) to draw initial values at every site."""
    wrapped = getattr(model, "func", None)
    if isinstance(wrapped, partial) and len(wrapped.args) == 2 and isinstance(wrapped.args[0], InitMessenger):
        return wrapped.args[1]
    return model
