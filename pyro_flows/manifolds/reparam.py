"""Reparameterisers of directions and angles, so that what needs the reals (NUTS, every autoguide) works on models that have them."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam import TransformReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.infer.reparam.strategies import Strategy
from torch import Tensor

from ..errors import SupportError
from .supports import inside_of, manifold_of

__all__ = ["SphereReparam", "CircleReparam", "ManifoldReparam"]


def _like(fn: Any) -> Tensor:
    """A tensor of the dtype and on the device of a distribution: the first that it holds, or that what it wraps holds."""
    while fn is not None:
        for attribute in vars(fn).values():
            if isinstance(attribute, Tensor) and attribute.is_floating_point():
                return attribute
        fn = inside_of(fn)
    return torch.zeros(())


class FromNormal(Reparam):
    """Draws standard normal vectors, takes the points that they stand for as the site's value, and weighs it by the site's density.

    Works for every manifold that says how its points are made of normal vectors, see :meth:`Manifold.from_normal`.
    """

    kind: str | None = None  # of the manifold, where only one will do

    def apply(self, msg: Any) -> Any:
        name, fn, value = msg["name"], msg["fn"], msg["value"]
        manifold = manifold_of(fn, name)
        if manifold is None or self.kind not in (None, manifold.kind):
            raise SupportError(f"{type(self).__name__}: site {name!r} has support {fn.support}: it is for sites of {self.kind or 'manifolds'}")
        if msg["is_observed"]:
            raise SupportError(f"{type(self).__name__}: site {name!r} is observed, and needs none: ManifoldReparam() skips such sites")
        start = None if value is None else manifold.to_normal(value)
        zeros = _like(fn).new_zeros(manifold.normal_shape(fn.shape()))
        normal = dist.Normal(zeros, 1.0).to_event(zeros.dim() - len(fn.batch_shape))
        z = pyro.sample(f"{name}_normal", normal, obs=start, infer={"is_observed": False})
        value = manifold.from_normal(z) if value is None else value
        single = manifold.single
        log_volume = single.log_volume * (math.prod(map(int, fn.event_shape)) // single.size)
        pyro.factor(f"{name}_density", fn.log_prob(value) + log_volume)
        return {"fn": dist.Delta(value, event_dim=fn.event_dim).mask(False), "value": value, "is_observed": True}

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class SphereReparam(FromNormal):
    r"""For a latent direction: draws :math:`u \sim N(0, I_n)` and takes :math:`x = u / \|u\|`, weighed by the prior's density.

    .. math:: \log p(u) = \log N(u; 0, I) + \log p(u / \|u\|) + \log\Omega_n

    with :math:`\Omega_n` the sphere's surface. The length of :math:`u` is independent of its direction and integrates out, so this is exact for
    every prior on the sphere that has a density: ``ProjectedNormal``, ``VonMisesFisher``, ``UniformSphere``, a flow. The model then has the
    latent site ``{name}_normal``, on all of :math:`\mathbb{R}^n`; the site itself becomes deterministic.

    Raises:
        SupportError: a site that is observed, or not on a sphere.

    Example:
        >>> import pyro, torch
        >>> from pyro_flows.manifolds import VonMisesFisher
        >>> def model():
        ...     return pyro.sample("x", VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), 5.0))
        >>> trace = pyro.poutine.trace(pyro.poutine.reparam(model, {"x": SphereReparam()})).get_trace()
        >>> trace.nodes["x_normal"]["value"].shape
        torch.Size([3])
    """

    kind = "directions"


class CircleReparam(FromNormal):
    r"""For latent angles: draws :math:`u \sim N(0, I_2)` for each, and takes :math:`\theta = \mathrm{atan2}(u_2, u_1)`, weighed by its density.

    .. math:: \log p(u) = \log N(u; 0, I) + \log p(\theta) + \log 2\pi

    Exact for every density on the circle or on several, :math:`\theta \in [-\pi, \pi)`: ``VonMises``, ``SineBivariateVonMises``, a flow on a
    torus. The model then has the latent site ``{name}_normal``, with one more dimension, of size 2; the site itself becomes deterministic.

    Raises:
        SupportError: a site that is observed, or not one of angles.
    """

    kind = "angles"


class ManifoldReparam(Strategy):
    """Reparameterises every latent site of directions or angles, and leaves all others, and observed ones, as they are.

    A flow prior is drawn from its base first (``TransformReparam``), where the geometry is easier, and its base, uniform on the manifold, from a
    normal vector (:class:`SphereReparam`, :class:`CircleReparam`). Use it as a decorator, or as ``poutine.reparam(model, config=ManifoldReparam())``:
    NUTS and all of Pyro's autoguides then take the model.

    Example:
        >>> import pyro, torch, pyro.distributions as dist
        >>> @ManifoldReparam()
        ... def model(y):
        ...     x = pyro.sample("x", dist.ProjectedNormal(torch.zeros(3)))
        ...     pyro.sample("y", dist.Normal(x, 0.1).to_event(1), obs=y)
        >>> guide = pyro.infer.autoguide.AutoNormal(model)
        >>> sorted(guide(torch.tensor([0.0, 0.0, 1.0])))
        ['x_normal']
    """

    def configure(self, msg: Any) -> Reparam | None:
        """The reparameteriser of one site, or ``None``."""
        fn, name = msg["fn"], msg["name"]
        if msg["is_observed"] or manifold_of(fn, name) is None:
            return None
        if isinstance(_plain(fn), dist.TransformedDistribution) and getattr(_plain(fn), "transforms", None):
            return TransformReparam()
        return FromNormal()

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _plain(fn: Any) -> Any:
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return fn
