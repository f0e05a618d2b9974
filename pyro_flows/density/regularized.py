"""Maximum likelihood with the penalties of RNODE, which keep the paths of continuous flows simple."""

from __future__ import annotations

import math

from torch import Tensor

from ..distributions.abstract_flow import AbstractFlow
from ..errors import OptionError
from .objective import Objective
from .rows import Rows

__all__ = ["Regularized"]


class Regularized(Objective):
    r"""Negative log likelihood plus penalties, one solve for all.

    .. math:: -\log q(x) + \lambda_K \int_0^1 \|f\|^2\,dt + \lambda_J \int_0^1 \Big\|\frac{\partial f}{\partial z}\Big\|_F^2\,dt

    It is for flows with :class:`~pyro_flows.transforms.ContinuousFlow` layers; their penalties are added up.

    Args:
        kinetic, jacobian: the weights, not negative.

    Raises:
        OptionError: negative weights, or a flow without such layers.
    """

    name = "penalised negative log-likelihood"

    def __init__(self, kinetic: float, jacobian: float) -> None:
        for name, weight in (("kinetic", kinetic), ("jacobian", jacobian)):
            if not 0 <= weight < math.inf:
                raise OptionError(f"{name} must be a weight, not negative, got {weight}")
        self.kinetic, self.jacobian = kinetic, jacobian

    def validate(self, flow: AbstractFlow) -> None:
        if not flow.bijective or not any(layer.ode for layer in flow.layers):
            raise OptionError(
                "kinetic= and jacobian= weigh the paths of ContinuousFlow layers in a flow with an exact density, and this "
                f"{type(flow).__name__} is not one: use pf.flows.cnf(dim), or leave them at 0"
            )

    def loss(self, flow: AbstractFlow, rows: Rows) -> Tensor:
        z, penalty, total_ladj = rows.x, rows.x.new_zeros(()), rows.x.new_zeros(())
        for layer in reversed(flow.layers):
            context = rows.context if layer.context_dim else None
            if layer.ode:
                continuous, backwards = layer.ode
                solved = continuous.solve(z, context, inverse=not backwards, regularize=True)
                z, ladj = solved.value, solved.ladj
                penalty = penalty + self.kinetic * solved.kinetic + self.jacobian * solved.jacobian
            else:
                z, ladj = layer.inverse_and_ladj(z, context)
            total_ladj = total_ladj + ladj
        return penalty - total_ladj - flow.base(rows.context).log_prob(z)
