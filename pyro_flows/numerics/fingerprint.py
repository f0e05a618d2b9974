"""What tells one set of arguments from another, in a few plain values that a file can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

__all__ = ["fingerprint", "fingerprints_agree", "leaves"]


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """The parts of nested dicts, lists and tuples, each with its name, such as ``x['a'][0]``."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{name}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}[{i}]")
    else:
        yield name, value


def fingerprint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Plain values that tell one set of arguments from another: shapes, norms, and sums of entries weighted by their positions.

    :func:`fingerprints_agree` compares two of them.
    """
    parts: list[Any] = []
    for name, value in (leaf for n, v in [*enumerate(args), *kwargs.items()] for leaf in leaves(v, str(n))):
        if isinstance(value, Tensor):
            flat = value.detach().double().reshape(-1).nan_to_num(0.0, 0.0, 0.0)
            weights = torch.linspace(1, 2, len(flat), dtype=flat.dtype, device=flat.device)
            value = {"shape": list(value.shape), "norm": float(flat.norm()), "sums": [float(flat.sum()), float(flat @ weights)]}
        parts.append([name, value if isinstance(value, (dict, int, float, str, bool, type(None))) else type(value).__name__])
    return parts


def fingerprints_agree(a: Any, b: Any, rounding: float) -> bool:
    """Whether two fingerprints, or lists that hold some, agree up to a relative ``rounding`` of the entries: sums depend on the number of threads."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(fingerprints_agree(u, v, rounding) for u, v in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        allowed = rounding * a["norm"] * math.prod(a["shape"]) ** 0.5
        numbers = zip((a["norm"], *a["sums"]), (b["norm"], *b["sums"]), strict=True)
        return a["shape"] == b["shape"] and all(abs(u - v) <= allowed for u, v in numbers)
    return a == b
