"""Which manifold the values of a distribution lie on."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ..errors import SupportError
from .geometry import Sphere, Torus, angles
from .manifold import Manifold
from .product import _Product

__all__ = ["contains", "manifold_of"]

# Their supports are intervals or lines, since torch has no circle; their densities repeat after each turn.
_CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


def manifold_of(fn: Any, name: str) -> Manifold | None:
    """The sphere of one value's last dimension, or the torus of all its entries; ``None`` for what the reals have a bijection to.

    Spheres are told by their support (``ProjectedNormal``, ``VonMisesFisher``, any flow on a sphere), angles by their support or their class
    (``VonMises``, ``SineBivariateVonMises``, ``SineSkewed``, any flow on a torus). Simplices have a bijection. Neither has an angle that is
    merely bounded, such as one of a ``Uniform``: nothing says that its ends meet.

    Args:
        fn: a Pyro distribution.
        name: the name of its site, for errors.

    Raises:
        SupportError: the two points of a sphere of one coordinate; a product of manifolds, which has to be drawn part by part.
    """
    try:
        support = fn.support
    except NotImplementedError:  # a distribution that does not say
        return None
    while isinstance(support, constraints.independent) and support is not angles:
        support = support.base_constraint
    if isinstance(support, _Product):
        raise SupportError(f"latent site {name!r} lies on a product of manifolds, {support}: draw its parts at one site each")
    if support is constraints.sphere:
        if fn.event_shape[-1] < 2:
            raise SupportError(f"latent site {name!r} lies on the sphere of one coordinate, which is two points: use a Bernoulli site")
        return Sphere(int(fn.event_shape[-1]))  # while torch traces, sizes are tensors
    while not isinstance(fn, _CIRCULAR) and isinstance(getattr(fn, "base_dist", None), dist.Distribution):
        if isinstance(fn, dist.TransformedDistribution):
            break  # moved by a transform, angles are what its support says
        fn = fn.base_dist
    if support is angles or isinstance(fn, _CIRCULAR):
        return Torus(math.prod(map(int, fn.shape())))
    return None


def contains(support: constraints.Constraint, value: Tensor) -> Tensor:
    """Whether values lie in a support, where points of spheres may be off by what rounding to single precision does."""
    if isinstance(support, constraints.independent) and support is not angles:
        inside = contains(support.base_constraint, value)
        return inside.flatten(inside.dim() - support.reinterpreted_batch_ndims).all(-1)
    if support is not constraints.sphere:
        return support.check(value)
    return (torch.linalg.vector_norm(value, dim=-1) - 1).abs() <= 1e-6
