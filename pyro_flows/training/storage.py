"""Files that are replaced at once: an interrupt or a full disk never leaves half of one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

__all__ = ["write"]


def write(content: Any, path: Path) -> None:
    """Write tensors and plain values, as ``torch.save`` does, beside the file, and then put the new file in its place."""
    scratch = path.with_name(path.name + ".part")
    torch.save(content, scratch)
    os.replace(scratch, path)
