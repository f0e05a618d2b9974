"""A model's latent sites, laid end to end as one vector of unconstrained numbers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import Delta, MaskedDistribution
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints
from torch.distributions.transforms import identity_transform

from ..errors import ModelError, SupportError, SupportWarning
from ..manifolds import Manifold, contains, manifold_of
from ..manifolds.supports import complaint

__all__ = ["LatentSite", "read_sites", "unpack", "unpack_ladj", "pack", "init_to_typical", "is_deterministic"]


_FAR = 30.0  # unconstrained numbers beyond which a draw of a vague prior is no place to start


@dataclass(frozen=True)
class LatentSite:
    """One latent site and its place in the vector.

    Attributes:
        name: the site's name.
        support: its constraint, event dimensions included.
        bijection: from unconstrained numbers to the support.
        shape: shape of a value, plates included.
        unconstrained_shape: shape of the unconstrained numbers.
        start, stop: the slice of the vector.
        plates: names of the plates it lies in, outermost first.
        manifold: the sphere or torus that its points are taken on as they are, the bijection being the identity; ``None`` for other sites.
        kept: which of the unconstrained numbers are coordinates of the vector, ``(k,)``, where a mask leaves others without a density: these stay as
            they start. ``None`` for all.
        rest: the unconstrained numbers where the site starts.
    """

    name: str
    support: constraints.Constraint
    bijection: Transform
    shape: torch.Size
    unconstrained_shape: torch.Size
    start: int
    stop: int
    plates: tuple[str, ...]
    manifold: Manifold | None = None
    kept: Tensor | None = field(default=None, compare=False)
    rest: Tensor | None = field(default=None, compare=False)

    def unconstrained(self, z: Tensor) -> Tensor:
        """The site's unconstrained numbers ``(*batch, *unconstrained_shape)`` in vectors ``(*batch, d)``, those that a mask leaves out included."""
        own = z[..., self.start : self.stop]
        if self.kept is not None and self.rest is not None:
            fixed = self.rest.reshape(-1).to(own)
            order = torch.arange(len(self.kept), len(self.kept) + len(fixed), device=own.device)
            order[self.kept.to(own.device)] = torch.arange(len(self.kept), device=own.device)
            own = torch.cat([own, fixed.expand(*own.shape[:-1], -1)], -1).index_select(-1, order)
        return own.reshape(z.shape[:-1] + self.unconstrained_shape)

    def log_slopes(self, u: Tensor) -> Tensor:
        """The log absolute Jacobian determinant of the bijection, summed over the numbers that are coordinates, ``(*batch,)``."""
        ladj = self.bijection.log_abs_det_jacobian(u, self.bijection(u))
        flat = ladj.reshape(u.shape[: u.dim() - len(self.unconstrained_shape)] + (-1,))
        if self.kept is not None:
            events = torch.div(self.kept.to(u.device), self.unconstrained_shape.numel() // flat.shape[-1], rounding_mode="floor").unique()
            flat = flat.index_select(-1, events)
        return flat.sum(-1)

    @property
    def size(self) -> int:
        """Numbers of the vector that it takes."""
        return self.stop - self.start

    def contains(self, value: Tensor) -> Tensor:
        """Whether values lie in the support; directions may be off the sphere by rounding."""
        return contains(self.support, value)

    def unwrap(self, draws: Tensor) -> Tensor:
        """Draws ``(N, *shape)`` as numbers whose means and quantiles are right: angles are counted from their mean direction."""
        return draws if self.manifold is None else self.manifold.unwrap(draws)

    def project(self, value: Tensor) -> Tensor:
        """The point of the site's manifold that numbers ``(*batch, *shape)`` stand for; the numbers themselves without a manifold."""
        return value if self.manifold is None else self.manifold.project(value)


def is_deterministic(site: Mapping[str, Any]) -> bool:
    """Whether a traced site only records a value: ``pyro.deterministic``, or the ghost of a reparameterised site."""
    fn = site["fn"]
    masked_delta = isinstance(fn, MaskedDistribution) and fn._mask is False and isinstance(fn.base_dist, Delta)
    return bool(site["infer"].get("_deterministic")) or (site["is_observed"] and masked_delta)


def init_to_typical(site: dict[str, Any] | None = None) -> Any:
    """Start a site at the median of a few prior draws, or near zero through the support's bijection.

    The latter for an improper prior, and for one so vague that its draws over- or underflow. A direction starts at a draw.
    """
    if site is None:
        return init_to_typical
    if site["fn"].support.is_discrete:
        return site["fn"].sample()
    manifold = manifold_of(site["fn"], site["name"])
    value: Any = None if manifold is None else manifold.start(site["fn"])
    if value is not None:
        value._pyro_custom_init = False
        return value
    bijection = _bijection(site["name"], site["fn"].support)
    try:
        value = init_to_median(site)
        unconstrained = bijection.inv(value)
        if bool(torch.isfinite(unconstrained).all()) and (site["fn"].support is constraints.real or float(unconstrained.abs().max()) < _FAR):
            return value
    except NotImplementedError:  # an ImproperUniform cannot be sampled
        pass
    return _near_zero(site, 0.1)


def init_near_zero(radius: float) -> Any:
    """Start each site at a draw of ``N(0, radius^2)`` through its support's bijection, wherever the prior lies; a direction at a draw."""

    def init(site: dict[str, Any] | None = None) -> Any:
        if site is None:
            return init
        manifold = manifold_of(site["fn"], site["name"])
        if site["fn"].support.is_discrete or manifold is not None:
            return init_to_typical(site)
        return _near_zero(site, radius)

    return init


def _near_zero(site: dict[str, Any], radius: float) -> Tensor:
    bijection = _bijection(site["name"], site["fn"].support)
    shape = bijection.inverse_shape(torch.Size(site["fn"].shape()))
    value: Any = bijection(radius * torch.randn(shape))
    value._pyro_custom_init = False
    return value


def _bijection(name: str, support: constraints.Constraint) -> Transform:
    if support.is_discrete:
        raise SupportError(
            f"latent site {name!r} is discrete: sum it out with infer={{'enumerate': 'parallel'}} (and TraceEnum_ELBO in stock SVI), "
            f"or hide it: AutoFlow(poutine.block(model, hide=[{name!r}]))"
        )
    try:
        return biject_to(support)
    except NotImplementedError:
        if "sphere" in repr(support).lower():
            remedy = (
                "a sphere has no global bijection from the reals. Use AutoManifoldFlow(model), which draws it on the sphere (FlowVI does so by "
                "itself), or reparameterise it: poutine.reparam(model, config=pf.manifolds.ManifoldReparam())"
            )
        elif support in (constraints.positive_definite, constraints.lower_cholesky):
            remedy = "build the matrix in the model from a scale vector and dist.LKJCholesky"
        else:
            remedy = "register one with torch.distributions.biject_to.register, or hide the site with poutine.block"
        raise SupportError(f"latent site {name!r} has support {support} without a bijection from the reals: {remedy}") from None


def read_sites(nodes: Iterable[tuple[str, dict[str, Any]]], on_manifolds: bool = False) -> list[LatentSite]:
    """The latent sites of a prototype trace, in the model's order.

    Args:
        nodes: names and sites.
        on_manifolds: whether directions and angles stay on their spheres and tori; otherwise they need bijections as all others do.

    Raises:
        ModelError: no latent site; a site inside a subsampled or sequential plate; a value outside its support.
        SupportError: a site that is discrete and not enumerated, or whose support has no bijection.
    """
    sites: list[LatentSite] = []
    start = 0
    for name, node in nodes:
        for frame in node["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size != frame.size:
                raise ModelError(
                    f"latent site {name!r} lies in plate {frame.name!r}, which subsamples {frame.size} of {frame.full_size}: its posterior would "
                    "have that size. Move the latent out of the plate, use the full plate, or amortise the local site with a guide of its own"
                )
            if not frame.vectorized:
                raise ModelError(
                    f"latent site {name!r} lies in plate {frame.name!r}, which is looped over: use it as a context, with pyro.plate(...), "
                    "or loop over a plain range(...)"
                )
        manifold = manifold_of(node["fn"], name) if on_manifolds else None
        bijection = _bijection(name, node["fn"].support) if manifold is None else identity_transform
        value = node["value"].detach()
        unconstrained = bijection.inv(value)
        support = node["fn"].support
        if not _is_inside(value, bijection, unconstrained, manifold, support):
            where = support if manifold is None else f"({complaint(support, value)})"
            raise ModelError(f"latent site {name!r} starts at a point that is not inside its support {where}: give init_loc_fn= such a point")
        kept = _kept(node, unconstrained.shape) if manifold is None else None
        size = unconstrained.numel() if kept is None else len(kept)
        plates = tuple(f.name for f in sorted(node["cond_indep_stack"], key=lambda f: f.dim))
        place = (start, start + size, plates, manifold, kept, None if kept is None else unconstrained)
        sites.append(LatentSite(name, node["fn"].support, bijection, value.shape, unconstrained.shape, *place))
        start += size
    if start == 0:
        what = "every sample statement is observed, hidden or enumerated"
        raise ModelError(f"the model has no continuous latent site to infer: {what}. Leave out obs= where something is to be inferred")
    return sites


def _kept(node: dict[str, Any], shape: torch.Size) -> Tensor | None:
    """Which unconstrained numbers of a site a mask leaves a density, as positions in the flat site; ``None`` for all."""
    mask, batch = node["mask"], node["value"].shape[: node["value"].dim() - node["fn"].event_dim]
    if not isinstance(mask, Tensor) or bool(mask.all()):
        return None
    shown = mask.expand(batch).reshape(batch + (1,) * (len(shape) - len(batch))).expand(shape)
    return shown.reshape(-1).nonzero()[:, 0]


def warn_of_angles(nodes: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Warn of latent angles that a guide is about to take for numbers on a line."""
    names = [repr(name) for name, node in nodes if _is_periodic(node["fn"], name)]
    if names:
        warnings.warn(
            f"latent site(s) {', '.join(names)} hold angles, which this guide takes for numbers on a line: it knows neither that -pi and pi are one "
            "point nor that the density of VonMises and the like repeats with each turn, so its posterior is right at best far from the seam. Use "
            "AutoManifoldFlow(model), as FlowVI without a guide does, or poutine.reparam(model, config=pf.manifolds.ManifoldReparam())",
            SupportWarning,
            stacklevel=5,
        )


def _is_periodic(fn: Any, name: str) -> bool:
    manifold = manifold_of(fn, name)
    return manifold is not None and manifold.period < math.inf


def _is_inside(value: Tensor, bijection: Transform, unconstrained: Tensor, manifold: Manifold | None, support: constraints.Constraint) -> bool:
    if manifold is not None and manifold.start_tolerance is not None:
        return bool((manifold.distance(value) < manifold.start_tolerance).all())
    if manifold is not None:
        return bool(contains(support, value).all())  # that of VonMises is the line: a turn more is the same angle
    back = bijection(unconstrained)  # torch's inverses clamp a point outside, instead of failing
    return bool(torch.isfinite(unconstrained).all() and torch.allclose(back, value, rtol=1e-2, atol=1e-3 * float(value.abs().max())))


def check_fixed(sites: Iterable[LatentSite], z: Tensor, nodes: dict[str, dict[str, Any]]) -> None:
    """Raise a ``SupportError`` if a site's support is another one in the trace of another point: no fixed bijection is right then."""
    for s in sites:
        if s.manifold is not None:  # there is only one of each size
            continue
        u = s.unconstrained(z)
        if not torch.allclose(biject_to(nodes[s.name]["fn"].support)(u), s.bijection(u)):
            raise SupportError(
                f"the support of latent site {s.name!r} depends on other latent sites: draw it on a fixed support and transform it in the model, "
                f"as in {s.name} = upper * pyro.sample('{s.name}_unit', dist.Uniform(0, 1))"
            )


def unpack(sites: Iterable[LatentSite], z: Tensor) -> dict[str, Tensor]:
    """Constrained values by site, each ``(*batch, *site_shape)``, from unconstrained vectors ``(*batch, d)``."""
    return {s.name: s.bijection(s.unconstrained(z)) for s in sites}


def unpack_ladj(sites: Iterable[LatentSite], z: Tensor) -> Tensor:
    """The log absolute Jacobian determinant of :func:`unpack`, ``(*batch,)``."""
    total = z.new_zeros(z.shape[:-1])
    for s in sites:
        total = total + s.log_slopes(s.unconstrained(z))
    return total


def pack(sites: Iterable[LatentSite], values: dict[str, Tensor]) -> Tensor:
    """Unconstrained vectors ``(*batch, d)`` from constrained values by site, the inverse of :func:`unpack`.

    Points of manifolds are projected onto them: directions have length one to the last digit, and angles lie in ``[-pi, pi)``.
    """
    parts = []
    for s in sites:
        u = s.project(s.bijection.inv(values[s.name]))
        flat = u.reshape(u.shape[: u.dim() - len(s.unconstrained_shape)] + (-1,))
        parts.append(flat if s.kept is None else flat.index_select(-1, s.kept.to(flat.device)))
    return torch.cat(parts, -1)
