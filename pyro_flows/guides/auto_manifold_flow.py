"""The automatic flow guide of models with directions and angles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from ..distributions import Flow
from ..errors import OptionError, SupportError
from ..manifolds import manifold_of
from ..model.sites import LatentSite, read_sites
from ..numerics.random import seeded
from ..transforms import Compose
from .angles import AngleBlock
from .auto_flow import AutoFlow, TrainingOptions
from .block import Block, Layers
from .directions import DirectionBlock
from .euclidean import EuclideanBlock
from .joint import JointBase, JointTransform

__all__ = ["AutoManifoldFlow", "auto_guide"]


class AutoManifoldFlow(AutoFlow):
    r"""A normalizing flow over all continuous latent sites of a model, directions and angles among them.

    Directions are drawn on their spheres and angles on the circle: no chart, no seam, no point that is special. The guide is the product of

    - an :class:`AutoFlow` of all sites that the reals have a bijection to, compositions (by stick-breaking) among them;
    - a flow of all angles, circular splines and couplings, given the base point of the former;
    - for each site of directions a flow on the sphere, affine maps and splines of heights, given the base points of all former ones. The directions
      of a plate have a centre, a spread and features of their own and share the layers; given the former they are independent of each other.

    Its density refers to the product of Lebesgue's measure of the unconstrained numbers, :math:`d\theta` of the angles and the surface measures, as
    the model's does. Untrained, directions and angles are uniform.

    Directions are told by their support (``ProjectedNormal``, ``VonMisesFisher``, flows on spheres, ``ImproperUniform(constraints.sphere, ...)``),
    angles by their class or support (``VonMises``, ``SineBivariateVonMises``, flows on tori). Draws of angles lie in :math:`[-\pi, \pi)`.

    Args:
        model: a Pyro model.
        flow, affine, base: of the Euclidean part, see :class:`AutoFlow`; ``flow=None`` leaves location and spread alone for directions and angles.
            For a model of directions and angles alone other options than ``flow=None`` are refused.
        init_loc_fn, init_scale: see :class:`AutoFlow`.

    It works where :class:`AutoFlow` does, in stock ``SVI`` with every ELBO, ``Predictive``, ``AutoGuideList`` and
    :class:`~pyro_flows.vi.FlowVI`, but not in ``NeuTraReparam``: the base of a direction has no bijection from the reals. Cost of a draw: one pass
    of the flows.

    In stock ``SVI`` the nets take smaller steps than the rest, clipped, as for :class:`AutoFlow`; here they have three names, and 64 particles and
    1500 steps in which both rates fall to a twentieth do well: ``ClippedAdam(lambda name: {"lr": 2e-3 if any(net in name for net in (".net.",
    ".inner.", ".params.")) else 1e-2, "lrd": 0.05 ** (1 / 1500), "clip_norm": 10.0})``.

    Raises:
        ModelError, SupportError, OptionError, ShapeError, ParamStoreError: as :class:`AutoFlow`.
        SupportError: also for a site on a product of manifolds.

    Reference: Normalizing flows on tori and spheres (Rezende et al., 2020), https://arxiv.org/abs/2002.02428

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> def model():
        ...     scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        ...     return pyro.sample("x", dist.ProjectedNormal(torch.zeros(3)))
        >>> guide = AutoManifoldFlow(model).setup()
        >>> round(guide()["x"].norm().item(), 4)
        1.0
    """

    kinds: ClassVar[tuple[type[Block], ...]] = (EuclideanBlock, AngleBlock, DirectionBlock)

    def _read_sites(self, trace: Trace) -> list[LatentSite]:
        return read_sites(trace.iter_stochastic_nodes(), on_manifolds=True)

    def _as_parent_sees(self, model: Callable[..., Any], sites: list[LatentSite]) -> Callable[..., Any]:
        return _AsVectors({s.name for s in sites if s.manifold is not None})(model)

    def _build(self, sites: list[LatentSite], blocks: list[Block], loc: Tensor) -> Flow:
        if sum(len(block.index) for block in blocks) < len(loc):
            raise SupportError(f"no kind of block takes all of the latent sites {', '.join(s.name for s in sites)}: add one to its kinds")
        idle = [f"{name}=" for name, plain in _OPTIONS.items() if self.config[name] not in plain]
        if idle and all(block.manifold is not None for block in blocks):
            raise OptionError(f"{', '.join(idle)} would shape nothing, since the model has directions and angles only: leave it out")
        bases, parts, context_dim = [], [], 0
        for block in blocks:
            base, layers = block.build(sites, loc[block.index], context_dim, self.config)
            bases.append(base)
            parts.append(layers)
            context_dim += block.feature_dim
        return Flow(JointBase(blocks, bases), JointTransform(blocks, parts)).to(loc)

    # The parts of the flow, read past Pyro's module hooks.

    def _layers_of(self, flow: Any) -> list[Layers]:
        return [part.parts for part in flow.transform.parts]

    def _split(self, z: Tensor) -> Sequence[Tensor]:
        return self._joint.order.split(z)

    def _join(self, runs: Sequence[Tensor]) -> Tensor:
        return self._joint.order.join(runs)

    def _combine(self, parts: list[Compose]) -> JointTransform:
        return JointTransform(self.blocks, parts)

    @property
    def _joint(self) -> JointTransform:
        flow: Any = self._modules["flow"]
        joint: JointTransform = flow.transform
        return joint

    # The stages of FlowVI.

    def stages(self, options: TrainingOptions) -> tuple[str, ...]:
        names = super().stages(options)
        if not self.inner:
            return names
        affine = ("affine",) if self.affine is not None else ()  # without numbers there is nothing that a flow would not learn with them
        cover = ("cover",) if self.objective(options.objective) == "score" else ()
        return (*names[: names.index("affine")], *affine, *cover, "flow")

    def objective(self, name: Any) -> Any:
        """By default the score, which sees how much mass each mode has, up to 20 numbers beside directions and angles: its noise grows with them."""
        if name != "auto":
            return name
        few = sum(s.size for s in self.sites if s.manifold is None) <= _FEW
        flow: Any = self._modules["flow"]
        return "score" if few and not flow.has_implicit_layers else "path"

    @property
    def keeps_start(self) -> bool:
        """With a flow, yes: affine layers and locations alone would settle on one mode of several."""
        return bool(self.inner)


class _AsVectors(Messenger):
    """Shows Pyro's ``AutoContinuous``, which asks every support for a bijection, some sites as vectors of plain numbers."""

    def __init__(self, names: set[str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            fn = msg["fn"]
            msg["fn"] = dist.ImproperUniform(constraints.independent(constraints.real, fn.event_dim), fn.batch_shape, fn.event_shape)


_FEW = 20  # numbers
_OPTIONS = {"flow": ("auto", None), "affine": ("auto",), "base": (None,)}  # of the Euclidean part, and what a model without one may say of it


def auto_guide(model: Callable[..., Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, **options: Any) -> AutoFlow:
    """An :class:`AutoManifoldFlow` for a model with latent directions or angles, or else an :class:`AutoFlow`; not set up.

    Args:
        model: a Pyro model.
        args, kwargs: its arguments; it is run once, and the global random state left as it was.
        options: those of the guide.
    """
    guide = AutoFlow(model, **options)
    with seeded():
        trace = guide.first_trace(*args, **kwargs or {})
    if any(manifold_of(node["fn"], name) is not None for name, node in trace.iter_stochastic_nodes()):
        return AutoManifoldFlow(model, **options)
    return guide
