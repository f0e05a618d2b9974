"""Maximum likelihood with the penalties of RNODE, which keep the paths of continuous flows simple."""

from __future__ import annotations

import math

from torch import Tensor

from ..distributions import Flow
from ..errors import OptionError
from .rows import Rows

__all__ = ["Regularized"]


class Regularized:
    r"""Negative log likelihood plus penalties, one solve for all.

    .. math:: -\log q(x) + \lambda_K \int_0^1 \|f\|^2\,dt + \lambda_J \int_0^1 \Big\|\frac{\partial f}{\partial z}\Big\|_F^2\,dt

    Args:
        flow: one with :class:`~pyro_flows.transforms.ContinuousFlow` layers; their penalties are added up.
        kinetic, jacobian: the weights, not negative.

    Raises:
        OptionError: negative weights, or a flow without such layers.
    """

    def __init__(self, flow: Flow, kinetic: float, jacobian: float) -> None:
        for name, weight in (("kinetic", kinetic), ("jacobian", jacobian)):
            if not 0 <= weight < math.inf:
                raise OptionError(f"{name} must be a weight, not negative, got {weight}")
        parts = flow.transform.layers
        fits = flow.dim == flow.transform.dim and any(part.ode for part in parts)
        if (kinetic or jacobian) and not fits:
            why = "this flow has none" if flow.dim == flow.transform.dim else "an augmented flow trains by a bound, which knows no penalty"
            raise OptionError(f"kinetic= and jacobian= weigh the paths of a ContinuousFlow, and {why}: use pf.flows.cnf(dim), or leave them at 0")
        self.flow, self.parts, self.kinetic, self.jacobian = flow, parts, kinetic, jacobian

    def __bool__(self) -> bool:
        return bool(self.kinetic or self.jacobian)

    def loss(self, rows: Rows) -> Tensor:
        """Of each row."""
        z, penalty, ladj = rows.x, rows.x.new_zeros(()), rows.x.new_zeros(())
        for part in reversed(self.parts):
            context = rows.context if part.context_dim else None
            if found := part.ode:
                layer, backwards = found
                solved = layer.solve(z, context, inverse=not backwards, regularize=True)
                z, step = solved.value, solved.ladj
                penalty = penalty + self.kinetic * solved.kinetic + self.jacobian * solved.jacobian
            else:
                z, step = part.inverse_and_ladj(z, context)
            ladj = ladj + step
        return penalty - ladj - self.flow.base(rows.context).log_prob(z)
