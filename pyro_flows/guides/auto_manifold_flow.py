"""The automatic flow guide of models with directions and angles."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.distributions import constraints

from ..distributions import Flow
from ..errors import OptionError
from ..manifolds import Sphere, Torus, manifold_of
from ..model.sites import LatentSite, read_sites, unwrapped
from ..numerics import triangle
from ..numerics.random import seeded
from ..transforms import Compose, ContractiveResidual, FlowTransform, Standardize
from .angle_layers import AnglePlaces, angle_shapes
from .auto_flow import AutoFlow, TrainingOptions
from .direction_layers import DirectionPlaces, DirectionShapes
from .joint import Block, JointBase, JointTransform
from .modes import go_round, look_around, widths

__all__ = ["AutoManifoldFlow", "auto_guide"]


class AutoManifoldFlow(AutoFlow):
    r"""A normalizing flow over all continuous latent sites of a model, directions and angles among them.

    Directions are drawn on their spheres and angles on the circle: no chart, no seam, no point that is special. The guide is the product of

    - an :class:`AutoFlow` of all sites that the reals have a bijection to, compositions (by stick-breaking) among them;
    - a flow of all angles, circular splines and couplings, given the base point of the former;
    - for each site of directions a flow on the sphere, affine maps and splines of heights, given the base points of all former ones. The directions
      of a plate have a place, a spread and features of their own and share the layers; given the former they are independent of each other.

    Its density refers to the product of Lebesgue's measure of the unconstrained numbers, :math:`d\theta` of the angles and the surface measures, as
    the model's does. Untrained, directions and angles are uniform.

    Directions are told by their support (``ProjectedNormal``, ``VonMisesFisher``, flows on spheres, ``ImproperUniform(constraints.sphere, ...)``),
    angles by their class or support (``VonMises``, ``SineBivariateVonMises``, flows on tori). Draws of angles lie in :math:`[-\pi, \pi)`.

    Args:
        model: a Pyro model.
        flow, affine, base: of the Euclidean part, see :class:`AutoFlow`; ``flow=None`` leaves place and spread alone for directions and angles too.
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

    def _read_sites(self, trace: Trace) -> list[LatentSite]:
        return read_sites(trace.iter_stochastic_nodes(), on_manifolds=True)

    def _as_parent_sees(self, model: Callable[..., Any], sites: list[LatentSite]) -> Callable[..., Any]:
        return _AsVectors({s.name for s in sites if s.manifold is not None})(model)

    def _build(self, sites: list[LatentSite], loc: Tensor) -> Flow:
        euclidean, angles = ([s for s in sites if keep(s.manifold)] for keep in (lambda m: m is None, lambda m: isinstance(m, Torus)))
        blocks: list[Block] = []
        parts: list[FlowTransform] = []
        first: Flow | None = None
        seen, shaped = 0, self.config["flow"] is not None
        if euclidean:
            index = _index(euclidean)
            blocks.append(Block(index))
            first = super()._build(_end_to_end(euclidean), loc[index])
            parts.append(first.transform)
            seen = blocks[-1].num_seen
        else:
            idle = [f"{name}=" for name, plain in _OPTIONS.items() if self.config[name] not in plain]
            if idle:
                raise OptionError(f"{', '.join(idle)} would shape nothing, since the model has directions and angles only: leave it out")
        if angles:
            index = _index(angles)
            blocks.append(Block(index, Torus(len(index))))
            places: AnglePlaces | DirectionPlaces = AnglePlaces(len(index), seen)
            places.place(loc[index].to(places.poles))
            parts.append(Compose([*([angle_shapes(len(index), seen)] if shaped else []), places]))
            seen += blocks[-1].num_seen
        for site in sites:
            if isinstance(site.manifold, Sphere):
                n, count = site.manifold.n, site.size // site.manifold.n
                blocks.append(Block(_index([site]), site.manifold, count))
                places = DirectionPlaces(n, count, seen)
                places.place(loc[site.start : site.stop].unflatten(-1, (count, n)).to(places.frames))
                parts.append(Compose([*([DirectionShapes(n, count, seen)] if shaped else []), places]))
                seen += blocks[-1].num_seen
        return Flow(JointBase(blocks, first.base if first else None), JointTransform(blocks, parts)).to(loc)

    # The parts of the flow, read past Pyro's module hooks.

    @property
    def _parts(self) -> list[tuple[Block, list[FlowTransform]]]:
        joint: Any = self._modules["flow"].transform  # type: ignore[union-attr]
        return [(block, list(part.parts)) for block, part in zip(joint.blocks, joint.parts, strict=True)]

    @property
    def _euclidean(self) -> list[FlowTransform]:
        block, layers = self._parts[0]
        return layers if block.manifold is None else []

    @property
    def inner(self) -> list[FlowTransform]:
        """The layers that are neither affine nor places: empty without a flow."""
        return [layer for block, layers in self._parts for layer in layers[: -2 if block.manifold is None else -1]]

    @property
    def affine(self) -> FlowTransform | None:  # type: ignore[override]
        """The learned affine layer of the Euclidean part; ``None`` without one."""
        return self._euclidean[-2] if self._euclidean else None

    @property
    def standardize(self) -> Standardize | None:  # type: ignore[override]
        """The fixed location and scale of the Euclidean part; ``None`` without one."""
        return self._euclidean[-1] if self._euclidean else None  # type: ignore[return-value]

    @property
    def loc(self) -> Tensor:
        """The point that the fixed layers put the guide around, ``(d,)``."""
        points = [layers[-1].loc if block.manifold is None else layers[-1].poles.flatten() for block, layers in self._parts]
        return self._modules["flow"].transform.order.join(points).clone()  # type: ignore[union-attr, operator, arg-type]

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
        return "score" if few and not any(isinstance(layer, ContractiveResidual) for layer in self._modules["flow"].modules()) else "path"

    @property
    def foldable(self) -> bool:
        return self.affine is None or super().foldable

    @property
    def keeps_start(self) -> bool:
        """With a flow, yes: affine layers and locations alone would settle on one mode of several."""
        return bool(self.inner)

    def affine_flow(self) -> Flow:
        """The guide's distribution with affine layers and places alone; it shares their parameters."""
        flow: Any = self._modules["flow"]
        parts = [Compose(layers[-2 if block.manifold is None else -1 :]) for block, layers in self._parts]
        return Flow(flow.base, JointTransform(flow.transform.blocks, parts))

    def lift(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """A latent vector from a point of ``R^d``: directions are divided by their lengths, log-normal and independent; angles are wrapped."""
        runs, extra = [], z.new_zeros(z.shape[:-1])
        for site in self.sites:
            run = z[..., site.start : site.stop]
            if isinstance(site.manifold, Sphere):
                n = site.manifold.n
                run = run.unflatten(-1, (-1, n))
                length = torch.linalg.vector_norm(run, dim=-1, keepdim=True)
                spread = 0.1 / n  # variance of log length: lengths stay near 1 in any dimension
                log = length.squeeze(-1).log()
                extra = extra + (-(log**2) / (2 * spread) - n * log - 0.5 * math.log(2 * math.pi * spread)).sum(-1)
                run = (run / length).flatten(-2)
            elif site.manifold is not None:
                run = site.manifold.project(run)
            runs.append(run)
        return torch.cat(runs, -1), extra

    def room(self) -> Tensor:
        room = super().room()
        for site in self.sites:
            if isinstance(site.manifold, Torus):
                room[site.start : site.stop] = math.log(2 * math.pi)
        return room

    @torch.no_grad()
    def place(self, loc: Tensor, scale_tril: Tensor, log_density: Callable[[Tensor], Tensor] | None = None) -> bool:
        """Start at a Gaussian over :meth:`lift`'s points: that of numbers and angles, directions around its mean with its spread.

        With a ``log_density`` of such points other modes of angles and directions, each by itself, are looked for first.

        Returns:
            Whether there are directions that start evenly, since they are wide or have modes elsewhere than at a place and its antipode.
        """
        scattered, precision = False, torch.cholesky_inverse(scale_tril)
        numbers: Tensor | None = None  # the rows of those before
        for block, layers in self._parts:
            index = block.index.to(loc.device)
            rows, centre = scale_tril[index], loc[index]
            if block.manifold is None:
                layers[-1].set(centre, triangle(rows))  # type: ignore[operator]
                for parameter in layers[-2].parameters():
                    parameter.zero_()
                numbers = rows
            elif isinstance(block.manifold, Torus):
                seen = 0 if numbers is None else len(numbers)
                joint = triangle(rows if numbers is None else torch.cat([numbers, rows]))
                profiles = None if log_density is None else go_round(log_density, loc, index) * _flatter(scale_tril, precision, index)
                layers[-1].place(centre, joint[seen:, :seen], joint[seen:, seen:], profiles)  # type: ignore[operator]
            else:
                n = block.manifold.size
                index, centre, rows = index.unflatten(0, (-1, n)), centre.unflatten(0, (-1, n)), rows.unflatten(0, (-1, n))
                length = centre.norm(dim=-1, keepdim=True)
                poles = centre / length
                basis = block.manifold.tangent_basis(poles)
                root = triangle(basis.mT @ rows / length.unsqueeze(-1))
                others = None
                if log_density is not None:
                    root = torch.stack([_measured(log_density, loc, precision, *at) for at in zip(index, poles, basis, root, strict=True)])
                    others = look_around(log_density, loc, index.flatten(), poles, root.norm(dim=(-1, -2)) / math.sqrt(n - 1))
                scattered |= bool(layers[-1].place(poles, root, others).any())  # type: ignore[operator]
        return scattered

    @torch.no_grad()
    def fold(self) -> None:
        """Move what the affine layer of the Euclidean part, a triangular one, has learned into the fixed one."""
        if self._euclidean:
            super().fold()

    # Summaries.

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float], *args: Any, num_samples: int = 4000, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal quantiles of each site's coordinates from draws; those of an angle are counted from its mean direction, and may pass the seam."""
        self.setup(*args, **kwargs)
        samples, found = self.unpack(self._modules["flow"]().rsample((num_samples,))), {}  # type: ignore[misc]
        for site in self.sites:
            value = unwrapped(samples[site.name]) if isinstance(site.manifold, Torus) else samples[site.name]
            found[site.name] = torch.quantile(value, torch.as_tensor(quantiles, dtype=value.dtype, device=value.device), dim=0)
        return found

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Marginal medians of each site, from draws; directions have length one, angles lie in ``[-pi, pi)``.

        They need a middle: for a direction as likely as its opposite the median is noise, another one in each call. Look at draws then.
        """
        medians = super().median(*args, **kwargs)
        return {s.name: medians[s.name] if s.manifold is None else s.manifold.project(medians[s.name]) for s in self.sites}


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


def _flatter(scale_tril: Tensor, precision: Tensor, index: Tensor) -> Tensor:
    """The power that makes a density of a coordinate given all others as wide as its marginal one, ``(k, 1)``."""
    return 1 / (precision.diagonal()[index] * scale_tril[index].square().sum(-1)).unsqueeze(-1)


def _measured(
    log_density: Callable[[Tensor], Tensor], loc: Tensor, precision: Tensor, index: Tensor, pole: Tensor, basis: Tensor, root: Tensor
) -> Tensor:
    """The Cholesky factor of a direction's covariance with variances as they are found along its axes, where ``root`` has those of a curvature."""
    variances, axes = torch.linalg.eigh(root @ root.mT)
    along = basis @ axes * loc[index].norm()
    stiffness = (along * (precision[index][:, index] @ along)).sum(0)
    found = widths(log_density, loc, index, pole, basis @ axes, (1 / (stiffness * variances)).clamp(max=1.0))
    return triangle(axes * torch.where(found.isfinite(), found, variances).sqrt())


def _index(sites: Sequence[LatentSite]) -> Tensor:
    """The places of some sites' coordinates in the vector."""
    return torch.cat([torch.arange(s.start, s.stop) for s in sites])


def _end_to_end(sites: Sequence[LatentSite]) -> list[LatentSite]:
    """Sites as they stand in a vector of their own."""
    found: list[LatentSite] = []
    for s in sites:
        start = found[-1].stop if found else 0
        found.append(replace(s, start=start, stop=start + s.size))
    return found


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
