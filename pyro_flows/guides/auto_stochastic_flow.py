"""The automatic guide whose flow draws an index: posteriors with separate modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.trace_messenger import TraceMessenger
from torch import Tensor, nn

from .. import flows
from ..errors import IntractableError, OptionError, ShapeError
from ..model.sites import LatentSite, init_to_typical
from ..stochastic import StochasticFlow
from ..transforms import FlowTransform, Standardize
from .auto_flow import AutoFlow, TrainingOptions
from .block import Block, Layers

__all__ = ["AutoStochasticFlow"]

_MOST_PATHS = 256  # outcomes of a draw


def _ar_lwta(dim: int) -> StochasticFlow:
    """As many units as ``units ** dim`` outcomes allow, two at the least."""
    units = next((u for u in (4, 3) if u**dim <= _MOST_PATHS), 2)
    return flows.ar_lwta(dim, transforms=1, units=units, max_paths=_MOST_PATHS)


RECIPES: dict[str, Callable[[int], StochasticFlow]] = {"lwta": lambda dim: flows.lwta(dim, units=4), "ar_lwta": _ar_lwta, "cif": flows.cif}


class AutoStochasticFlow(AutoFlow):
    r"""A stochastic flow over all continuous latent sites of a model: base, flow, fixed unit, supports.

    Auxiliary sites hold what the flow draws, and a factor in the guide the reverse kernel :math:`r(u \mid z)` of the indices, so that every ELBO
    of stock Pyro that is right for those sites is right for this guide, with the model unchanged:

    .. math:: E[\log p(D, z) + \log r(u \mid z) - \log q(z, u)] \le E[\log p(D, z) - \log q(z)] \le \log p(D)

    **Discrete indices** (``"lwta"``, ``"ar_lwta"``): the path is one site, summed out by ``TraceEnum_ELBO``, and :math:`r` is the exact posterior,
    so that the first inequality is an equality. Other ELBOs would leave the choice of the path to the score function, and are refused in training.
    **Continuous indices** (``"cif"``): any ELBO, such as ``Trace_ELBO``; :math:`r` is learned.
    :class:`~pyro_flows.vi.FlowVI` trains both, discrete ones by a sum over paths whose gradient has no noise where guide and posterior agree.

    Args:
        model: a Pyro model.
        flow: ``"lwta"``, ``"ar_lwta"`` (up to eight dimensions), ``"cif"``, a :class:`~pyro_flows.stochastic.StochasticFlow`, or a function from
            the dimension to one. Discrete flows must be exact, and a point of the base may become at most ``max_paths`` points.
        init_loc_fn: where each site starts.
        init_scale: the flow's unit, in unconstrained space: units start within about two of it around the initial point, so it should be about as
            large as the distance between modes.

    It has no circles: angles draw a ``SupportWarning``, as in :class:`AutoFlow`. Reparameterise them by
    :class:`~pyro_flows.manifolds.ManifoldReparam`, or use :class:`AutoManifoldFlow`.

    Cost of a step: a draw's density is a sum over paths at each of its outcomes, :math:`P^2` densities of the base for ``P`` paths.

    Raises:
        OptionError, ShapeError: a flow that is not stochastic, not exact though discrete, of both kinds, of another size, or
            with layers of a Markov chain.
        IntractableError: an ELBO that does not sum out the path, in training.
        PyroFlowsError: what :class:`~pyro_flows.guides.AutoFlow` raises.

    Reference: Variational inference with continuously-indexed normalizing flows (Caterini et al., 2021), https://arxiv.org/abs/2007.05426

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> from pyro.infer import SVI, TraceEnum_ELBO
        >>> def model():
        ...     x = pyro.sample("x", dist.Normal(0.0, 3.0))
        ...     pyro.sample("y", dist.Normal(x.abs(), 0.1), obs=torch.tensor(2.0))
        >>> svi = SVI(model, AutoStochasticFlow(model), pyro.optim.Adam({"lr": 1e-2}), TraceEnum_ELBO(max_plate_nesting=0))
        >>> svi.step() > 0
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        flow: str | StochasticFlow | Callable[[int], StochasticFlow] = "lwta",
        init_loc_fn: Callable[..., Any] = init_to_typical,
        init_scale: float = 1.0,
    ) -> None:
        spec: Any = flow
        super().__init__(model, spec, "diagonal", None, init_loc_fn, init_scale)
        self.config = {"flow": flow, "init_scale": init_scale}

    @staticmethod
    def _check_flow(flow: Any) -> None:
        if isinstance(flow, str) and flow not in RECIPES:
            raise OptionError(f"flow={flow!r} cannot be a stochastic guide: choose one of {', '.join(RECIPES)}, or give a StochasticFlow")
        if not isinstance(flow, (str, StochasticFlow)) and (isinstance(flow, nn.Module) or not callable(flow)):
            raise OptionError(f"flow must be a name, a StochasticFlow or a function of the dimension, got {type(flow).__name__}: see AutoFlow")

    def _build(self, sites: list[LatentSite], blocks: list[Block], loc: Tensor) -> StochasticFlow:  # type: ignore[override]
        spec: Any = self.config["flow"]
        dim = loc.numel()
        inner = spec if isinstance(spec, StochasticFlow) else (RECIPES[spec] if isinstance(spec, str) else spec)(dim)
        if not isinstance(inner, StochasticFlow):
            raise OptionError(f"flow= must give a StochasticFlow, got {type(inner).__name__}: AutoFlow takes bijections")
        _check_fit(inner, dim)
        # No affine layer that is learned: a scale for all modes together would shrink faster than they find their locations.
        unit = Standardize(loc, torch.diag(torch.full_like(loc, float(self.config["init_scale"]))))
        flow = StochasticFlow(inner.base, [*inner.layers, unit], inner.max_paths).to(loc)
        _check_outcomes(flow)
        return flow

    @property
    def inner(self) -> list[FlowTransform]:
        return list(self._modules["flow"].layers)[:-1]

    @property
    def affine(self) -> FlowTransform:
        raise OptionError("a stochastic guide has no affine layer")

    def _layers_of(self, flow: Any) -> list[Layers]:
        return [flow.layers]

    def sample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws of the latent vector and their log density, or an upper bound of it where the flow has no exact one."""
        return self._modules["flow"]().sample_and_log_prob((n,))

    def stages(self, options: TrainingOptions) -> tuple[str, ...]:
        return ("tempered", "flow")

    def objective(self, name: Any) -> Any:
        """Discrete paths are summed, continuous indices drawn; for the latter ``"path"`` and ``"elbo"`` are the same."""
        if not isinstance(name, str):
            return name
        if name not in ("auto", "path", "elbo"):
            raise OptionError(f"objective={name!r} is not known for stochastic flows: choose 'path' or 'elbo'")
        if not self.discrete:
            return "drawn indices"
        return "summed elbo" if name == "elbo" else "summed path"

    @property
    def foldable(self) -> bool:
        return False

    @property
    def discrete(self) -> bool:
        """Whether the flow's indices are discrete."""
        return all(layer.discrete for layer in self._modules["flow"].stochastic)

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """There is none: the flow is no bijection."""
        raise IntractableError("a stochastic flow is no transform of its base, so NeuTraReparam and the like cannot use it: use AutoFlow")

    def sample_latent(self, *args: Any, **kwargs: Any) -> Tensor:
        """Draw the unconstrained vector, with the auxiliary sites."""
        flow: StochasticFlow = self.flow  # type: ignore[assignment]
        name, base = f"_{self._pyro_name}", flow.base()
        z = pyro.sample(f"{name}_base", base, infer={"is_auxiliary": True})
        return self._sum_paths(flow, name, base, z) if self.discrete else self._draw_indices(flow, name, z)

    def _sum_paths(self, flow: StochasticFlow, name: str, base: dist.TorchDistribution, z: Tensor) -> Tensor:
        points, log_prob = flow.spread(z)
        infer = {"is_auxiliary": True, "enumerate": "parallel"}
        path = pyro.sample(f"{name}_path", dist.Categorical(logits=log_prob), infer=infer)
        if path.dim() == z.dim() - 1 and _in_training():
            raise IntractableError(
                "this ELBO does not sum out the path of the discrete flow, and its gradient would hang on the score function: use "
                "TraceEnum_ELBO(max_plate_nesting=...), or FlowVI(model, guide)"
            )
        batch = torch.broadcast_shapes(path.shape, z.shape[:-1])
        taken = path.expand(batch).unsqueeze(-1)
        x = points.expand(*batch, *points.shape[-2:]).gather(-2, taken.unsqueeze(-1).expand(*batch, 1, z.shape[-1])).squeeze(-2)
        log_path = log_prob.expand(*batch, -1).gather(-1, taken).squeeze(-1)
        # From the density of base and path to that of the point: minus the reverse kernel, which is the exact posterior, and the Jacobian.
        pyro.factor(f"{name}_reverse", flow.log_lower(x) - base.log_prob(z) - log_path, has_rsample=True)
        return x

    def _draw_indices(self, flow: StochasticFlow, name: str, x: Tensor) -> Tensor:
        ladj: Tensor | float = 0.0
        indices = []
        steps: Any = flow.steps  # whose continuous indices all have a density, see _check_fit
        for i, step in enumerate(steps):
            if step.has_index:
                u = pyro.sample(f"{name}_u{i}", step.index_given(x), infer={"is_auxiliary": True})
                x, more, _ = step.push(x, u)
                indices.append(u)
            else:
                x, more, _ = step.draw(x)[1]
            ladj = ladj + more
        log_reverse = flow.infer(x, None, indices)[1]
        pyro.factor(f"{name}_reverse", -ladj - log_reverse, has_rsample=True)
        return x


