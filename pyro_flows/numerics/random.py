"""torch's global random numbers: borrowed for a while and put back, or saved and restored."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["random_state", "restore_random_state", "seeded"]


@contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """Random numbers that follow from a seed, or go on from where they are; at the end the user's stream is back where it was."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        if seed is not None:
            torch.manual_seed(seed)
        yield


def random_state() -> dict[str, Any]:
    """torch's global random numbers: the CPU's, and each GPU's where there are any."""
    return {"random": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def restore_random_state(state: dict[str, Any]) -> None:
    """Continue from a :func:`random_state`, also one of a machine with more or fewer GPUs."""
    torch.set_rng_state(state["random"])
    for device, own in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
        torch.cuda.set_rng_state(own, device)
