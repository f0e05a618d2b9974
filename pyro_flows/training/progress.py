"""One progress bar for a whole run: stage, step, how it goes; the verdict at the end."""

from __future__ import annotations

from typing import Any

from tqdm import tqdm

__all__ = ["Progress"]


class Progress:
    """A progress bar over the stages of a run, or nothing at all.

    Args:
        enabled: whether to show it.
    """

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._bar: Any = None
        self._name = ""

    def __enter__(self) -> Progress:
        self._bar = tqdm(disable=not self._enabled, dynamic_ncols=True, bar_format="[{elapsed}] {desc}{postfix}")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def stage(self, name: str) -> None:
        """Start a stage."""
        self._name = name
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description_str(name)

    def step(self, step: int, total: int, text: str) -> None:
        """Show where the stage is, and how it goes."""
        self._bar.set_description_str(f"{self._name} {step}/{total}", refresh=False)
        self._bar.set_postfix_str(text)

    def done(self, text: str) -> None:
        """Leave a last line."""
        self._bar.set_description_str("done")
        self._bar.set_postfix_str(text)
