"""What a model runs in: default dtype and checks, both put back at the end; and the model itself, as its author wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import pyro
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution

from ..numerics.random import exclusive

__all__ = ["InFitDtype", "running", "without_init"]


_fit_dtype: ContextVar[torch.dtype | None] = ContextVar("fit_dtype", default=None)


class InFitDtype(Messenger):
    """Converts what a model draws to the dtype of the fit that it runs in: of priors that were made before it, initial values are of another.

    It belongs around a trace, which would else record a value before it is converted.
    """

    def _pyro_post_sample(self, msg: Any) -> None:
        dtype, value = _fit_dtype.get(), msg["value"]
        if dtype is not None and isinstance(value, Tensor) and value.is_floating_point() and value.dtype != dtype:
            msg["value"] = value.to(dtype)


@contextmanager
def running(dtype: torch.dtype, validate: bool = False) -> Iterator[None]:
    """What a model runs in: the fit's dtype as default, and, unless ``validate``, no checks of arguments.

    Pyro's and torch's checks branch on values, which ``vmap`` refuses. All is put back at the end.
    """
    with exclusive():
        checks, default, token = Distribution._validate_args, torch.get_default_dtype(), _fit_dtype.set(dtype)
        try:
            torch.set_default_dtype(dtype)
            with pyro.validation_enabled(validate and pyro.infer.util.is_validation_enabled()):
                yield
        finally:
            _fit_dtype.reset(token)
            torch.set_default_dtype(default)
            Distribution.set_default_validate_args(checks)


def without_init(model: Callable[..., Any]) -> Callable[..., Any]:
    """The user's model, where a guide has wrapped it (``guide.model``) to draw initial values at every site."""
    wrapped = getattr(model, "func", None)
    if isinstance(wrapped, partial) and len(wrapped.args) == 2 and isinstance(wrapped.args[0], InitMessenger):
        return wrapped.args[1]
    return model
