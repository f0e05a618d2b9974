"""Flow matching: a continuous flow learns its velocity by regression, without solving its equation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..distributions.abstract_flow import AbstractFlow
from ..errors import OptionError
from ..numerics.assignment import near_optimal_assignment
from ..transforms import ContinuousFlow, FlowTransform
from .objective import Objective
from .rows import Rows

__all__ = ["COUPLINGS", "FlowMatching"]

COUPLINGS = ("independent", "ot")


class _Sides(NamedTuple):
    """A continuous flow, whether it runs backwards, and the layers on its two sides."""

    before: list[FlowTransform]
    flow: ContinuousFlow
    backwards: bool
    after: list[FlowTransform]


class Pairs(NamedTuple):
    """Rows as the continuous flow meets them, each with a base draw, a time, and a context where the flow has one."""

    x: Tensor
    z: Tensor
    time: Tensor
    context: Tensor | None


class FlowMatching(Objective):
    r"""The loss of flow matching with straight conditional paths.

    .. math:: E \big\|f\big(t, (1 - t) z + t x\big) - (x - z)\big\|^2, \qquad t \sim U(0, 1),\ z \sim \text{base},\ x \sim \text{data}

    Its minimiser :math:`f(t, \cdot)` is the mean of :math:`x - z` given the point at time :math:`t`, and carries the base to the distribution of
    the data. On a sphere or a torus the paths are geodesics. With the coupling ``"ot"`` each batch pairs its ``z`` and ``x`` so that they are close:
    paths cross less, and are straighter.

    It is for flows of one :class:`~pyro_flows.transforms.ContinuousFlow`, or the inverse of one, and around it only layers without parameters to
    learn.

    Args:
        coupling: ``"independent"`` or ``"ot"``.

    Raises:
        OptionError: another kind of flow, an unknown coupling, or ``"ot"`` with a context, which it would mix up.

    References: Flow matching for generative modeling (Lipman et al., 2022), https://arxiv.org/abs/2210.02747; Improving and generalizing flow-based
    generative models with minibatch optimal transport (Tong et al., 2023), https://arxiv.org/abs/2302.00482
    """

    name = "flow matching loss"
    in_nats = False

    def __init__(self, coupling: str = "independent") -> None:
        if coupling not in COUPLINGS:
            raise OptionError(f"coupling={coupling!r} is not known: choose one of {', '.join(COUPLINGS)}")
        self.coupling = coupling

    def validate(self, flow: AbstractFlow) -> None:
        if self.coupling == "ot" and flow.context_dim:
            raise OptionError('coupling="ot" would pair points of different contexts: use coupling="independent" for a conditional flow')
        if not flow.bijective:
            raise OptionError(
                f'objective="flow_matching" trains a ContinuousFlow alone, as in pf.flows.cnf(dim), and this {type(flow).__name__} has latent '
                'variables besides: use objective="auto"'
            )
        count = sum(layer.ode is not None for layer in flow.layers)
        if count != 1:
            raise OptionError(
                f'objective="flow_matching" trains the velocity of one ContinuousFlow, and this flow has {count}: use pf.flows.cnf(dim), on a '
                "sphere or torus m pf.Flow(pf.manifolds.Uniform(m), pf.manifolds.RiemannianContinuousFlow(m)), or "
                'objective="likelihood"'
            )
        before, _, _, after = _sides(flow)
        others: list[nn.Module] = [flow.base, *before, *after]
        learned = [type(module).__name__ for module in others if any(p.requires_grad for p in module.parameters())]
        if learned:
            raise OptionError(
                f'objective="flow_matching" trains a ContinuousFlow alone, and {", ".join(learned)} would stay as it is: use objective="likelihood"'
            )

    @torch.no_grad()
    def prepare(self, flow: AbstractFlow, rows: Rows) -> Pairs:
        """Rows with fresh base draws and times; each row is paired with a draw of the same batch."""
        before, _, _, after = _sides(flow)
        x, context = rows.x, rows.context
        for layer in reversed(after):
            x = layer.inverse_and_ladj(x, context if layer.context_dim else None)[0]
        base = flow.base(context)
        z = base.sample() if base.batch_shape else base.sample((len(x),))
        for layer in before:
            z = layer.forward_and_ladj(z, context if layer.context_dim else None)[0]
        if self.coupling == "ot":
            z = z[near_optimal_assignment(x, z)]
        return Pairs(x, z, torch.rand(len(x), 1).to(x), context)

    def loss(self, flow: AbstractFlow, rows: Pairs) -> Tensor:
        """The squared error of each pair's velocity."""
        _, continuous, backwards, _ = _sides(flow)
        x, z, time, context = rows
        with torch.no_grad():
            position, wanted = continuous.between(x, z, time) if backwards else continuous.between(z, x, time)
        return ((continuous.velocity(time, position, context) - wanted) ** 2).sum(-1)


def _sides(flow: AbstractFlow) -> _Sides:
    layers = list(flow.layers)
    i = next(i for i, layer in enumerate(layers) if layer.ode)
    continuous, backwards = layers[i].ode
    return _Sides(layers[:i], continuous, backwards, layers[i + 1 :])
