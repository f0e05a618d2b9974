"""Every public transform of manifolds, with example instances; they go through the same battery as those of R^D in ``zoo.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pyro.distributions as dist
import torch
from torch import Tensor
from zoo import CIRCLE, Instance, normal

from pyro_flows import manifolds as M
from pyro_flows import transforms as T
from pyro_flows import univariate as U


@dataclass(frozen=True)
class ManifoldInstance(Instance):
    """An example of a transform of a manifold: its points lie there, and the referee of its log-determinant is the ratio of volumes."""

    manifold: M.Manifold = M.Sphere(3)

    def points(self, *batch: int, scale: float = 1.0, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        z = scale * normal(seed, *batch, self.dim)
        x = torch.softmax(z, -1) if isinstance(self.manifold, M.Simplex) else self.manifold.project(z)
        return x.to(dtype)

    def base(self, *batch: int) -> dist.TorchDistribution:
        one = torch.ones(*batch, self.dim, dtype=torch.float64)
        if isinstance(self.manifold, M.Sphere):
            return M.PowerSpherical(self.manifold.project(one), torch.full(batch, 1.5, dtype=torch.float64))
        if isinstance(self.manifold, M.Simplex):
            return dist.Dirichlet(one + 0.5)
        box = dist.transforms.AffineTransform(-math.pi, 2 * math.pi)
        return dist.TransformedDistribution(dist.Beta(1.5 * one, 2 * one), [box]).to_event(1)

    def moved(self, x: Tensor) -> Tensor:
        return self.manifold.project(x + torch.linspace(0.3, 0.7, self.dim, dtype=x.dtype))

    def along(self, x: Tensor, gradient: Tensor) -> Tensor:
        """Coordinates point out of spheres and simplices too: what a gradient says there is left out."""
        basis = self.manifold.tangent_basis(x.detach())
        return (gradient.unsqueeze(-2) @ basis).squeeze(-2)

    def log_det(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return M.log_volume_ratio(f, x, self.manifold)

    def log_det_by_differences(self, f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
        here, there = self.manifold.tangent_basis(x), self.manifold.tangent_basis(f(x))
        steps = step * here[0].mT
        slope = torch.cat([(f(self.manifold.project(x + e)) - f(self.manifold.project(x - e))) / (2 * step) for e in steps])
        return torch.linalg.slogdet(slope @ there[0])[1][None]

    def extremes(self, dtype: torch.dtype) -> Tensor:
        """Poles and close by; edges and corners down to 1e-36, where gradients, which grow as 1/p, still are numbers in single precision; seams."""
        n = self.dim
        if isinstance(self.manifold, M.Sphere):
            poles = torch.cat([torch.eye(n), -torch.eye(n)]).to(dtype)
            near = [self.manifold.project(poles + d * torch.roll(poles, 1, -1)) for d in (1e-3, 1e-5, 1e-8, 1e-20)]
            return torch.cat([poles, *near, torch.ones(1, n, dtype=dtype) / n**0.5])
        if isinstance(self.manifold, M.Simplex):
            small = torch.tensor([1e-36, 1e-20, 1e-6], dtype=dtype)
            edge = [self.manifold.project(torch.where(torch.eye(n) > 0, s, torch.ones((), dtype=dtype))) for s in small]
            corner = [self.manifold.project(torch.where(torch.eye(n) > 0, torch.ones((), dtype=dtype), s)) for s in small]
            return torch.cat([*edge, *corner]).to(dtype)
        return torch.tensor([-math.pi, math.pi, 0.0, 3.0, math.pi - 1e-6], dtype=dtype)[:, None].expand(-1, n)


def _on(manifold: M.Manifold, id: str, make: Callable[[], T.FlowTransform], context_dim: int = 0, **options) -> ManifoldInstance:
    return ManifoldInstance(id, make, manifold.size, context_dim, manifold=manifold, **options)


_small = {"hidden_features": (8, 8)}
_masked = {"gradient:net.layers.0.weight": "one coordinate: no input comes before another, so every weight is masked"}
_alone = dict.fromkeys(
    ("gradient:net.layers.0.weight", "gradient:net.layers.0.bias", "gradient:net.layers.1.weight", "gradient:net.layers.1.bias"),
    "one angle: its parameters are the last layer's biases",
) | {"gradient:net.layers.2.weight": "one angle: no unit comes before it"}
_turned = {"identity": "turns the order of the parts round"}


def _sphere(n: int, context_dim: int = 0) -> list[ManifoldInstance]:
    where, c = M.Sphere(n), "-context" if context_dim else ""
    one_height = {} if n > 2 else _masked
    makes = {
        "rotation": partial(M.Rotation, n, context_dim),
        "translation": partial(M.NormalizedTranslation, n, context_dim),
        "linear": partial(M.NormalizedLinear, n, context_dim),
        "affine": partial(M.NormalizedAffine, n, context_dim),
        "mobius": partial(M.SphereMobius, n, context_dim),
        "axis": partial(M.AxisFlow, n, context_dim, 4),
        "axis-odd": partial(M.AxisFlow, n, context_dim, 4, antipodal=True),
        "exponential": partial(M.ExponentialMap, n, 3, context_dim),
        "cylinder-sampling": partial(M.CylinderAutoregressive, n, context_dim, "sampling", 4, **_small),
        "cylinder": partial(M.CylinderAutoregressive, n, context_dim, "density", 4, **_small),
    }
    return [
        _on(where, f"sphere-{name}-{n}{c}", make, context_dim, exceptions=one_height if "cylinder" in name else {}) for name, make in makes.items()
    ]


def _simplex(n: int, context_dim: int = 0) -> list[ManifoldInstance]:
    where, c, f = M.Simplex(n), "-context" if context_dim else "", U.RationalQuadraticSpline(bins=4)

    def through(chart: str) -> T.FlowTransform:
        return M.SimplexFlow([T.LULinear(n - 1), T.Coupling(f, n - 1, context_dim=context_dim, **_small)], chart)

    makes = {
        "calibration": partial(M.Calibration, n, context_dim),
        "temperature": partial(M.Calibration, n, context_dim, shifted=False),
        "generalized": partial(M.GeneralizedCalibration, n, context_dim),
        **{f"flow-{chart}": partial(through, chart) for chart in ("alr", "stick_breaking", "ilr")},
    }
    # A matrix is free: at larger perturbations some are nearly singular.
    found = [
        _on(where, f"simplex-{name}-{n}{c}", make, context_dim, param_scale=0.1 if name == "generalized" else 0.3) for name, make in makes.items()
    ]
    lonely = {"gradient:transform.parts.0.lower": "a single coordinate", "gradient:transform.parts.0.upper": "a single coordinate"}
    found = [replace(case, exceptions=lonely) if n == 2 and "flow" in case.id else case for case in found]
    return [_on(where, f"simplex-negative-{n}{c}", partial(M.Calibration, n, context_dim, -0.7), context_dim, exceptions=_turned), *found]


def _torus(d: int, context_dim: int = 0) -> list[ManifoldInstance]:
    where, c = M.Torus(d), "-context" if context_dim else ""
    given = {"context_dim": context_dim}
    return [
        _on(where, f"torus-{kind}-{name}-{d}{c}", make, context_dim, exceptions=exceptions)
        for name, f in CIRCLE.items()
        for kind, make, exceptions in (
            ("elementwise", partial(M.TorusElementwise, f, d, **given), {}),
            ("coupling", partial(M.TorusCoupling, f, d, **given, **_small), {}),
            ("sampling", partial(M.TorusAutoregressive, f, d, "sampling", **given, **_small), _alone if d == 1 else {}),
            (
                "density",
                partial(M.TorusAutoregressive, f, d, "density", torch.arange(d).flip(0), **given, **_small),
                _alone if d == 1 else {},
            ),
        )
    ]


def _mixed() -> T.FlowTransform:
    parts = [M.NormalizedAffine(3, 2), M.AxisFlow(3, bins=4), M.CylinderAutoregressive(3, 2, bins=4, **_small), M.SphereMobius(3).inv]
    return T.Compose(parts)


def _continuous(manifold: M.Manifold, context_dim: int = 0) -> ManifoldInstance:
    options = {"solver": "rk4", "steps": 10}
    make = partial(M.RiemannianContinuousFlow, manifold, None, context_dim, **options)
    name = f"{type(manifold).__name__.lower()}{manifold.size}"
    return _on(manifold, f"continuous-{name}{'-context' if context_dim else ''}", make, context_dim, param_scale=0.01)


MANIFOLD_ZOO: list[ManifoldInstance] = [
    *_sphere(2),
    *_sphere(4, 2),
    *_sphere(3),
    *_simplex(2),
    *_simplex(4, 2),
    *_simplex(3),
    *_torus(1),
    *_torus(2, 2),
    *_torus(3),
    _on(M.Sphere(3), "sphere-compose", _mixed, 2),
    _continuous(M.Sphere(2)),
    _continuous(M.Sphere(4), 2),
    _continuous(M.Torus(1)),
    _continuous(M.Torus(3), 2),
]
