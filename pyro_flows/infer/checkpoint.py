"""A run's state in a file, so that it can go on where it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from ..guides import AutoFlow

__all__ = ["Checkpoint"]

_FORMAT = "pyro_flows.FlowVI/1"


def _signature(guide: AutoFlow) -> list[Any]:
    """What must agree between a file and a guide: the sites and their shapes, and the parameters'."""
    shapes = [[name, list(t.shape)] for name, t in guide.state_dict().items()]
    return [[[s.name, list(s.shape), s.start, s.stop] for s in guide.sites], shapes]


class Checkpoint:
    """Saves and loads the state of a run, replacing the file at once so that an interrupt never leaves half of one.

    Args:
        path: the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.parent.is_dir():
            raise CheckpointError(f"checkpoint={str(path)!r}: the folder {str(self.path.parent)!r} does not exist")

    def save(self, guide: AutoFlow, state: dict[str, Any]) -> None:
        """Write the guide's parameters, the global random state and ``state`` (tensors and plain values)."""
        content = {"format": _FORMAT, "signature": _signature(guide), "guide": guide.state_dict(), "random": torch.get_rng_state(), **state}
        scratch = self.path.with_name(self.path.name + ".part")
        torch.save(content, scratch)
        os.replace(scratch, self.path)

    def load(self, guide: AutoFlow) -> dict[str, Any] | None:
        """Restore the guide's parameters and the random state; ``None`` when there is no file yet.

        Raises:
            CheckpointError: the file is damaged, is something else, or belongs to another model or guide.
        """
        if not self.path.exists():
            return None
        try:
            content = torch.load(self.path, weights_only=True)
            known = content["format"] == _FORMAT
        except Exception as error:
            what = f"{str(self.path)!r} cannot be read as a checkpoint ({type(error).__name__})"
            raise CheckpointError(f"{what}: delete it, or give another path") from error
        if not known:
            raise CheckpointError(f"{str(self.path)!r} is not a FlowVI checkpoint: give another path")
        if content["signature"] != _signature(guide):
            raise CheckpointError(f"{str(self.path)!r} belongs to another model or guide (sites or shapes differ): delete it, or give another path")
        guide.load_state_dict(content["guide"])
        torch.set_rng_state(content["random"])
        return content
