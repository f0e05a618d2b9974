"""What an objective of ``FlowVI`` is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .flat_flow import FlatFlow, Parameters
from .steps import LogDensity, StepOutput

__all__ = ["Objective"]


class Objective:
    """What :class:`~pyro_flows.vi.FlowVI` optimises. Subclasses implement :meth:`step`, and override of the rest what differs.

    Attributes:
        name: what it is called, in options and files.
        obstacle: why its step cannot be captured as a graph; empty where it can.
    """

    name: str
    obstacle: str = ""

    def validate(self, num_particles: int) -> None:
        """Raise an ``OptionError`` for a number of particles that it cannot use; by default any will do."""

    def flat(self, flow: Any) -> FlatFlow:
        """The flow as the functions of one vector of parameters that the step calls."""
        return FlatFlow(flow)

    def step(self, flow: FlatFlow, log_joint: LogDensity, parameters: Parameters, noise: Tensor, power: Tensor) -> StepOutput:
        """Value and gradient, for the density ``p^power``, a scalar power, at base draws ``noise`` ``(N, d)``: no other randomness."""
        raise NotImplementedError
