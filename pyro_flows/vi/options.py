"""The options of a run of :class:`~pyro_flows.vi.FlowVI`, checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import OptionError
from ..training.checkpoint import Checkpoint
from ..training.engine import ENGINES
from .objective import Objective
from .objectives import AUTO, OBJECTIVES, find_objective

__all__ = ["AFFINE_PARTICLES", "Options"]

AFFINE_PARTICLES = 64  # draws a step of the affine layer alone, at most


@dataclass(frozen=True)
class Options:
    """How to train and evaluate a guide; see :class:`~pyro_flows.vi.FlowVI`, whose arguments they are."""

    num_particles: int
    max_steps: int
    lr: float
    seed: int
    engine: str
    warm_start: bool
    objective: str | Objective
    dtype: torch.dtype
    progress: bool
    callbacks: tuple[Callable[[dict[str, Any]], None], ...]
    checkpoint: Checkpoint | None
    num_eval: int

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise OptionError(f"engine={self.engine!r} is not known: choose one of {', '.join(ENGINES)}")
        for name, least in (("num_particles", 2), ("max_steps", 1), ("num_eval", 1)):
            number = getattr(self, name)
            if not isinstance(number, int) or number < least:
                raise OptionError(f"{name} must be a positive integer{', at least 2' * (least == 2)}, got {number!r}")
        if isinstance(self.objective, str) and self.objective not in (AUTO, *OBJECTIVES):
            raise OptionError(f"objective={self.objective!r} is not known: choose one of {AUTO}, {', '.join(OBJECTIVES)}, or give an Objective")
        if self.objective != AUTO:
            for particles in (min(self.num_particles, AFFINE_PARTICLES), self.num_particles):
                find_objective(self.objective).validate(particles)
        if not self.lr > 0:
            raise OptionError(f"lr must be positive, got {self.lr}")
        if self.dtype not in (torch.float32, torch.float64):
            raise OptionError(f"dtype must be torch.float32 or torch.float64, got {self.dtype}")

    def fingerprint(self) -> list[Any]:
        """What must agree between a checkpoint and the run that resumes it."""
        objective = self.objective if isinstance(self.objective, str) else self.objective.name
        return [self.seed, self.num_particles, self.lr, objective, str(self.dtype), self.warm_start]
