"""A run's state in a file, so that it can go on where it was."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import CheckpointError, CheckpointWarning
from ..numerics.fingerprint import fingerprints_agree
from ..numerics.random import random_state, restore_random_state
from .storage import read, write

__all__ = ["Checkpoint", "remedy_of_interrupt"]

_SUMMATION = 1e-12  # relative error of a sum in float64


class Checkpoint:
    """Saves and loads the state of a run, replacing the file at once so that an interrupt never leaves half of one.

    Args:
        path: the file.
        kind: what makes the run, such as ``"FlowVI"``.

    Attributes:
        fingerprint: plain values that must agree too, such as what the run depends on besides the module.
        failed: whether the file could not be written.
    """

    def __init__(self, path: str | Path, kind: str) -> None:
        self.path, self.kind = Path(path), kind
        self.fingerprint: list[Any] = []
        self.failed = False
        if not self.path.parent.is_dir():
            raise CheckpointError(f"checkpoint={str(path)!r}: the folder {str(self.path.parent)!r} does not exist")

    def save(self, module: nn.Module, state: dict[str, Any]) -> None:
        """Write the module's parameters, ``state`` (tensors and plain values) and, unless it has one, the global random state.

        Where that fails, as on a full disk, a ``CheckpointWarning`` says so once, the file stays as it was, and the run goes on.
        """
        own = {"format": self._format, "signature": self._signature(module), "module": module.state_dict()}
        try:
            write({**own, **random_state(), **state}, self.path)
        except CheckpointError as error:
            if not self.failed:
                warnings.warn(f"{error}. The fit goes on, and can be resumed from what the file held before", CheckpointWarning, stacklevel=2)
            self.failed = True

    def _signature(self, module: nn.Module) -> list[Any]:
        """What must agree between file and run: the fingerprint, the parameters' shapes and, for a guide, the sites and theirs."""
        shapes = [[name, list(t.shape)] for name, t in module.state_dict().items()]
        sites: Any = getattr(module, "sites", ())
        return [self.fingerprint, [[s.name, list(s.shape), s.start, s.stop] for s in sites], shapes]

    @property
    def _format(self) -> str:
        return f"pyro_flows.{self.kind}/3"

    def load(self, module: nn.Module) -> dict[str, Any] | None:
        """Restore the module's parameters and the random state; ``None`` when there is no file yet.

        Raises:
            CheckpointError: the file is damaged, is something else, or belongs to another model, guide or flow.
        """
        if not self.path.exists():
            return None
        content = read(self.path, self._format, f"a {self.kind} checkpoint")
        if not fingerprints_agree(content["signature"], self._signature(module), _SUMMATION):
            what = f"{str(self.path)!r} belongs to another model, guide, flow or data (sites, shapes, densities, rows or options differ)"
            raise CheckpointError(f"{what}: delete it, or give another path")
        module.load_state_dict(content["module"])
        restore_random_state(content)
        return content


def remedy_of_interrupt(checkpoint: Checkpoint | None) -> str:
    """What a user who stopped a run can do now, or could have done."""
    return "run again with the same checkpoint to go on" if checkpoint else "with a checkpoint it could have gone on later"
