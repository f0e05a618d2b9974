"""Files of data, CSV or JSON, as the arguments of a model."""

from __future__ import annotations

import csv
import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

__all__ = ["arguments_from_file"]

_MISSING = ("", "NA", "NaN", "nan", "null", "None")


def arguments_from_file(path: Path, model: Callable[..., Any], as_float: Sequence[str] = ()) -> dict[str, Any]:
    """What a model is to be called with, by name.

    A ``.csv`` (or ``.tsv``) file is a table: its columns are arguments of the same name, and columns that the model does not take are left out. A
    JSON file holds an object whose keys are the arguments, or a list of records, which is a table too. Columns of numbers become tensors, whole
    numbers integers; a missing cell, or ``null``, makes the column floating-point with NaN there; columns of words stay lists of strings.

    Args:
        path: the file.
        model: the model.
        as_float: columns or keys of whole numbers to take as floating-point.

    Raises:
        DataError: the file cannot be read, or holds something else.
    """
    text = _text(path)
    if path.suffix.lower() in (".csv", ".tsv"):
        content, is_table = _columns(list(csv.reader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")), path), True
    else:
        content, is_table = _json(text, path)
    if is_table:
        content = _of_model(content, model)
    unknown = set(as_float) - content.keys()
    if unknown:
        raise DataError(f"--as-float {' '.join(sorted(unknown))}: no such key in {str(path)!r}")
    return {key: _value(value, key, key in as_float) for key, value in content.items()}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"--data {str(path)!r} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"--data {str(path)!r} is not text in UTF-8: save it as such") from error


def _columns(rows: list[list[str]], path: Path) -> dict[str, list[Any]]:
    rows = [row for row in rows if row]
    if len(rows) < 2:
        raise DataError(f"--data {str(path)!r} has no rows: a header and at least one row are needed")
    header = [name.strip() for name in rows[0]]
    uneven = next((i for i, row in enumerate(rows) if len(row) != len(header)), None)
    if uneven is not None:
        raise DataError(f"--data {str(path)!r}: row {uneven + 1} has {len(rows[uneven])} cells, the header {len(header)}")
    if len(set(header)) < len(header):
        raise DataError(f"--data {str(path)!r} names a column twice: {header}")
    return {name: [_cell(row[i].strip()) for row in rows[1:]] for i, name in enumerate(header)}


def _cell(text: str) -> Any:
    """A number where the text is one, ``None`` where it is missing, and otherwise the text."""
    if text in _MISSING:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": 1, "false": 0}.get(text.lower(), text)


def _json(text: str, path: Path) -> tuple[dict[str, Any], bool]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"--data {str(path)!r} is not JSON: {error}") from error
    if isinstance(content, list) and content and all(isinstance(record, dict) for record in content):
        names = dict.fromkeys(name for record in content for name in record)
        return {name: [record.get(name) for record in content] for name in names}, True
    if not isinstance(content, dict):
        raise DataError(f"--data {str(path)!r} must hold an object, whose keys are the model's arguments, or a list of records")
    return content, False


def _of_model(columns: dict[str, Any], model: Callable[..., Any]) -> dict[str, Any]:
    """The columns that the model takes; all where it takes any keyword, or cannot be asked."""
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return columns
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return columns
    names = {p.name for p in parameters}
    return {name: values for name, values in columns.items() if name in names}


def _value(value: Any, key: str, as_float: bool) -> Any:
    if isinstance(value, dict):
        return {k: _value(v, f"{key}.{k}", as_float) for k, v in value.items()}
    if not isinstance(value, list):
        if value is None:
            raise DataError(f"--data: {key!r} is null; leave the key out to use the model's default")
        return float(value) if as_float else value
    if any(isinstance(v, str) for v in value):
        return _words(value, key)
    return _numbers(value, key, as_float)


def _words(value: list[Any], key: str) -> list[str]:
    missing = sum(v is None for v in value)
    if missing:
        raise DataError(f"--data: {key!r} has {missing} missing label(s) among its words: fill them in, as by 'unknown', or remove those rows")
    if not all(isinstance(v, (str, int, float)) for v in value):
        raise DataError(f"--data: the lists under {key!r} are ragged, or hold more than numbers")
    return [str(v) for v in value]


def _numbers(value: list[Any], key: str, as_float: bool) -> Tensor:
    def filled(v: Any) -> Any:
        return [filled(u) for u in v] if isinstance(v, list) else math.nan if v is None else v

    try:
        tensor = torch.tensor(filled(value))
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"--data: the lists under {key!r} are ragged, or hold more than numbers") from error
    return tensor.double() if tensor.is_floating_point() or as_float else tensor
