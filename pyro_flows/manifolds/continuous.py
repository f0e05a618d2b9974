"""Continuous flows on spheres and tori: points that move along the manifold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap

from ..errors import OptionError
from ..nets import VelocityMLP
from ..nets.velocity import Time
from ..transforms import ContinuousFlow
from ..transforms.continuous import Solution
from .geometry import Sphere, Torus
from .manifold import Manifold
from .sphere_maps import dot
from .transform import OnManifold

__all__ = ["RiemannianContinuousFlow"]


class _Field(nn.Module):
    """A field on a manifold, made of a net, and its Jacobian's products by the chain rule from those of the net."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def _net_products(self, t: Time, x: Tensor, directions: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if hasattr(self.net, "products"):
            return self.net.products(t, x, directions, context)  # type: ignore[operator]
        given = () if context is None else (context,)
        value = self.net(t, x, *given)
        return value, vmap(lambda v: jvp(lambda x: self.net(t, x, *given), (x,), (v,))[1])(directions)


class _Tangent(_Field):
    """The part of a net's output that is tangent to the sphere, at every radius: the field grows with the radius, so its trace does not change."""

    def forward(self, t: Time, x: Tensor, *context: Tensor) -> Tensor:
        radius = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        u = x / radius
        v = self.net(t, u, *context)
        return radius * (v - dot(v, u) * u)

    def products(self, t: Time, x: Tensor, directions: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The field, and its Jacobian times each of the directions ``(K, *batch, n)``."""
        radius = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        u = x / radius
        outward = dot(directions, u)
        turn = (directions - outward * u) / radius  # what u moves by
        v, moved = self._net_products(t, u, turn, context)
        along = dot(v, u)
        tangent = v - along * u
        change = moved - (dot(moved, u) + dot(v, turn)) * u - along * turn
        return radius * tangent, outward * tangent + radius * change


class _Turning(_Field):
    """How fast angles turn: a net sees the points of their circles, all cosines first, and of its output counts what is tangent to each."""

    def forward(self, t: Time, x: Tensor, *context: Tensor) -> Tensor:
        cos, sin = x.cos(), x.sin()
        along_cos, along_sin = self.net(t, torch.cat([cos, sin], -1), *context).chunk(2, -1)
        return cos * along_sin - sin * along_cos

    def products(self, t: Time, x: Tensor, directions: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The field, and its Jacobian times each of the directions ``(K, *batch, d)``."""
        cos, sin = x.cos(), x.sin()
        v, moved = self._net_products(t, torch.cat([cos, sin], -1), torch.cat([-sin * directions, cos * directions], -1), context)
        (along_cos, along_sin), (moved_cos, moved_sin) = v.chunk(2, -1), moved.chunk(2, -1)
        change = cos * moved_sin - sin * moved_cos - directions * (sin * along_sin + cos * along_cos)
        return cos * along_sin - sin * along_cos, change


# kind of points -> the field made of a net, and how many numbers for each coordinate the net takes and gives
_FIELDS: dict[str, tuple[Callable[[nn.Module], nn.Module], int]] = {Sphere.kind: (_Tangent, 1), Torus.kind: (_Turning, 2)}


class RiemannianContinuousFlow(OnManifold, ContinuousFlow):
    r"""Moves points along a sphere or a torus with a velocity that a net gives: :math:`y = z(1)`, where :math:`\dot z = P_z f(t, z, c)`.

    :math:`P_z` leaves the tangent part of a vector. The log ratio of volumes is the integral of the divergence on the manifold, which is the trace of
    the Jacobian in coordinates: on the sphere, of the field :math:`|z|\,P_u f(t, u)`, :math:`u = z / |z|`, that continues it to all radii. That field
    never changes the radius, and the trace does not depend on it, so rounding cannot carry points off; results are projected all the same.

    Args:
        manifold: a :class:`~pyro_flows.manifolds.Sphere` or a :class:`~pyro_flows.manifolds.Torus`.
        net: a module with ``net(t, x)``, or ``net(t, x, context)`` for a conditional flow, where ``x`` are unit vectors ``(*batch, n)`` of the
            sphere, or cosines and then sines of the angles, ``(*batch, 2 d)``; its output has the shape of ``x``. By default a
            :class:`~pyro_flows.nets.VelocityMLP`, with which the flow starts at the identity.
        context_dim: size of the context :math:`c`; 0 for none.
        trace, noise, solver, steps, rtol, atol, adjoint, checkpoint: see :class:`~pyro_flows.transforms.ContinuousFlow`. An exact trace takes a
            product of the Jacobian for each coordinate.

    Train it by maximum likelihood, or without solving by ``fit_density(flow, x, objective="flow_matching")``, whose paths are then geodesics.

    Raises:
        OptionError: another manifold, or options that are not known.
        SupportError: points that are not on the manifold.

    References: Riemannian continuous normalizing flows (Mathieu & Nickel, 2020), https://arxiv.org/abs/2006.10605; Neural manifold ordinary
    differential equations (Lou et al., 2020), https://arxiv.org/abs/2006.10254

    Example:
        >>> import torch
        >>> flow = RiemannianContinuousFlow(Sphere(3), solver="rk4", steps=4)
        >>> y, ladj = flow.forward_and_ladj(torch.eye(3))
        >>> y.norm(dim=-1), ladj.shape
        (tensor([1., 1., 1.], grad_fn=...), torch.Size([3]))
    """

    def __init__(
        self,
        manifold: Manifold,
        net: nn.Module | None = None,
        context_dim: int = 0,
        trace: Literal["exact", "hutchinson"] = "exact",
        noise: Literal["rademacher", "gaussian", "sphere"] = "rademacher",
        solver: str = "dopri5",
        steps: int = 20,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        adjoint: bool = False,
        checkpoint: int = 0,
    ) -> None:
        if getattr(manifold, "kind", None) not in _FIELDS:
            raise OptionError(f"RiemannianContinuousFlow: manifold must be a Sphere or a Torus, got {manifold!r}")
        field, numbers = _FIELDS[manifold.kind]
        net = VelocityMLP(numbers * manifold.size, context_dim) if net is None else net
        super().__init__(manifold.size, field(net), context_dim, trace, noise, solver, steps, rtol, atol, adjoint, checkpoint)
        self._live_on(manifold)

    def _solve(self, *args: Any) -> Solution:
        solution = super()._solve(*args)
        return solution._replace(value=self.manifold.project(solution.value))

    def path(self, x: Tensor, context: Tensor | None = None, points: int = 50) -> Tensor:
        return self.manifold.project(super().path(x, context, points))

    def between(self, start: Tensor, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the geodesic from ``start`` to ``end`` is at time ``t`` in ``[0, 1]``, and its velocity there."""
        return self.manifold.geodesic(start, end, t)
