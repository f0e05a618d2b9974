"""The gradient of a loss over a module's parameters, summed over processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import IntegrationError, OptionError
from .loop import Outcome
from .processes import Processes

__all__ = ["Gradients"]


class Gradients:
    """A step of the training loop: ``gradients()`` computes a fresh batch's loss and its gradient, as one vector.

    Args:
        module: what is trained; it is put into training mode at each step.
        loss: this process's part of the loss of a fresh batch.
        processes: those that train together.

    Raises:
        OptionError: there is nothing to train.
    """

    def __init__(self, module: nn.Module, loss: Callable[[], Tensor], processes: Processes) -> None:
        self.module, self.loss, self.processes = module, loss, processes
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        if not self.parameters:
            raise OptionError("flow: it has no parameter with requires_grad, so there is nothing to train")
        processes.same_start(module)

    def __call__(self) -> Outcome:
        self.module.train()
        parts: Sequence[Tensor | None]
        try:
            loss = self.loss()
            # autograd.grad, not backward: whatever else the loss depends on (a teacher) is left alone
            parts = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        except IntegrationError:  # of a batch's equation, there or in the adjoint's backward solve: a step without a finite loss
            loss, parts = torch.full_like(self.parameters[0].detach().sum(), torch.nan), (None,) * len(self.parameters)
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, parts, strict=True)]
        flat = self.processes.sum(torch.cat([*(g.reshape(-1) for g in filled), loss.detach().reshape(1)]))
        value = float(flat[-1])
        return Outcome(flat[:-1] if math.isfinite(value) else torch.full_like(flat[:-1], torch.nan), value)
