"""Checks and conversions of a model and its arguments, before any work."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError, DtypeError, ModelError, PyroFlowsError
from ..numerics.fingerprint import leaves
from .failures import in_a_line

__all__ = ["Table", "converted", "explained", "not_finite"]


def not_finite(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Which argument has NaN or infinite numbers, and where, in words; empty where all are finite."""
    named = [*((f"argument {i}", v) for i, v in enumerate(args)), *((f"argument {k!r}", v) for k, v in kwargs.items())]
    for name, value in (leaf for n, v in named for leaf in leaves(v, n)):
        if isinstance(value, (float, np.floating)):
            value = torch.tensor(value)
        if isinstance(value, Tensor) and value.is_floating_point():
            bad = ~torch.isfinite(value)
            if count := int(bad.sum()):
                where = [tuple(i) for i in bad.nonzero()[:3].tolist()]
                return f"{name} has {count} NaN or infinite value(s), the first at {where}"
    return ""


class Table(dict[str, Any]):
    """The columns of a data frame as tensors: ``table["x"]`` and ``table.x``; ``len(table)`` is the number of rows, as of the frame itself."""

    def __len__(self) -> int:
        return len(next(iter(self.values()), ()))

    def __bool__(self) -> bool:
        return dict.__len__(self) > 0

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError as error:
            raise AttributeError(f"the table has no column {name!r}; it has {list(self)}") from error

    @property
    def columns(self) -> list[str]:
        """The names of the columns."""
        return list(self)


def converted(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype, labels: list[list[str]] | None = None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A model's arguments as it can be traced with: tensors, and plain values as they are.

    Floating-point tensors, arrays and lists become tensors of ``dtype``; integers stay integers, and lists of them lists. Data frames become a
    :class:`Table`, and labels (arrays, columns or lists of strings) the positions of each in the sorted list of all; these lists are added to
    ``labels``, one an argument or column.

    Raises:
        DtypeError: numbers that no density can be computed with: complex, sparse, of objects, or without values (meta).
        DataError: labels that are missing.
    """
    labels = [] if labels is None else labels
    return (
        tuple(_converted(value, dtype, f"argument {i}", labels) for i, value in enumerate(args)),
        {k: _converted(value, dtype, f"argument {k!r}", labels) for k, value in kwargs.items()},
    )


def _converted(value: Any, dtype: torch.dtype, name: str, labels: list[list[str]]) -> Any:
    if isinstance(value, Tensor):
        return _tensor(value, dtype, name)
    if _is_frame(value):
        return Table({str(c): _converted(_array(value[c]), dtype, f"{name}[{str(c)!r}]", labels) for c in value.columns})
    if isinstance(value, np.ndarray) or hasattr(value, "to_numpy"):
        return _from_array(_array(value), dtype, name, labels)
    if isinstance(value, dict):
        same = copy.copy(value)  # of its own kind, such as a defaultdict
        same.update({k: _converted(v, dtype, f"{name}[{k!r}]", labels) for k, v in value.items()})
        return same
    if type(value) in (list, tuple):
        if value and all(isinstance(v, str) for v in value):
            return _codes(np.asarray(value), labels)
        if any(isinstance(v, (float, np.floating)) for v in value) and all(isinstance(v, (int, float, np.number)) for v in value):
            return torch.tensor([float(v) for v in value], dtype=dtype)
        return type(value)(_converted(v, dtype, f"{name}[{i}]", labels) for i, v in enumerate(value))
    return value


def _is_frame(value: Any) -> bool:
    return hasattr(value, "columns") and hasattr(value, "to_numpy")  # of pandas and of libraries like it, none of which is imported


def _array(value: Any) -> np.ndarray:
    """An array of what has one; masked entries, and those that pandas calls missing, are NaN."""
    if isinstance(value, np.ma.MaskedArray):
        return np.ma.filled(value.astype(float), np.nan) if value.dtype.kind in "fiub" else np.ma.filled(value)
    array = np.asarray(value.to_numpy() if hasattr(value, "to_numpy") else value)
    if array.dtype.kind == "O" and all(isinstance(v, (int, float, np.number, type(None))) or v != v for v in array.flat):
        return np.array([np.nan if v is None or v != v else float(v) for v in array.flat]).reshape(array.shape)
    return array


def _tensor(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if value.is_complex() or value.layout != torch.strided or value.is_meta or value.is_quantized:
        what = "complex" if value.is_complex() else "meta (without values)" if value.is_meta else str(value.layout)
        raise DtypeError(f"{name} is a {what} tensor, and a density needs real, dense numbers: convert it, as by .real or .to_dense()")
    return value.to(dtype) if value.is_floating_point() else value


def _from_array(array: np.ndarray, dtype: torch.dtype, name: str, labels: list[list[str]]) -> Tensor:
    if array.dtype.kind in "fiub":
        native = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
        return _tensor(torch.from_numpy(native if native.flags.writeable else native.copy()), dtype, name)
    if array.dtype.kind in "UST" or (array.dtype.kind == "O" and all(isinstance(v, str) for v in array.flat)):
        return _codes(array, labels)
    if array.dtype.kind == "O" and any(isinstance(v, str) for v in array.flat):
        missing = sum(not isinstance(v, str) for v in array.flat)
        raise DataError(f"{name} has {missing} missing label(s) among its words: fill them in, as by 'unknown', or remove those rows")
    raise DtypeError(f"{name} is an array of {array.dtype}, not of numbers or words: convert it, as by .astype(float)")


def _codes(array: np.ndarray, labels: list[list[str]]) -> Tensor:
    words, codes = np.unique(array.astype(str), return_inverse=True)
    labels.append(words.tolist())
    return torch.from_numpy(codes.reshape(array.shape).astype(np.int64))


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