def _check_fit(inner: StochasticFlow, dim: int) -> None:
    """An error for a flow of another size, or with indices that a guide cannot draw."""
    if inner.dim != dim or inner.context_dim:
        raise ShapeError(
            f"flow= must map the model's {dim} unconstrained numbers without a context; it has dim={inner.dim}, "
            f"context_dim={inner.context_dim}: give a function of the dimension, flow=lambda dim: ..."
        )
    unfit = [type(layer).__name__ for layer in inner.stochastic if not layer.discrete and not hasattr(layer, "index_given")]
    if unfit:
        raise OptionError(f"flow= has a {unfit[0]} layer, whose index has no density of its own to draw from: use ContinuouslyIndexed layers")
    if len({layer.discrete for layer in inner.stochastic}) > 1:
        raise OptionError("flow= has discrete and continuous indices: a guide takes either")


def _check_outcomes(flow: StochasticFlow) -> None:
    """An ``OptionError`` for a discrete flow with more outcomes of a draw than can be summed."""
    if not all(layer.discrete for layer in flow.stochastic):
        return
    outcomes = flow.num_outcomes
    if not flow.exact or outcomes is None or outcomes > flow.max_paths:
        raise OptionError(
            f"flow= has {outcomes or 'too many'} outcomes of a draw, more than max_paths={flow.max_paths}: use fewer units or blocks, "
            "raise max_paths, or take flow='lwta', which has the same number in any dimension"
        )


def _in_training() -> bool:
    """Whether a step of ``SVI`` is being taken: it is what collects parameters."""
    return torch.is_grad_enabled() and any(isinstance(m, TraceMessenger) and m.param_only for m in _PYRO_STACK)
