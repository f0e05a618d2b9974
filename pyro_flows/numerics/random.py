"""torch's global state: random numbers borrowed for a while and put back, or saved and restored; by one thread at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import ConcurrencyError

__all__ = ["exclusive", "random_state", "restore_random_state", "seeded"]

_in_use = threading.RLock()


@contextmanager
def exclusive() -> Iterator[None]:
    """Let one thread alone use what torch and Pyro have once a process: random numbers, the default dtype, the stack of handlers.

    Raises:
        ConcurrencyError: another thread is using it.
    """
    if not _in_use.acquire(blocking=False):
        raise ConcurrencyError(
            "another thread is fitting or drawing: torch's random numbers and default dtype are shared by all threads, so both would be wrong. "
            "Run fits one after another, or in processes of their own, such as concurrent.futures.ProcessPoolExecutor"
        )
    try:
        yield
    finally:
        _in_use.release()


@contextmanager
def seeded(seed: int | None = None) -> Iterator[None]:
    """Random numbers that follow from a seed, or go on from where they are; at the end the user's stream is back where it was."""
    with exclusive(), torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
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
