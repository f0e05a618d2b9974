"""Which manifold the values of a distribution lie on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ..errors import SupportError
from .geometry import Simplex, Sphere, Torus
from .manifold import Manifold
from .product import Product, ProductConstraint

__all__ = ["contains", "manifold_of"]

# Their supports are intervals or lines, since torch has no circle; their densities repeat after each turn.
_CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


def manifold_of(fn: Any, name: str) -> Manifold | None:
    """The sphere of one value's last dimension, or the torus of all its entries; ``None`` for what the reals have a bijection to.

    Spheres are told by their support (``ProjectedNormal``, ``VonMisesFisher``, any flow on a sphere), angles by their support or their class
    (``VonMises``, ``SineBivariateVonMises``, ``SineSkewed``, any flow on a torus), a ``MixtureSameFamily`` by its components. Simplices have a
    bijection. Neither has an angle that is merely bounded, such as one of a ``Uniform``: nothing says that its ends meet.

    Args:
        fn: a Pyro distribution.
        name: the name of its site, for errors.

    Raises:
        SupportError: the two points of a sphere of one coordinate; a product of manifolds, which has to be drawn part by part.
    """
    try:
        core = _core(fn.support)
    except NotImplementedError:  # a distribution that does not say
        return None
    if _is_circle(core) or isinstance(_innermost(fn), _CIRCULAR):
        return Torus(math.prod(map(int, fn.shape())))
    size = int(fn.event_shape[-1]) if fn.event_shape else 0  # while torch traces, sizes are tensors
    if size == 1 and isinstance(core, type(constraints.sphere)):
        raise SupportError(f"latent site {name!r} lies on the sphere of one coordinate, which is two points: use a Bernoulli site")
    manifold = _of_vectors(core, size)
    return None if manifold is None else manifold.latent(name)


def inside_of(fn: Any) -> Any:
    """The distribution that another one wraps, or a mixture's components; ``None`` for one that stands by itself."""
    return getattr(fn, "base_dist", None) or getattr(fn, "component_distribution", None)


def _innermost(fn: Any) -> Any:
    """What gives a distribution its values, under all that masks, expands, counts dimensions or mixes. Moved by a transform, they are others."""
    while not isinstance(fn, (*_CIRCULAR, torch.distributions.TransformedDistribution)) and inside_of(fn) is not None:
        fn = inside_of(fn)
    return fn


def points_in(support: constraints.Constraint, value: Tensor) -> Manifold | None:
    """The manifold on which a support wants the vectors of a value's last dimension to lie; ``None`` for supports of other kinds."""
    core, size = _core(support), value.shape[-1] if value.dim() else 0
    return Torus(size) if _is_circle(core) else _of_vectors(core, size)


def _of_vectors(core: constraints.Constraint, size: int) -> Manifold | None:
    """The manifold of vectors of a size under a constraint; ``None`` for constraints of other kinds, and for single numbers."""
    make = next((make for kind, make in _VECTORS.items() if isinstance(core, kind)), None)  # not by identity: copies and pickles are other objects
    return make(core, size) if make is not None and size > 1 else None


def contains(support: constraints.Constraint, value: Tensor) -> Tensor:
    """Whether values lie in a support; points of manifolds may be off by rounding, as :meth:`Manifold.contains` allows."""
    if isinstance(support, constraints.independent) and not _is_circle(support):
        inside = contains(support.base_constraint, value)
        return inside.reshape(*inside.shape[: inside.dim() - support.reinterpreted_batch_ndims], -1).all(-1)
    manifold = points_in(support, value)
    return support.check(value) if manifold is None else manifold.contains(value)


def complaint(support: constraints.Constraint, value: Tensor) -> str:
    """What is to be said of a value that lies outside a support."""
    manifold = points_in(support, value)
    if manifold is None:
        return f"{int((~contains(support, value)).sum())} value(s) lie outside the support {support}: correct the data"
    return manifold.complaint(value)


def _is_circle(support: Any) -> bool:
    return getattr(support, "ends_meet", False)


def _core(support: Any) -> Any:
    """The support of one point: without what only counts dimensions, or says that a mixture's components share it."""
    while not _is_circle(support) and isinstance(getattr(support, "base_constraint", None), constraints.Constraint):
        support = support.base_constraint
    return support


# A constraint of vectors -> the manifold of those of a size. A new manifold of vectors has its constraint here.
_VECTORS: dict[type[constraints.Constraint], Callable[[Any, int], Manifold]] = {
    type(constraints.sphere): lambda constraint, size: Sphere(size),
    type(constraints.simplex): lambda constraint, size: Simplex(size),
    ProductConstraint: lambda constraint, size: Product(*constraint.parts),
}
