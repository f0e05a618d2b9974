"""Files of tensors and plain values that are replaced at once and carry a checksum: nothing is half written, and nothing damaged is read."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

__all__ = ["read", "write"]

_CHECKSUM = "checksum"
_REMEDY = "Delete it, or give another path"


def write(content: dict[str, Any], path: Path) -> None:
    """Write beside the file, and then put the new file in its place.

    Raises:
        CheckpointError: it cannot be written, as on a full disk; an old file stays as it is.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        torch.save({**content, _CHECKSUM: _checksum(content)}, scratch)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:
        scratch.unlink(missing_ok=True)
        raise CheckpointError(f"{str(path)!r} cannot be written: {' '.join(str(error).split())[:200]}") from error


def read(path: Path, wanted: str, what: str) -> dict[str, Any]:
    """What :func:`write` wrote, on the CPU.

    Args:
        path: the file.
        wanted: its entry ``"format"``.
        what: what such a file is called, in words.

    Raises:
        FileNotFoundError: there is no file.
        CheckpointError: it is damaged, or something else.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: it is damaged, or no file of pyro_flows ({type(error).__name__}). {_REMEDY}") from error
    if not isinstance(content, dict) or content.get("format") != wanted:
        raise CheckpointError(f"{str(path)!r} is not {what} of this version of pyro_flows. {_REMEDY}")
    if content.pop(_CHECKSUM, None) != _checksum(content):
        raise CheckpointError(f"{str(path)!r} is damaged, or of another version of pyro_flows: its checksum is wrong. {_REMEDY}")
    return content


def _checksum(content: Any) -> str:
    digest = hashlib.sha256()
    _add(digest, content)
    return digest.hexdigest()


def _add(digest: Any, value: Any) -> None:
    """Feed a value and all that it holds, with its type, to a hash."""
    digest.update(type(value).__name__.encode())
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous()
        digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
        digest.update(flat.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        for key, item in value.items():
            _add(digest, key)
            _add(digest, item)
    elif isinstance(value, (list, tuple)):
        digest.update(str(len(value)).encode())
        for item in value:
            _add(digest, item)
    else:
        digest.update(repr(value).encode())
