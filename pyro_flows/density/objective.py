"""What an objective of ``fit_density`` is."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..distributions.abstract_flow import AbstractFlow
from .rows import Rows

__all__ = ["Objective"]


class Objective:
    """A loss of rows, by which :func:`~pyro_flows.density.fit_density` fits a flow.

    Subclasses implement :meth:`loss`, and override of the rest what differs.

    Attributes:
        name: what is minimised, in words.
        in_nats: whether the loss is minus a log density, or a bound of it.
        takes_labels: whether classes of rows are made use of.

    Example:
        >>> import torch, pyro_flows as pf
        >>> class Robust(pf.density.Objective):
        ...     name, in_nats = "beta divergence", False
        ...     def loss(self, flow, rows):
        ...         return -(0.1 * flow(rows.context).log_prob(rows.x)).exp()
        >>> fit = pf.fit_density(pf.flows.realnvp(2), torch.randn(100, 2), objective=Robust(), max_steps=5, progress=False)
        >>> fit.loss_name
        'beta divergence'
    """

    name: str = "loss"
    in_nats: bool = True
    takes_labels: bool = False

    def validate(self, flow: AbstractFlow) -> None:
        """Raise an ``OptionError`` for a flow that cannot be fitted so; called before any work."""

    def prepare(self, flow: AbstractFlow, rows: Rows) -> Any:
        """What the loss of a batch is computed from: a ``NamedTuple`` of tensors with an entry for each row, by default the rows.

        All processes prepare the whole batch, so random numbers that are drawn here are the same in each; then each takes its part.
        """
        return rows

    def loss(self, flow: AbstractFlow, rows: Any) -> Tensor:
        """The loss of each row, ``(N,)``, from what :meth:`prepare` gave."""
        raise NotImplementedError

    def validation_loss(self, flow: AbstractFlow, rows: Any) -> Tensor:
        """The loss of each row that decides which state is best, ``(N,)``; by default that of training."""
        return self.loss(flow, rows)

    def before_validation(self, flow: AbstractFlow, rows: Rows) -> None:
        """What is done to the flow before each validation, given the rows held out."""

    def notes(self, flow: AbstractFlow, rows: Rows) -> list[str]:
        """What a user should know about the fitted flow, in words."""
        return []

    def fingerprint(self) -> list[Any]:
        """Words and numbers that must agree between a checkpoint and the call that resumes it."""
        plain = (str, int, float, bool)
        return [type(self).__name__, *(f"{key}={value}" for key, value in sorted(vars(self).items()) if isinstance(value, plain))]
