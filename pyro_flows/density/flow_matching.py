"""Flow matching: a continuous flow learns its velocity by regression, without solving its equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..distributions import Flow
from ..errors import OptionError
from ..numerics.assignment import near_optimal_assignment
from ..transforms import ContinuousFlow, FlowTransform
from .rows import Rows

__all__ = ["COUPLINGS", "FlowMatching"]

COUPLINGS = ("independent", "ot")


class _Sides(NamedTuple):
    before: list[FlowTransform]
    flow: ContinuousFlow
    backwards: bool
    after: list[FlowTransform]


class FlowMatching:
    r"""The loss of flow matching with straight conditional paths.

    .. math:: E \big\|f\big(t, (1 - t) z + t x\big) - (x - z)\big\|^2, \qquad t \sim U(0, 1),\ z \sim \text{base},\ x \sim \text{data}

    Its minimiser :math:`f(t, \cdot)` is the mean of :math:`x - z` given the place at time :math:`t`, and carries the base to the distribution of
    the data. On a sphere or a torus the paths are geodesics. With the coupling ``"ot"`` each batch pairs its ``z`` and ``x`` so that they are close:
    paths cross less, and are straighter.

    Args:
        flow: one :class:`~pyro_flows.transforms.ContinuousFlow`, or the inverse of one, and around it only layers without parameters to learn.
        coupling: ``"independent"`` or ``"ot"``.

    Raises:
        OptionError: another kind of flow, an unknown coupling, or ``"ot"`` with a context, which it would mix up.

    References: Flow matching for generative modeling (Lipman et al., 2022), https://arxiv.org/abs/2210.02747; Improving and generalizing flow-based
    generative models with minibatch optimal transport (Tong et al., 2023), https://arxiv.org/abs/2302.00482
    """

    def __init__(self, flow: Flow, coupling: str = "independent") -> None:
        if coupling not in COUPLINGS:
            raise OptionError(f"coupling={coupling!r} is not known: choose one of {', '.join(COUPLINGS)}")
        if coupling == "ot" and flow.context_dim:
            raise OptionError('coupling="ot" would pair points of different contexts: use coupling="independent" for a conditional flow')
        self.flow, self.coupling, self.sides = flow, coupling, _sides(flow)

    def loss(self, rows: Rows, share: Callable[[Tensor], Tensor] = lambda index: index) -> Tensor:
        """The loss of each row, with fresh times and base draws; of those that ``share`` picks, the pairs being made among all."""
        before, flow, backwards, after = self.sides
        with torch.no_grad():
            x, context = rows.x, rows.context
            for part in reversed(after):
                x = part.inverse_and_ladj(x, context if part.context_dim else None)[0]
            base = self.flow.base(context)
            z = base.sample() if base.batch_shape else base.sample((len(x),))
            for part in before:
                z = part.forward_and_ladj(z, context if part.context_dim else None)[0]
            if self.coupling == "ot":
                z = z[near_optimal_assignment(x, z)]
            t = torch.rand(len(x), 1).to(x)
            mine = share(torch.arange(len(x), device=x.device))
            x, z, t, context = x[mine], z[mine], t[mine], None if context is None else context[mine]
            place, wanted = flow.between(x, z, t) if backwards else flow.between(z, x, t)
        return ((flow.velocity(t, place, context) - wanted) ** 2).sum(-1)


def _sides(flow: Flow) -> _Sides:
    parts = [*flow.transform.layers]
    places = [(i, *found) for i, part in enumerate(parts) if (found := part.ode)]
    if len(places) != 1:
        raise OptionError(
            f'objective="flow_matching" trains the velocity of one ContinuousFlow, and this flow has {len(places)}: use pf.flows.cnf(dim), on a '
            "sphere or torus m pf.Flow(pf.manifolds.Uniform(m), pf.manifolds.RiemannianContinuousFlow(m)), or "
            'objective="likelihood"'
        )
    ((i, velocity, backwards),) = places
    before, after = parts[:i], parts[i + 1 :]
    others: list[nn.Module] = [flow.base, *before, *after]
    learned = [type(m).__name__ for m in others if any(p.requires_grad for p in m.parameters())]
    if learned or flow.dim != flow.transform.dim:
        what = f"{', '.join(learned)} would stay as it is" if learned else "an augmented flow also has an encoder"
        raise OptionError(f'objective="flow_matching" trains a ContinuousFlow alone, and {what}: use objective="likelihood"')
    return _Sides(before, velocity, backwards, after)
