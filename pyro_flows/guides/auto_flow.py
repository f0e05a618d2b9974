"""The automatic flow guide."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Protocol

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.guides import prototype_hide_fn
from torch import Tensor, nn

from ..distributions import Flow, FlowDistribution
from ..errors import OptionError, ParamStoreError
from ..model.context import InFitDtype
from ..model.sites import LatentSite, check_fixed, init_to_typical, pack, read_sites, unpack, unpack_ladj, warn_of_angles
from ..transforms import FlowTransform
from .block import Block
from .euclidean import EuclideanBlock
from .inner_flow import BASES, FlowSpec, check_spec
from .of_blocks import OfBlocks
from .pushforward import AsPushforward

__all__ = ["AutoFlow"]


def _hidden(msg: dict[str, Any]) -> bool:
    """Observed, subsampling and enumerated sites are not the guide's."""
    return prototype_hide_fn(msg) or msg["infer"].get("enumerate") == "parallel"


class TrainingOptions(Protocol):
    """What a guide needs to know of how it is to be trained."""

    @property
    def warm_start(self) -> bool:
        """Whether to look for modes first."""

    @property
    def objective(self) -> Any:
        """What is optimised, by name or as an object."""


class AutoFlow(OfBlocks, AutoContinuous):
    """A normalizing flow over all continuous latent sites of a model: base, flow, affine layer, supports.

    The flow starts at the identity and the affine layer at a small Gaussian around the initial point, so an untrained guide is a mean-field one.
    It is an ``AutoContinuous``: use it with stock ``SVI``, any ELBO, ``Predictive``, ``AutoGuideList`` or ``NeuTraReparam``; or train it with
    :class:`~pyro_flows.vi.FlowVI`, which is faster and checks the result.

    Args:
        model: a Pyro model.
        flow: the flow between base and affine layer: ``"auto"``; the name of a recipe of :mod:`pyro_flows.flows`; a
            :class:`~pyro_flows.distributions.Flow` or a transform, or a function from the dimension to one; or ``None`` for the affine layer alone.
        affine: ``"auto"`` (by dimension), ``"full_rank"``, ``"low_rank"`` or ``"diagonal"``.
        base: ``"normal"``, ``"student_t"`` (heavy tails), or a function from the dimension to a base module. By default that of the given
            :class:`~pyro_flows.distributions.Flow`, or else ``"normal"``.
        init_loc_fn: where each site starts, as in Pyro's autoguides.
        init_scale: standard deviation of the initial guide, in unconstrained space.

    Parameters exist after the first call or after :meth:`setup`. Cost of a draw: one pass of the flow. The density is exact: contractive residual
    layers whose log-det was left at ``"auto"`` compute it.

    In stock ``SVI`` let the nets take smaller steps than the affine layer, since a step of Adam moves all weights of a net at once, and clip them:
    ``ClippedAdam(lambda name: {"lr": 1e-3 if ".net." in name else 1e-2, "clip_norm": 10.0})``. With few particles one rate of 1e-2 diverges.

    Angles (``VonMises`` and its relatives, flows on tori) would be taken for numbers on a line, which draws a ``SupportWarning``:
    :class:`AutoManifoldFlow` knows the circle, and so do models reparameterised by :class:`~pyro_flows.manifolds.ManifoldReparam`.

    Raises:
        ModelError: the model has no latent site, or one inside a subsampled or sequential plate, or that starts outside its support.
        SupportError: a site is discrete and not enumerated, or its support has no bijection from the reals, or depends on other sites.
        OptionError: an unknown ``flow``, ``affine`` or ``base``.
        ShapeError: a ``flow`` or ``base`` of another dimension than the model's.
        ParamStoreError: another guide's parameters stand under the same names in Pyro's parameter store.

    Reference: Variational inference with normalizing flows (Rezende & Mohamed, 2015), https://arxiv.org/abs/1505.05770

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     return pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        >>> guide = AutoFlow(model).setup()
        >>> guide()["x"].shape
        torch.Size([3])
    """

    prototype_trace: Any
    kinds: ClassVar[tuple[type[Block], ...]] = (EuclideanBlock,)  # of blocks, in the order in which they depend on each other

    def __init__(
        self,
        model: Callable[..., Any],
        flow: FlowSpec = "auto",
        affine: str = "auto",
        base: str | Callable[[int], nn.Module] | None = None,
        init_loc_fn: Callable[..., Any] = init_to_typical,
        init_scale: float = 0.1,
    ) -> None:
        self._check_flow(flow)
        if affine not in ("auto", "full_rank", "low_rank", "diagonal"):
            raise OptionError(f"affine={affine!r} is not known: choose 'auto', 'full_rank', 'low_rank' or 'diagonal'")
        if not (base is None or callable(base) or base in tuple(BASES)):
            raise OptionError(f"base={base!r} is not known: choose one of {', '.join(BASES)}, or give a function of the dimension")
        if not 0 < init_scale < float("inf"):
            raise OptionError(f"init_scale must be positive and finite, got {init_scale}")
        super().__init__(model, init_loc_fn=init_loc_fn)
        self.config: dict[str, Any] = {"flow": flow, "affine": affine, "base": base, "init_scale": init_scale}
        self.sites: list[LatentSite] = []
        self.blocks: list[Block] = []

    _check_flow = staticmethod(check_spec)
    _prototype_hide_fn = staticmethod(_hidden)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        trace = self.first_trace(*args, **kwargs)
        sites = self._read_sites(trace)  # before the parent's own, terser errors
        loc = pack(sites, {s.name: trace.nodes[s.name]["value"] for s in sites})
        blocks = [block for kind in self.kinds for block in kind.of(sites)]
        flow = self._build(sites, blocks, loc.detach())
        with torch.no_grad(), _replaying(self, self._as_parent_sees(poutine.replay(self._model[0], trace=trace), sites)):
            super()._setup_prototype(*args, **kwargs)
        prototype = self.prototype_trace
        self.prototype_trace = None  # not set up, if what follows fails
        self._check_supports(sites, trace, loc + 0.1, args, kwargs)
        self.prototype_trace, self.sites, self.blocks, self.flow = prototype, sites, blocks, flow
        self.latent_dim = len(loc)
        self.config = {k: "custom" if callable(v) else v for k, v in self.config.items()}  # a lambda has done its work, and cannot be pickled

    def first_trace(self, *args: Any, **kwargs: Any) -> poutine.Trace:
        """A trace of the model's latent sites, at the values that ``init_loc_fn`` gives."""
        with torch.no_grad(), poutine.block(), InFitDtype():
            return poutine.trace(poutine.block(self.model, self._prototype_hide_fn)).get_trace(*args, **kwargs)

    def _read_sites(self, trace: poutine.Trace) -> list[LatentSite]:
        warn_of_angles(trace.iter_stochastic_nodes())
        return read_sites(trace.iter_stochastic_nodes())

    @torch.no_grad()
    def _check_supports(self, sites: list[LatentSite], trace: poutine.Trace, z: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at the supports from another point: no fixed bijection is right for one that moves."""
        for name, value in unpack(sites, z).items():
            trace.nodes[name]["value"] = value
        try:
            with poutine.block(), pyro.validation_enabled(False):
                moved = poutine.trace(poutine.replay(self.model, trace=trace)).get_trace(*args, **kwargs)
        except Exception:  # a model that cannot stand there says nothing about its supports
            return
        check_fixed(sites, z, moved.nodes)

    def _as_parent_sees(self, model: Callable[..., Any], sites: list[LatentSite]) -> Callable[..., Any]:
        """The model as ``AutoContinuous`` is to read it: with supports that have bijections from the reals."""
        return model

    def _build(self, sites: list[LatentSite], blocks: list[Block], loc: Tensor) -> Flow:
        base, transform = blocks[0].build(sites, loc, 0, self.config)
        return Flow(base, transform).to(loc)

    # The stages of FlowVI.

    def stages(self, options: TrainingOptions) -> tuple[str, ...]:
        """The names of the stages that train the guide, in order."""
        start = ("warm start",) if options.warm_start and self.foldable else ()
        return (*start, "affine", *(("flow",) if self.inner else ()))

    def objective(self, name: Any) -> Any:
        """The objective that suits the guide where ``"auto"`` leaves it open; any other as it is."""
        return "path" if name == "auto" else name

    @property
    def keeps_start(self) -> bool:
        """Whether a start that was found is left as it is until the flow is trained."""
        return False

    def sample_and_log_prob(self, n: int) -> tuple[Tensor, Tensor]:
        """Draws of the latent vector ``(n, d)`` and their log density ``(n,)``."""
        return self._modules["flow"]().rsample_and_log_prob((n,))

    def setup(self, *args: Any, **kwargs: Any) -> AutoFlow:
        """Run the model once, with its arguments, and make all parameters. Returns the guide."""
        if self.prototype_trace is None:
            with poutine.block():
                self._setup_prototype(*args, **kwargs)
                self._create_plates(*args, **kwargs)
        return self

    # What Pyro asks of an AutoContinuous.

    def get_base_dist(self) -> pyro.distributions.TorchDistribution:
        """The base distribution, on ``R^d``."""
        return self.flow.base()

    def get_transform(self, *args: Any, **kwargs: Any) -> FlowTransform:
        """Base to unconstrained latent vector: flow, affine layer, standardisation."""
        return self.flow.transform

    def get_posterior(self, *args: Any, **kwargs: Any) -> FlowDistribution:
        """The guide's distribution over the unconstrained latent vector."""
        return self.flow()

    def _unpack_latent(self, latent: Tensor) -> Any:
        """By site, as Pyro reads it, with the numbers that a mask leaves out."""
        if any(site.kept is not None for site in self.sites):
            latent = torch.cat([site.unconstrained(latent).reshape(*latent.shape[:-1], -1) for site in self.sites], -1)
        return super()._unpack_latent(latent)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites, as a Pyro guide."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._check_param_store()
        with AsPushforward():
            return super().forward(*args, **kwargs)

    def _check_param_store(self) -> None:
        if not self._pyro_context.active:
            return
        params = pyro.get_param_store()._params
        prefix = f"{self._pyro_get_fullname('flow')}$$$"
        for name, parameter in self._modules["flow"].named_parameters():
            stored = params.get(prefix + name)
            if stored is not None and stored is not parameter:
                raise ParamStoreError(
                    f"Pyro's parameter store already holds {prefix + name!r}, from another guide or a loaded file, so this guide would not be "
                    "trained. Call pyro.clear_param_store() before making a new guide; to load saved parameters use guide.load_state_dict"
                )

    # What the rest of pyro_flows asks.

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """Constrained values by site, each ``(*batch, *site_shape)``, from unconstrained vectors ``(*batch, d)``."""
        return unpack(self.sites, z)

    def unpack_ladj(self, z: Tensor) -> Tensor:
        """The log absolute Jacobian determinant of :meth:`unpack`, ``(*batch,)``."""
        return unpack_ladj(self.sites, z)

    def pack(self, values: dict[str, Tensor]) -> Tensor:
        """Unconstrained vectors ``(*batch, d)`` from constrained values by site."""
        return pack(self.sites, values)

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, num_samples: int = 4000, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles of each site's coordinates from ``num_samples`` draws; each of shape ``(len(quantiles), *site_shape)``.

        Those of an angle are counted from its mean direction, and may lie outside ``[-pi, pi)``.
        """
        self.setup(*args, **kwargs)
        samples = self.unpack(self._modules["flow"]().sample((num_samples,)))
        values = {s.name: s.unwrap(samples[s.name]) for s in self.sites}
        return {k: torch.quantile(v, torch.as_tensor(quantiles, dtype=v.dtype, device=v.device), dim=0) for k, v in values.items()}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians of each site, from draws; directions have length one, angles lie in ``[-pi, pi)``.

        A direction that is as likely as its opposite has no median: each call gives another point. Look at draws then.
        """
        medians = self.quantiles([0.5], *args, **kwargs)
        return {s.name: s.project(medians[s.name][0]) for s in self.sites}

    def __getstate__(self) -> dict[str, Any]:
        for parameter in self.parameters():
            parameter.__dict__.pop("unconstrained", None)  # Pyro's parameter store hangs a weak reference here, which cannot be pickled
        # The model is not pickled, as in Pyro; unlike there, the original keeps it.
        return {**self.__dict__, "_model": (None,), "master": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoFlow:
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__getstate__().items()})
        new.__dict__["_model"] = self._model
        return new


class _replaying:
    """While the parent runs the model again for its prototype, it runs another one."""

    def __init__(self, guide: AutoFlow, model: Callable[..., Any]) -> None:
        self.guide, self.model, self.own = guide, model, guide._model

    def __enter__(self) -> None:
        self.guide._model = (self.model,)

    def __exit__(self, *_: object) -> None:
        self.guide._model = self.own
