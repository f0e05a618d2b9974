"""Checks and conversions of a model and its arguments, before any work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DtypeError, ModelError, PyroFlowsError
from ..numerics.fingerprint import leaves
from .failures import in_a_line

__all__ = ["converted", "explained", "not_finite"]


def not_finite(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Which argument has NaN or infinite numbers, and where, in words; empty where all are finite."""
    named = [*((f"argument {i}", v) for i, v in enumerate(args)), *((f"argument {k!r}", v) for k, v in kwargs.items())]
    for name, value in (leaf for n, v in named for leaf in leaves(v, n)):
        if isinstance(value, np.ndarray) and np.issubdtype(value.dtype, np.floating):
            value = torch.from_numpy(value)
        if isinstance(value, (float, np.floating)):
            value = torch.tensor(value)
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = ~torch.isfinite(value)
            if count := int(bad.sum()):
                where = [tuple(i) for i in bad.nonzero()[:3].tolist()]
                return f"{name} has {count} NaN or infinite value(s), the first at {where}"
    return ""


def converted(value: Any, dtype: torch.dtype) -> Any:
    """The same arguments with floating-point tensors and arrays as tensors of ``dtype``; integers stay integers."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, np.ndarray):
        return converted(torch.from_numpy(value), dtype) if value.dtype.kind in "fiub" else value
    if isinstance(value, dict):
        return {k: converted(v, dtype) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(converted(v, dtype) for v in value)
    return value


@contextmanager
def explained(dtype: torch.dtype) -> Iterator[None]:
    """Turn whatever a model raises into an error that says what to do."""
    try:
        yield
    except PyroFlowsError as error:
        cause = error.__cause__
        if cause is not None and "dtype" in str(cause):
            raise _dtype_error(cause, dtype) from cause
        raise
    except Exception as error:
        text, remedy = in_a_line(error, 500), "check the arguments, or call model(...) with them to see where it fails"
        if "unexpected keyword" in text:
            remedy = "options of the fit go to FlowVI: pf.FlowVI(model, flow=...).run(...)"
        if "dtype" in text or "same device" in text:
            raise _dtype_error(error, dtype) from error
        raise ModelError(f"the model failed when it was run with these arguments: {text}. {remedy[0].upper()}{remedy[1:]}") from error


def _dtype_error(error: BaseException, dtype: torch.dtype) -> DtypeError:
    text = in_a_line(error)
    if "Long" in text or "Int" in text:
        remedy = "integers stay integers: pass those that are quantities as floating point, x.float() (--as-float x on the command line)"
    else:
        remedy = (
            "pass the data as arguments of the model (they are converted), convert what the model closes over, a flow by "
            f"flow.{'double' if dtype == torch.float64 else 'float'}(), or choose FlowVI(model, dtype=torch.float32)"
        )
    return DtypeError(f"the model mixes dtypes or devices while it runs in {dtype}: {text}. {remedy[0].upper()}{remedy[1:]}")
