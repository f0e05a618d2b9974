"""Every public transform, with example instances: registered here once, examined by every check of ``test_battery.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.func import jacrev

from pyro_flows import nets as N
from pyro_flows import transforms as T
from pyro_flows import univariate as U

SEAM = 3.0  # half-width of the splines below: the battery tries points exactly there


EXTREMES = (1e2, 1e3, 1e4, 1e5, 1e6, 0.0, SEAM)


@dataclass(frozen=True)
class Instance:
    """One example of a transform.

    ``exceptions`` maps a check of the battery to the reason why this instance fails it (a check that then passes is an error), and
    ``gradient:<parameter>`` to the reason why a parameter has no influence.
    """

    id: str
    make: Callable[[], T.FlowTransform]
    dim: int
    context_dim: int = 0
    param_scale: float = 0.3
    exceptions: Mapping[str, str] = field(default_factory=dict)

    def points(self, *batch: int, scale: float = 1.0, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
        return (scale * normal(seed, *batch, self.dim)).to(dtype)

    def context(self, *batch: int, seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor | None:
        return normal(seed, *batch, self.context_dim).to(dtype) if self.context_dim else None

    # What the checks ask of the place where the points live: R^D here, a manifold in manifold_zoo.py.

    def base(self, *batch: int) -> dist.TorchDistribution:
        """A density whose draws can be differentiated."""
        return dist.Normal(torch.zeros(*batch, self.dim, dtype=torch.float64), 1.0).to_event(1)

    def moved(self, x: Tensor) -> Tensor:
        """Other points."""
        return x + 1

    def along(self, x: Tensor, gradient: Tensor) -> Tensor:
        """The part of a gradient at ``x`` that means something."""
        return gradient

    def log_det(self, f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Of a map of one point, by automatic differentiation."""
        return torch.linalg.slogdet(jacrev(f)(x))[1]

    def log_det_by_differences(self, f: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
        """Of a map at one row, by finite differences."""
        steps = step * torch.eye(self.dim, dtype=x.dtype)
        return torch.linalg.slogdet(torch.cat([(f(x + e) - f(x - e)) / (2 * step) for e in steps]))[1][None]

    def extremes(self, dtype: torch.dtype) -> Tensor:
        """Far away, at zero, and at the seams of splines: along each axis and along all."""
        scale = torch.tensor(EXTREMES, dtype=dtype)
        scale = torch.cat([scale, -scale, torch.nextafter(scale, 2 * scale), torch.nextafter(scale, 0 * scale)])
        alone = scale[:, None] * torch.eye(self.dim, dtype=dtype).repeat_interleave(len(scale), 0).view(self.dim, -1, self.dim)
        return torch.cat([alone.flatten(0, 1), scale[:, None].expand(-1, self.dim)])


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(case: Instance, dtype: torch.dtype = torch.float64, seed: int = 0) -> T.FlowTransform:
    """The instance as it is built, with its random initialisation seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return case.make().to(dtype)


@torch.no_grad()
def perturbed(case: Instance, dtype: torch.dtype = torch.float64, seed: int = 0) -> T.FlowTransform:
    """The instance with every parameter moved by ``param_scale`` times a standard normal: initial values hide errors."""
    transform = fresh(case, seed=seed)
    for i, p in enumerate(transform.parameters()):
        p += case.param_scale * normal(1000 * seed + i, *p.shape)
    return transform.to(dtype)


UNIVARIATES = {
    "shift": U.Shift(),
    "affine": U.Affine(),
    "sinh-arcsinh": U.SinhArcsinh(),
    "spline": U.RationalQuadraticSpline(bins=4, bound=SEAM),
    **(
        BY_ROOT := {
            "mixture": U.MixtureCDF(components=3),
            "gaussianization": U.Gaussianization(components=3),
            "deep-sigmoid": U.DeepSigmoid(units=3),
            "unconstrained": U.UnconstrainedMonotone(hidden=3, bound=SEAM),
            "bernstein": U.BernsteinPolynomial(degree=5, bound=SEAM),
            "sum-of-squares": U.SumOfSquares(degree=2, bound=SEAM),
        }
    ),
}
# Of the circle and of an interval, not of the line: test_univariate.py and test_manifolds.py have their own checks of them.
CIRCLE = {"circular": U.CircularSpline(bins=4), "mobius": U.MobiusMixture(3), "shift": U.CircularShift(), "gather": U.CircularGather()}
INTERVAL = {"interval": U.IntervalSpline(bins=4)}
NOT_MAPS = (U.Univariate, U.InvertedByRoot)  # the protocol, and the half of a map

_small = {"hidden_features": (8, 8)}
_tril = torch.tensor([[1.5, 0.0, 0.0], [-0.4, 0.3, 0.0], [2.0, 0.7, 4.0]])
_permuted = {"identity": "starts at its fixed permutation"}
_masked = {"gradient:net.layers.0.weight": "one coordinate: no input comes before another, so every weight is masked"}
_lonely = {"gradient:lower": "a single coordinate has nothing below the diagonal"}
_alone_above = {"gradient:upper": "a single coordinate has nothing above the diagonal"}
_no_turn = {"gradient:vectors": "a line has no rotation but the identity"}
_untouched = {
    "identity": "the first batch decides where it starts",
    "log_det": "the Jacobian is taken under vmap, where it does not look, and before it has seen a batch",
    "vmap": "does not look under vmap, and then sees its first batch outside",
    "state_dict": "two new layers that see the same first batch are equal before one is loaded into the other",
    "inverse_trains": "after the first batch there is nothing left to gain from it",
}
_real = {"gradient:phase": "with one or two coordinates the spectrum is real: there is no phase"}

_line = {"gradient:frame.bias": "the basis of a line is 1 or -1, whatever the frame"}


def _structures(name: str, f: U.Univariate) -> list[Instance]:
    """A univariate map under every structure that can carry it."""
    return [
        Instance(f"elementwise-{name}", partial(T.Elementwise, f, 3), 3),
        Instance(f"elementwise-{name}-1d-context", partial(T.Elementwise, f, 1, context_dim=2), 1, 2),
        Instance(f"coupling-{name}", partial(T.Coupling, f, 5, **_small), 5),
        Instance(f"coupling-{name}-1d", partial(T.Coupling, f, 1, **_small), 1),
        Instance(
            f"coupling-{name}-context",
            partial(T.Coupling, f, 3, torch.tensor([False, True, True]), context_dim=2, **_small),
            3,
            2,
        ),
        *(
            instance
            for direction in ("density", "sampling")
            for instance in (
                Instance(
                    f"autoregressive-{name}-{direction}",
                    partial(T.Autoregressive, f, 4, direction, torch.tensor([2, 0, 3, 1]), **_small),
                    4,
                ),
                Instance(
                    f"autoregressive-{name}-{direction}-context",
                    partial(T.Autoregressive, f, 3, direction, torch.tensor([1, 2, 0]), context_dim=2, **_small),
                    3,
                    2,
                ),
            )
        ),
        Instance(
            f"autoregressive-{name}-residual",
            partial(T.Autoregressive, f, 5, context_dim=1, hidden_features=(8, 8, 6), residual=True),
            5,
            1,
        ),
        Instance(f"autoregressive-{name}-1d", partial(T.Autoregressive, f, 1, "sampling", **_small), 1, exceptions=_masked),
    ]


def _some_structures(name: str, f: U.Univariate) -> list[Instance]:
    """A map that costs many evaluations: with parameters that are free, or given at once, or in turn."""
    picked = [f"coupling-{name}-context", f"autoregressive-{name}-density"] + ["elementwise-gaussianization"] * (name == "gaussianization")
    return [instance for instance in _structures(name, f) if instance.id in picked]


def _mixed() -> T.FlowTransform:
    f = UNIVARIATES["spline"]
    return T.Compose(
        [
            T.Coupling(f, 3, context_dim=2, **_small),
            T.LULinear(3, torch.tensor([2, 0, 1])),
            T.Autoregressive(U.Affine(), 3, "sampling", **_small),
            T.Elementwise(f, 3).inv,
        ]
    )


def _actnorm(dim: int, context_dim: int = 0) -> T.FlowTransform:
    layer = T.ActNorm(dim, context_dim)
    layer.initialized.fill_(True)
    return layer


def _batch_norm() -> T.FlowTransform:
    """One that has seen data, and that stays as it is: in training every call may move it."""
    layer = T.BatchNorm(3)
    layer.inverse_and_ladj(torch.tensor([[1.0, -20.0, 3.0], [2.0, -20.5, -4.0], [0.5, -19.0, 5.0]]))
    return layer.eval()


LINEAR_IN_CONTEXT = {
    "triangular": partial(T.TriangularLinear, 3),
    "lu": partial(T.LULinear, 3, torch.tensor([2, 0, 1])),
    "block-diagonal": partial(T.BlockDiagonalLinear, 4, 2),
    "orthogonal": partial(T.OrthogonalLinear, 3),
    "qr": partial(T.QRLinear, 3),
    "low-rank": partial(T.LowRankLinear, 4, 2),
    "circulant": partial(T.CirculantLinear, 4),
    "actnorm": partial(_actnorm, 3),
}


def _embedded() -> T.FlowTransform:
    features = nn.Sequential(nn.Unflatten(-1, (1, 2, 2)), nn.Conv2d(1, 2, 2), nn.Flatten())  # a small image
    return T.Embedded(T.Coupling(U.Affine(), 3, context_dim=2, **_small), features, 4)


_adaptive = {
    "vmap": "an adaptive solver looks at values",
    "log_det": "the Jacobian is taken under vmap, where it cannot look at values",
}
_adjoint = {
    "vmap": "torch.func cannot see into the backward solve",
    "log_det": "the Jacobian is taken by torch.func",
    "functional_calls_leave_no_trace": "torch.func cannot see into the backward solve",
}


def _continuous() -> list[Instance]:
    """Fixed steps, so many that all solvers agree to the battery's tolerances; the last is the one that is traced."""

    def make(id: str, net: Callable[..., nn.Module], dim: int, context_dim: int = 0, **options: Any) -> Instance:
        exceptions, scale = options.pop("exceptions", {}), options.pop("param_scale", 0.03)
        options = {"solver": "rk4", "steps": 6} | options
        build = lambda: T.ContinuousFlow(dim, net(dim, context_dim, **_small), context_dim, **options)  # noqa: E731
        return Instance(f"continuous-{id}", build, dim, context_dim, scale, exceptions)

    def potential(dim: int, context_dim: int, hidden_features: tuple[int, ...]) -> nn.Module:
        return N.PotentialNet(dim, context_dim, hidden_features[0])

    tight = {"rtol": 1e-10, "atol": 1e-10}
    return [
        make("1d", N.VelocityMLP, 1),
        make("potential", potential, 3),
        make("autoregressive", N.AutoregressiveVelocity, 3, 2, steps=10),
        make("checkpoint", N.VelocityMLP, 3, checkpoint=4),
        make("adjoint", N.VelocityMLP, 3, adjoint=True, exceptions=_adjoint),
        make("adaptive", N.VelocityMLP, 3, 2, solver="dopri8", exceptions=_adaptive, **tight),
        make("context", N.VelocityMLP, 3, 2, steps=4),  # an unrolled graph takes long to compile
    ]


ZOO: list[Instance] = [
    Instance("affine", partial(T.Affine, 3), 3),
    Instance("affine-1d-context", partial(T.Affine, 1, 2), 1, 2),
    *(instance for name, f in BY_ROOT.items() for instance in _some_structures(name, f)),
    *(instance for name, f in UNIVARIATES.items() if name not in BY_ROOT for instance in _structures(name, f)),
    Instance(
        "coupling-all-moved-context",
        partial(T.Coupling, U.Affine(), 2, torch.tensor([True, True]), context_dim=1, **_small),
        2,
        1,
    ),
    Instance("triangular", partial(T.TriangularLinear, 4), 4),
    Instance("triangular-1d", partial(T.TriangularLinear, 1), 1, exceptions=_lonely),
    Instance(
        "standardize",
        partial(T.Standardize, torch.tensor([1.0, -20.0, 3.0]), _tril),
        3,
        exceptions={"identity": "holds what it was given"},
    ),
    Instance("lu", partial(T.LULinear, 4), 4),
    Instance("lu-permuted", partial(T.LULinear, 5, torch.tensor([3, 0, 4, 1, 2])), 5, exceptions=_permuted),
    Instance(
        "lu-1d",
        partial(T.LULinear, 1),
        1,
        exceptions=_lonely | _alone_above,
    ),
    Instance("block-diagonal", partial(T.BlockDiagonalLinear, 6, 3), 6),
    Instance("block-diagonal-1d", partial(T.BlockDiagonalLinear, 1, 1), 1, exceptions=_lonely | _alone_above),
    Instance("orthogonal-few", partial(T.OrthogonalLinear, 6, 2), 6),
    Instance("orthogonal", partial(T.OrthogonalLinear, 5), 5),
    Instance("orthogonal-1d", partial(T.OrthogonalLinear, 1), 1, exceptions=_no_turn),
    Instance("qr-few", partial(T.QRLinear, 6, 2), 6),
    Instance("qr", partial(T.QRLinear, 5), 5),
    Instance("qr-1d", partial(T.QRLinear, 1), 1, exceptions=_no_turn | _alone_above),
    Instance("circulant-even", partial(T.CirculantLinear, 6), 6),
    Instance("circulant", partial(T.CirculantLinear, 5), 5),
    Instance("circulant-2d", partial(T.CirculantLinear, 2), 2, exceptions=_real),
    Instance("circulant-1d", partial(T.CirculantLinear, 1), 1, exceptions=_real),
    Instance("actnorm-new", partial(T.ActNorm, 3), 3, exceptions=_untouched),
    Instance("actnorm-1d", partial(_actnorm, 1), 1),
    Instance("actnorm", partial(_actnorm, 3), 3),
    Instance("batch-norm-1d", lambda: T.BatchNorm(1).eval(), 1),
    Instance("batch-norm", _batch_norm, 3, exceptions={"identity": "normalises by what it has seen"}),
    Instance("low-rank", partial(T.LowRankLinear, 5, 2), 5),
    Instance("low-rank-full", partial(T.LowRankLinear, 2, 2), 2),
    Instance(
        "low-rank-1d",
        partial(T.LowRankLinear, 1, 1),
        1,
        exceptions={"gradient:factor": "the basis of a line is 1 or -1, whatever the factor"},
    ),
    *(
        Instance(f"{name}-conditional", partial(make, context_dim=2), make.args[0], 2, exceptions=_permuted if name == "lu" else {})
        for name, make in LINEAR_IN_CONTEXT.items()
    ),
    Instance("permutation", partial(T.Permutation, torch.tensor([2, 0, 3, 1])), 4, exceptions=_permuted),
    Instance("planar", partial(T.Planar, 4), 4),
    Instance("planar-1d", partial(T.Planar, 1), 1),
    Instance("planar-leaky", partial(T.Planar, 3, activation="leaky_relu"), 3),
    Instance("planar-leaky-1d-context", partial(T.Planar, 1, 2, "leaky_relu"), 1, 2),
    Instance("planar-context", partial(T.Planar, 3, 2), 3, 2),
    Instance("radial", partial(T.Radial, 4), 4),
    Instance("radial-1d", partial(T.Radial, 1), 1),
    Instance("radial-context", partial(T.Radial, 3, 2), 3, 2),
    *(
        instance
        for basis in ("triangular", "householder", "orthogonal")
        for instance in (
            Instance(f"sylvester-{basis}", partial(T.Sylvester, 5, 3, basis=basis), 5),
            Instance(f"sylvester-{basis}-full", partial(T.Sylvester, 2, basis=basis), 2),
            Instance(f"sylvester-{basis}-1d", partial(T.Sylvester, 1, basis=basis), 1, exceptions={} if basis == "triangular" else _line),
            Instance(f"sylvester-{basis}-context", partial(T.Sylvester, 2, 1, 2, basis), 2, 2),  # traced: a graph unrolls each root
        )
    ),
    Instance("block-autoregressive", partial(T.BlockAutoregressive, 4, (3, 2)), 4),
    Instance(
        "block-autoregressive-1d",
        partial(T.BlockAutoregressive, 1, (3, 2)),
        1,
        exceptions=dict.fromkeys(("gradient:across.0", "gradient:across.1", "gradient:out"), "one coordinate: no block comes before another"),
    ),
    Instance("block-autoregressive-context", partial(T.BlockAutoregressive, 2, (2,), 2), 2, 2),
    Instance("residual", partial(T.ContractiveResidual, 3, direction="sampling", hidden_features=(8, 8)), 3),
    Instance("residual-1d", partial(T.ContractiveResidual, 1, norm=1.0, hidden_features=(8,)), 1),
    Instance("residual-wide", partial(T.ContractiveResidual, 10, norm="learned", log_det="exact", **_small), 10),
    Instance("residual-mixed", partial(T.ContractiveResidual, 3, norm=(1.0, 2.0, 3.0), **_small), 3),
    Instance("residual-context", partial(T.ContractiveResidual, 3, 2, norm=float("inf"), **_small), 3, 2),
    *_continuous(),
    Instance("embedded", _embedded, 3, 4),
    Instance("compose", _mixed, 3, 2, exceptions=_permuted),
    Instance(
        "compose-unconditional",
        lambda: T.Compose([T.TriangularLinear(2), T.Coupling(U.Affine(), 2, **_small), T.Affine(2)]),
        2,
    ),
    Instance("inverse", lambda: T.Coupling(UNIVARIATES["spline"], 3, **_small).inv, 3),
    Instance(
        "inverse-context",
        lambda: T.Autoregressive(UNIVARIATES["spline"], 3, context_dim=2, **_small).inv,
        3,
        2,
    ),
]
