"""Densities on manifolds: one measure each, to which they integrate to one; oracles, samplers, rounding, and what bad input gets."""

from __future__ import annotations

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cubature import integral
from manifold_zoo import MANIFOLD_ZOO, ManifoldInstance
from scipy import stats
from torch import Tensor
from torch.distributions import constraints
from zoo import CIRCLE, INTERVAL, normal, perturbed

import pyro_flows as pf
from pyro_flows import manifolds as M
from pyro_flows import transforms as T
from pyro_flows.errors import DtypeError, OptionError, ShapeError, SupportError
from pyro_flows.numerics import log_bessel

WAYS = ("forward_and_ladj", "inverse_and_ladj")


def close(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def grid_size(manifold: M.Manifold) -> int:
    return 4000 if manifold.intrinsic_dim == 1 else 250


def total(d: dist.TorchDistribution, manifold: M.Manifold, resolution: int | None = None) -> float:
    x, w = manifold.quadrature(resolution or grid_size(manifold))
    return float((d.log_prob(x).exp() * w).sum())


def unit(n: int, seed: int = 0) -> Tensor:
    return M.Sphere(n).project(normal(seed, n))


# --- geometry

MANIFOLDS = [M.Sphere(2), M.Sphere(5), M.Simplex(2), M.Simplex(4), M.Torus(3), M.Product(M.Sphere(3), M.Simplex(3), M.Torus(2))]
EXACT = [M.Sphere(2), M.Sphere(3), M.Simplex(3), M.Torus(1), M.Torus(2), M.Product(M.Sphere(2), M.Torus(1))]


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=str)
def test_geometry(manifold):
    x = manifold.random_uniform((4, 100), dtype=torch.float64)
    assert x.shape == (4, 100, manifold.size) and manifold.support.check(x).all() and manifold.support.event_dim == 1
    assert manifold.distance(x).max() < 1e-12
    close(manifold.project(x), x)
    basis = manifold.tangent_basis(x)
    assert basis.shape == (4, 100, manifold.size, manifold.intrinsic_dim)
    close(basis.mT @ basis, torch.eye(manifold.intrinsic_dim).double().expand(4, 100, -1, -1))
    moved = manifold.project(x + 1e-6 * basis[..., 0])
    close((moved - x) / 1e-6, basis[..., 0], 1e-4)  # tangent: the manifold follows it
    assert [copy.deepcopy(manifold) == other for other in MANIFOLDS] == [manifold is other for other in MANIFOLDS]
    assert hash(copy.deepcopy(manifold)) == hash(manifold)


@pytest.mark.parametrize("manifold", EXACT, ids=str)
def test_quadrature(manifold):
    x, w = manifold.quadrature(60)
    assert float(w.sum()) == pytest.approx(math.exp(manifold.log_volume), rel=1e-9)
    assert manifold.support.check(x.float()).float().mean() > 0.99
    draws = manifold.random_uniform((100_000,), dtype=torch.float64)
    for f in (torch.cos, torch.square):
        values = f(draws)
        z = (values.mean(0) - (f(x) * w[:, None]).sum(0) / w.sum()) / (values.std(0) / len(draws) ** 0.5)
        assert z.abs().max() < 4.5


@pytest.mark.parametrize("manifold", (M.Sphere(3), M.Sphere(2), M.Torus(1), M.Torus(3)), ids=repr)
def test_normal_vectors_stand_for_uniform_points(manifold):
    z = normal(0, 4000, *manifold.normal_shape(torch.Size([manifold.size])))
    x = manifold.from_normal(z)
    assert x.shape == (4000, manifold.size) and manifold.contains(x).all()
    close(manifold.from_normal(manifold.to_normal(x)), x)
    assert manifold.features(x).mean(0).abs().max() < 0.06 and manifold.features(x).shape == (4000, manifold.feature_dim)


@pytest.mark.parametrize("manifold", (M.Sphere(4), M.Torus(1), M.Torus(3), M.Simplex(3)), ids=repr)
def test_points_all_round_start_at_the_point(manifold):
    point = manifold.random_uniform((), torch.float64)
    points = manifold.all_round(point, 64)
    assert points.shape == (64, manifold.size) and manifold.contains(points).all()
    close(points[0], point)
    assert (points[1:] - point).abs().amax() > 0.5


def test_angles_are_unwrapped_around_their_mean():
    draws = M.Torus(2).project(torch.tensor([math.pi, 0.5]) + 0.1 * normal(0, 500, 2))
    close(M.Torus(2).unwrap(draws).std(0), M.Torus(2).project(draws - torch.tensor([math.pi, 0.5])).std(0), 1e-6)
    assert M.Torus(2).single == M.Torus(1) and M.Sphere(3).single == M.Sphere(3)
    x = M.Sphere(3).random_uniform((5,))
    assert M.Sphere(3).unwrap(x) is x and M.Simplex(3).latent("x") is None


@pytest.mark.parametrize("ask", ("normal_shape", "from_normal", "to_normal"))
def test_a_manifold_says_what_it_has_no_rule_for(ask):
    with pytest.raises(OptionError, match="Simplex.n=3.*normal vectors"):
        getattr(M.Simplex(3), ask)(torch.Size([3]) if ask == "normal_shape" else torch.ones(3) / 3)


def test_no_quadrature_is_said():
    for manifold in (M.Sphere(4), M.Simplex(4), M.Torus(3)):
        with pytest.raises(OptionError, match="no quadrature"):
            manifold.quadrature()


@pytest.mark.parametrize("case", [c for c in MANIFOLD_ZOO if not c.context_dim and "continuous" not in c.id], ids=lambda c: c.id)
def test_both_referees_agree_with_the_formula(case: ManifoldInstance):
    transform, x = perturbed(case), case.points(30, scale=0.5)
    y, ladj = transform.forward_and_ladj(x)
    for method in ("homogeneous", "tangent"):
        found = M.log_volume_ratio(lambda z: transform.forward_and_ladj(z)[0], x, case.manifold, method)
        close(found, ladj, 1e-9)
    close(M.volume_ratio(lambda z: transform.forward_and_ladj(z)[0], x, case.manifold), ladj.exp(), 1e-8)
    assert case.manifold.distance(y).max() < 1e-12


def test_ratios_of_a_product_add_up():
    manifold = M.Product(M.Sphere(3), M.Torus(1), M.Simplex(3))
    assert manifold.measure == "surface measure x Lebesgue measure of the angles x Lebesgue measure of the first n - 1 parts"
    cases = [next(c for c in MANIFOLD_ZOO if c.id == id) for id in ("sphere-affine-3", "torus-elementwise-circular-1", "simplex-calibration-3")]
    transforms = [perturbed(c) for c in cases]
    sizes = [p.size for p in manifold.parts]

    def f(x: Tensor) -> Tensor:
        return torch.cat([t.forward_and_ladj(r)[0] for t, r in zip(transforms, x.split(sizes, -1), strict=True)], -1)

    x = torch.cat([c.points(5, scale=0.5) for c in cases], -1)
    expected = sum(t.forward_and_ladj(r)[1] for t, r in zip(transforms, x.split(sizes, -1), strict=True))
    for method in ("homogeneous", "tangent"):
        close(M.log_volume_ratio(f, x, manifold, method), expected, 1e-9)
    with pytest.raises(OptionError, match="method"):
        M.volume_ratio(f, x, manifold, "gram")


# --- densities of flows


INTEGRABLE = [c for c in MANIFOLD_ZOO if c.manifold in (M.Sphere(2), M.Sphere(3), M.Simplex(3))]


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id, marks=[pytest.mark.thorough] * (c.id == "sphere-compose")) for c in INTEGRABLE])
def test_flows_integrate_to_one(case: ManifoldInstance):
    transform = perturbed(case)
    bound = transform.condition(case.context()) if case.context_dim else transform
    d = pf.FlowDistribution(case.base(), [bound])
    kinks = any(name in case.id for name in ("axis", "cylinder", "flow", "compose"))
    with torch.no_grad():
        if kinks and case.manifold.intrinsic_dim == 2:
            found = integral(d.log_prob, case.manifold)
        else:
            found = total(d, case.manifold, 40_000 if kinks else None)
    assert found == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", CIRCLE)
def test_flows_of_angles_integrate_to_one(name):
    for d, make in ((1, M.TorusElementwise), (2, M.TorusCoupling), (2, M.TorusAutoregressive)):
        # two splines at full strength leave slopes that 7 million points integrate to 4e-6 only
        gentle = {"param_scale": 0.1} if name == "circular" and d == 2 else {}
        case = ManifoldInstance("", lambda make=make, d=d: make(CIRCLE[name], d), d, manifold=M.Torus(d), **gentle)
        flow = pf.Flow(M.Uniform(M.Torus(d)), perturbed(case)).double()
        with torch.no_grad():
            if name in ("circular", "gather") and d == 2:  # a spline has kinks along curves, a gathering one at the seam
                found = integral(flow().log_prob, M.Torus(2))
            else:
                found = total(flow(), M.Torus(d), 20_000 if d == 1 else 200)
        assert found == pytest.approx(1, abs=1e-6)


def test_splines_of_angles_integrate_to_one_between_knots():
    """A spline's slope has kinks at its knots, where equal steps converge slowly: the integral over each bin, by its ends, is exact."""
    f, params = CIRCLE["circular"], normal(3, 13)
    x = torch.linspace(-math.pi, math.pi, 200_001).double()
    slope = f.forward(x, params.expand(len(x), -1))[1].exp()
    assert torch.trapezoid(slope, x).item() / (2 * math.pi) == pytest.approx(1, abs=1e-8)


# --- distributions

_frame = torch.linalg.qr(normal(7, 3, 3))[0]
_alpha, _shift = torch.tensor([0.7, 2.0, 3.5]).double(), torch.tensor([0.4, -0.3, 0.1]).double()
DISTRIBUTIONS = {
    **{f"vmf-{n}-{k}": M.VonMisesFisher(unit(n), torch.tensor(k).double()) for n in (2, 3) for k in (0.0, 1e-3, 0.7, 20.0, 300.0)},
    **{f"power-{n}-{k}": M.PowerSpherical(unit(n), torch.tensor(k).double()) for n in (2, 3) for k in (0.0, 2.7, 20.0)},
    **{f"acg-{n}": M.AngularCentralGaussian(normal(n, n, n).tril() + 2 * torch.eye(n).double()) for n in (2, 3)},
    **{f"affine-{n}": M.AffineUniform(m := normal(n, n, n) + 2 * torch.eye(n).double(), 0.7 * m @ unit(n)) for n in (2, 3)},
    **{f"kent-{k}-{b}": M.Kent(_frame, torch.tensor(k).double(), b) for k, b in ((0.0, 0.0), (8.0, 2.5), (1.0, 0.5), (100.0, 50.0), (500.0, 60.0))},
    **{f"uniform-{n}": M.UniformSphere(n, torch.float64) for n in (2, 3)},
    **{f"uniform-torus-{d}": M.UniformTorus(d, torch.float64) for d in (1, 2)},
    **{f"sgb-{a}": M.SimplicialGeneralizedBeta(_alpha, a, _shift) for a in (1.0, 0.6, 1.8, -0.8)},
    "logistic-normal": M.LogisticNormal(torch.tensor([0.3, -1.0]).double(), torch.tensor([[1.0, 0.0], [0.5, 0.4]]).double()),
    "generalized-dirichlet": M.GeneralizedDirichlet(torch.tensor([1.3, 2.0]).double(), torch.tensor([0.8, 3.0]).double()),
}
each = pytest.mark.parametrize("d", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)


@each
def test_distributions_integrate_to_one(d):
    assert total(d, d.manifold) == pytest.approx(1, abs=1e-8)


@each
def test_draws_have_the_density(d):
    x, w = d.manifold.quadrature(grid_size(d.manifold))
    p, draws = d.log_prob(x).exp() * w, d.sample((100_000,))
    d.manifold.check(draws, "draws")
    for f in (lambda x: x, lambda x: x * x, lambda x: x * x.roll(1, -1)):
        values = f(draws)
        error = values.std(0) / len(draws) ** 0.5 + 1e-12
        assert ((values.mean(0) - p @ f(x)) / error).abs().max() < 4.5
    try:
        mean = d.mean
    except NotImplementedError:
        return
    close(p @ x, mean, 1e-7)


@each
def test_reprs_of_distributions_say_sizes(d):
    assert any(c.isdigit() for c in repr(d).partition("(")[2]) and "4" in repr(d.expand((4,)))


@each
def test_distributions_have_batches(d):
    wide = d.expand((4, 5))
    assert wide.batch_shape == (4, 5) and wide.event_shape == d.event_shape
    x = wide.sample((3,))
    assert x.shape == (3, 4, 5, *d.event_shape) and x.dtype == torch.float64
    close(wide.log_prob(x), d.log_prob(x))
    assert d.log_prob(x[0, 0, 0]).shape == () and wide.log_prob(x[0, 0, 0]).shape == (4, 5)
    assert wide.to_event(1).log_prob(x).shape == (3, 4) and wide.expand((2, 4, 5)).batch_shape == (2, 4, 5)
    with pyro.plate("rows", 5):
        assert pyro.sample("x", d).shape == (5, *d.event_shape)


def test_parameters_may_have_batches():
    loc, kappa = M.Sphere(4).random_uniform((3, 1)), torch.tensor([0.5, 5.0])
    for make in (M.VonMisesFisher, M.PowerSpherical):
        d = make(loc, kappa)
        x = d.sample((7,))
        assert d.batch_shape == (3, 2) and x.shape == (7, 3, 2, 4)
        close(d.log_prob(x)[:, 1, 1], make(loc[1, 0], kappa[1]).log_prob(x[:, 1, 1]), 1e-6)
    d = M.AffineUniform(torch.eye(3).expand(2, 3, 3), torch.zeros(3))
    assert d.batch_shape == (2,) and d.sample().shape == (2, 3)
    d = M.SimplicialGeneralizedBeta(torch.ones(4, 3), torch.tensor([[1.0], [2.0]]))
    assert d.batch_shape == (2, 4) and d.sample((5,)).shape == (5, 2, 4, 3)


RSAMPLED = {k: d for k, d in DISTRIBUTIONS.items() if d.has_rsample and d.parameter_dims and "uniform" not in k}


@pytest.mark.parametrize("name", RSAMPLED)
def test_gradients_of_draws_are_unbiased(name):
    """Against the gradient of the quadrature of an expectation, by every parameter."""
    d = RSAMPLED[name]
    parameters = {k: getattr(d, k).clone().requires_grad_() for k in d.parameter_dims}
    again = type(d)(**parameters, validate_args=False)

    def f(x: Tensor) -> Tensor:
        return (x * torch.linspace(-1, 2, x.shape[-1]).double()).sum(-1) + x[..., 0] ** 2

    x, w = d.manifold.quadrature(grid_size(d.manifold))
    exact = torch.autograd.grad((again.log_prob(x).exp() * w * f(x)).sum(), list(parameters.values()), allow_unused=True)
    draws = [torch.autograd.grad(f(again.rsample((2000,))).mean(), list(parameters.values()), allow_unused=True) for _ in range(30)]
    for i, (key, g) in enumerate(zip(parameters, exact, strict=True)):
        found = torch.stack([row[i] for row in draws])
        mean, error = found.mean(0), found.std(0) / len(found) ** 0.5 + 1e-9
        if key == "loc" and isinstance(d.manifold, M.Sphere):  # the density formula and the draws continue a unit vector differently off the sphere
            basis = d.manifold.tangent_basis(parameters["loc"].detach())
            mean, g, error = mean @ basis, g @ basis, error.max()
        if key in ("scale_tril",):
            mean, g = mean.tril(), g.tril()
        assert ((mean - g) / error).abs().max() < 5, key


def test_von_mises_fisher_has_no_biased_gradient():
    for n in (2, 4, 5):
        d = M.VonMisesFisher(unit(n), torch.tensor(2.0, requires_grad=True))
        assert not d.has_rsample and not d.sample().requires_grad
        with pytest.raises(NotImplementedError, match="biased|bias"):
            d.rsample()


# --- oracles


@pytest.mark.parametrize("n", (2, 3, 5, 12, 80))
@pytest.mark.parametrize("kappa", (1e-2, 3.0, 1e2, 1e4))
def test_von_mises_fisher_of_scipy(n, kappa):
    mu, x = unit(n), M.Sphere(n).random_uniform((50,), dtype=torch.float64)
    x = torch.cat([x, mu[None], -mu[None]])
    d = M.VonMisesFisher(mu, torch.tensor(kappa).double())
    expected = stats.vonmises_fisher(mu.numpy(), kappa).logpdf(x.numpy())
    np.testing.assert_allclose(d.log_prob(x).numpy(), expected, rtol=1e-10, atol=1e-10)
    draws = d.sample((20_000,))
    heights, theirs = draws @ mu, torch.from_numpy(stats.vonmises_fisher(mu.numpy(), kappa).rvs(20_000, random_state=1)) @ mu
    assert stats.ks_2samp(heights.numpy(), theirs.numpy()).pvalue > 1e-4
    single = M.VonMisesFisher(mu.float(), torch.tensor(kappa)).log_prob(draws[:100].float())
    close(single.double(), d.log_prob(draws[:100].float().double()), 1e-3)
    assert M.VonMisesFisher(mu, torch.zeros(()).double()).log_prob(x).sub(-M.Sphere(n).log_volume).abs().max() < 1e-12


@pytest.mark.parametrize("order", (0.0, 0.5, 1.0, 2.5, 17.0, 40.0))
def test_log_bessel(order):
    from scipy.special import gammaln, ive

    x = torch.tensor([1e-3, 0.1, 1.0, 5.0, 20.0, 1e2, 1e3, 1e4, 1e5], dtype=torch.float64, requires_grad=True)
    value = log_bessel(order, x)
    with np.errstate(divide="ignore"):
        expected = np.log(ive(order, x.detach().numpy())) + gammaln(order + 1) - order * np.log(x.detach().numpy() / 2)
    np.testing.assert_allclose(value.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    slope = torch.autograd.grad(value.sum(), x)[0]
    np.testing.assert_allclose(slope.numpy(), ive(order + 1, x.detach().numpy()) / ive(order, x.detach().numpy()) + 0 - 1, atol=1e-11)
    zero = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    assert log_bessel(order, zero).item() == pytest.approx(0, abs=1e-12)
    assert torch.autograd.grad(log_bessel(order, zero).sum(), zero)[0].item() == pytest.approx(-1, abs=1e-12)


def test_angular_central_gaussian_is_the_linear_map_of_the_uniform():
    for n in (2, 3, 4, 8):
        case = next((c for c in MANIFOLD_ZOO if c.id == f"sphere-linear-{n}"), None) or ManifoldInstance(
            "", lambda n=n: M.NormalizedLinear(n), n, manifold=M.Sphere(n)
        )
        transform, x = perturbed(case), M.Sphere(n).random_uniform((20,), dtype=torch.float64)
        flow = pf.Flow(M.Uniform(M.Sphere(n)), transform).double()
        matrix = transform.matrix()
        close(flow().log_prob(x), M.AngularCentralGaussian(torch.linalg.cholesky(matrix @ matrix.mT)).log_prob(x))
        close(transform(-x), -transform(x))


def test_affine_uniform_is_the_affine_map_of_the_uniform():
    case = next(c for c in MANIFOLD_ZOO if c.id == "sphere-affine-3")
    transform, x = perturbed(case), case.points(20)
    v = transform.shift()
    matrix, shift = transform.matrix(), transform.matrix() @ (v / (1 + v @ v).sqrt())
    close(pf.Flow(M.Uniform(M.Sphere(3)), transform).double()().log_prob(x), M.AffineUniform(matrix, shift).log_prob(x))


@pytest.mark.parametrize("n", (2, 3, 5))
def test_mobius_of_the_uniform_is_the_spherical_cauchy(n):
    case = ManifoldInstance("", lambda: M.SphereMobius(n), n, manifold=M.Sphere(n))
    transform, x = perturbed(case), case.points(20)
    v = transform.params().detach()
    w = -v / (1 + v @ v).sqrt()
    rho, mu = w.norm(), w / w.norm()
    expected = -M.Sphere(n).log_volume + (n - 1) * ((1 - rho**2) / (1 + rho**2 - 2 * rho * (x @ mu))).log()
    close(pf.Flow(M.Uniform(M.Sphere(n)), transform).double()().log_prob(x), expected)


def test_compositions_of_scipy_and_torch():
    p = M.Simplex(3).random_uniform((20,), dtype=torch.float64)
    dirichlet = dist.Dirichlet(_alpha)
    np.testing.assert_allclose(dirichlet.log_prob(p[0]).item(), stats.dirichlet(_alpha.numpy()).logpdf(p[0].numpy()), rtol=1e-9)
    close(M.SimplicialGeneralizedBeta(_alpha).log_prob(p), dirichlet.log_prob(p))
    rest = torch.stack([_alpha[1:].sum(), _alpha[2]])
    close(M.GeneralizedDirichlet(_alpha[:2], rest).log_prob(p), dirichlet.log_prob(p))
    concrete = dist.RelaxedOneHotCategorical(torch.tensor(0.7, dtype=torch.float64), logits=torch.tensor([0.3, -1.0, 0.5]).double())
    close(M.SimplicialGeneralizedBeta(torch.ones(3).double(), -0.7, concrete.logits / 0.7).log_prob(p), concrete.log_prob(p), 1e-9)


@pytest.mark.parametrize("temperature", (0.5, 1.7, -0.8))
def test_generalized_beta_is_a_calibrated_dirichlet(temperature):
    layer, p = M.Calibration(3, temperature=temperature).double(), M.Simplex(3).random_uniform((20,), dtype=torch.float64)
    with torch.no_grad():
        layer.params.bias[1:] = torch.tensor([0.3, -0.6])
    flow = pf.FlowDistribution(dist.Dirichlet(_alpha), [layer])
    expected = M.SimplicialGeneralizedBeta(_alpha, layer.temperature(), layer.shift())
    close(flow.log_prob(p), expected.log_prob(p))
    close(layer(p), torch.softmax(p.log() / layer.temperature() + layer.shift(), -1))
    assert layer.temperature().item() == pytest.approx(temperature, rel=1e-6) and f"temperature={temperature}" in repr(layer)
    assert "shape=(3,)" in repr(layer) and ("temperature<0" if temperature < 0 else "temperature>0") in repr(M.Calibration(3, 2, temperature))


def test_logistic_normal_is_a_normal_in_a_chart():
    d, p = DISTRIBUTIONS["logistic-normal"], M.Simplex(3).random_uniform((20,), dtype=torch.float64)
    normal_ = dist.MultivariateNormal(d.loc, scale_tril=d.scale_tril)
    close(dist.TransformedDistribution(normal_, [M.ILR(3)]).log_prob(p), d.log_prob(p))


@pytest.mark.parametrize("chart", (M.ILR, M.ALR, M.StickBreaking))
def test_charts(chart):
    for n in (2, 3, 6):
        z, phi = normal(n, 20, n - 1), chart(n)
        p = phi(z)
        close(phi.inv(p), z)
        jacobian = torch.vmap(torch.func.jacrev(lambda z, phi=phi: phi(z)[:-1]))(z)
        close(phi.log_abs_det_jacobian(z, p), torch.linalg.slogdet(jacobian)[1])
        assert phi == chart(n) and phi != chart(n + 1) and phi.forward_shape(z.shape) == p.shape and phi.inverse_shape(p.shape) == z.shape
    stock = torch.distributions.StickBreakingTransform()
    z = normal(1, 9, 4)
    close(M.StickBreaking(5)(z), stock(z))
    close(M.StickBreaking(5).log_abs_det_jacobian(z, stock(z)), stock.log_abs_det_jacobian(z, stock(z)))


def test_generalized_calibrations_are_a_group():
    cases = [ManifoldInstance("", lambda: M.GeneralizedCalibration(4), 4, manifold=M.Simplex(4))] * 2
    f, g = (perturbed(c, seed=s) for s, c in enumerate(cases))
    p = M.Simplex(4).random_uniform((20,), dtype=torch.float64)
    close(g.compose(f)(p), g(f(p)))
    close(f.inverse()(f(p)), p)
    close(f.inverse().compose(f).matrix(), torch.eye(3).double())
    a = M.ILR(4).inv(f(p)) - M.ILR(4).inv(p) @ f.matrix().mT
    close(a, f.shift().expand_as(a))
    with pytest.raises(OptionError, match="context"):
        M.GeneralizedCalibration(4, 2).inverse()


def test_maps_of_the_sphere_are_their_formulas():
    n, x = 3, M.Sphere(3).random_uniform((20,), dtype=torch.float64)
    t = perturbed(next(c for c in MANIFOLD_ZOO if c.id == "sphere-translation-3"))
    v = t.params()
    c = v / (1 + v @ v).sqrt()
    y, ladj = t.forward_and_ladj(x)
    close(y, M.Sphere(n).project(x + c))
    close(ladj, ((1 + x @ c) / (x + c).norm(dim=-1) ** n).log())
    t = perturbed(next(c for c in MANIFOLD_ZOO if c.id == "sphere-rotation-3"))
    q = t(torch.eye(3).double()).mT
    close(q.mT @ q, torch.eye(3).double())
    assert torch.linalg.det(q) > 0
    t = perturbed(next(c for c in MANIFOLD_ZOO if c.id == "sphere-axis-odd-3"))
    close(t(-x), -t(x))


def test_exponential_maps_stay_invertible_at_any_parameters():
    """Volumes keep their orientation, however large the parameters, whatever the signs."""
    for n in (2, 3, 5):
        case = ManifoldInstance("", lambda n=n: M.ExponentialMap(n, 4), n, param_scale=5.0, manifold=M.Sphere(n))
        for seed in range(5):
            transform, x = perturbed(case, seed=seed), M.Sphere(n).random_uniform((300,), dtype=torch.float64)
            with torch.no_grad():
                y, ladj = transform.forward_and_ladj(x)
                back, reverse = transform.inverse_and_ladj(y)
                slope = transform._slope(x, transform.params())
            assert torch.linalg.det(slope).min() > 0
            assert (back - x).norm(dim=-1).max() < 1e-7 and (reverse + ladj).abs().max() < 1e-4


def test_cylinder_densities_are_continuous_at_the_poles():
    case = ManifoldInstance("", lambda: M.CylinderAutoregressive(3, hidden_features=(8,)), 3, param_scale=1.0, manifold=M.Sphere(3))
    flow = pf.Flow(M.Uniform(M.Sphere(3)), perturbed(case)).double()
    for pole in (1.0, -1.0):
        angle = torch.linspace(0, 2 * math.pi, 50).double()
        ring = M.Sphere(3).project(torch.stack([1e-6 * angle.cos(), 1e-6 * angle.sin(), torch.full_like(angle, pole)], -1))
        log_prob = flow().log_prob(ring)
        assert log_prob.max() - log_prob.min() < 1e-4
        close(flow().log_prob(torch.tensor([0.0, 0.0, pole]).double()), log_prob[0], 1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_cylinder_gradients_are_finite_at_all_poles(dtype):
    """Also where several heights in a row are at one: what is left of the sphere is a single point of a smaller one."""
    for n in (3, 4, 6):
        case = ManifoldInstance("", lambda n=n: M.CylinderAutoregressive(n, bins=4, hidden_features=(8,)), n, param_scale=0.7, manifold=M.Sphere(n))
        layer, poles = perturbed(case, dtype=dtype), torch.eye(n, dtype=dtype)
        x = torch.cat([poles, -poles]).requires_grad_()
        for way in WAYS:
            y, ladj = getattr(layer, way)(x)
            assert M.Sphere(n).distance(y).max() < 1e-6 and ladj.isfinite().all()
            slopes = torch.autograd.grad(y.sum() + ladj.sum(), [x, *layer.parameters()])
            assert all(slope.isfinite().all() for slope in slopes)
            assert slopes[0].abs().max() < 1e3


# --- rounding


@pytest.mark.parametrize("gap", (1e-3, 1e-5, 1e-7))
@pytest.mark.parametrize("make", (M.NormalizedTranslation, M.SphereMobius, M.NormalizedAffine), ids=lambda m: m.__name__)
def test_single_precision_close_to_the_edge_of_the_ball(gap, make):
    """The log ratio, at the same single-precision points and parameters, where one minus the shift's length is down to 1e-7."""
    size = 1 / (gap * (2 - gap))  # 1 + |v|^2
    for n in (2, 3, 6):
        direction = unit(n, n)
        narrow = make(n)
        with torch.no_grad():
            (narrow.shift if make is M.NormalizedAffine else narrow.params).bias.copy_((size - 1) ** 0.5 * direction)
        wide = make(n).double()
        wide.load_state_dict({k: v.double() for k, v in narrow.state_dict().items()})
        x = M.Sphere(n).random_uniform((400,), dtype=torch.float64)
        near = M.Sphere(n).project(-direction + 1e-3 * normal(1, 200, n))
        for sign in (1, -1):
            points = torch.cat([x, sign * near, sign * direction[None], -sign * direction[None]]).float()
            for way in WAYS:
                exact = getattr(wide, way)(points.double())
                found = getattr(narrow, way)(points)
                assert (found[1].double() - exact[1]).abs().max() < 1e-5
                assert M.Sphere(n).distance(found[0]).max() < 1e-6


@pytest.mark.parametrize("n", (2, 3, 4, 8))
@pytest.mark.parametrize("make", (M.AxisFlow, M.CylinderAutoregressive), ids=lambda m: m.__name__)
def test_single_precision_close_to_the_poles(make, n):
    """Points in single precision are of unit length to 6e-8 only, which is more than what a height lacks to 1 near its pole."""
    wide = perturbed(ManifoldInstance("", lambda: make(n), n, manifold=M.Sphere(n)))
    narrow = make(n)
    narrow.load_state_dict({k: v.float() for k, v in wide.state_dict().items()})
    wide.load_state_dict({k: v.double() for k, v in narrow.state_dict().items()})
    pole = M.Sphere(n).project(wide.params.bias[-n:].detach()) if make is M.AxisFlow else torch.eye(n).double()[-1]
    for gap in (0.0, 1e-5, 1e-4, 1e-3, 1e-2):
        points = M.Sphere(n).project(torch.stack([pole, -pole])[:, None] + gap * normal(1, 100, n)).float()
        for way in WAYS:
            with torch.no_grad():
                found, exact = getattr(narrow, way)(points), getattr(wide, way)(M.Sphere(n).project(points.double()))
            assert (found[0].double() - exact[0]).abs().max() < 5e-6 and (found[1].double() - exact[1]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_corners_of_the_simplex(dtype):
    for n in (3, 5):
        small = torch.full((n,), 1e-38, dtype=dtype)
        p = torch.stack([torch.where(torch.arange(n) == i, torch.ones((), dtype=dtype), small) for i in range(n)])
        for transform in (M.Calibration(n, temperature=0.3), M.GeneralizedCalibration(n), M.SimplexFlow(T.LULinear(n - 1))):
            transform.to(dtype)
            for way in WAYS:
                value, ladj = getattr(transform, way)(p)
                assert value.isfinite().all() and (value > 0).all() and ladj.isfinite().all()
        for d in (M.SimplicialGeneralizedBeta(torch.ones(n, dtype=dtype), 0.3), M.LogisticNormal(small[1:], torch.eye(n - 1, dtype=dtype))):
            assert d.log_prob(p).isfinite().all()


def _corners(n: int) -> Tensor:
    """Compositions with one large part, and with one small part, down to 1e-37, in single precision."""
    small = torch.tensor([1e-5, 1e-10, 1e-20, 1e-30, 1e-37])[:, None, None] * torch.ones(n, n)
    eye = torch.eye(n).bool()
    p = torch.cat([torch.where(eye, 1.0, small), torch.where(eye, small, 1.0)]).flatten(0, 1)
    return p / p.sum(-1, keepdim=True)


@pytest.mark.parametrize("n", (2, 3, 5))
def test_small_parts_come_back_from_single_precision(n):
    chain = [M.SimplexFlow([T.LULinear(n - 1)], "alr"), M.GeneralizedCalibration(n, matrix=0.9 * torch.eye(n - 1)), M.Calibration(n, temperature=1.1)]
    turned = [M.Calibration(n, temperature=2.0), M.SimplexFlow([T.LULinear(n - 1)], "stick_breaking")]
    p = _corners(n)
    for transform in (*chain, *turned, T.Compose(chain), T.Compose(turned), pf.flows.simplex(n).transform):
        with torch.no_grad():
            y, ladj = transform.forward_and_ladj(p)
            back, reverse = transform.inverse_and_ladj(y)
        close(back.log(), p.log(), 1e-5)
        close(reverse, -ladj, 1e-5)


def test_small_parts_between_transforms_and_between_layers():
    """Logarithms may go anywhere inside one layer; what leaves it are parts, of at least 1e-38."""
    widen, p = T.Affine(2), _corners(3)
    with torch.no_grad():
        widen.log_scale.copy_(torch.tensor([1.0, 1.0]))
        inside = M.SimplexFlow([widen, widen.inv])(p)
        between = T.Compose([M.SimplexFlow(widen), M.SimplexFlow(widen).inv])(p)
    close(inside.log(), p.log(), 1e-5)
    assert (between.log() - p.log()).max() > 20 and (between > 0).all()


def test_small_dirichlets_are_drawn_inside():
    for d in (
        M.SimplicialGeneralizedBeta(torch.full((3,), 0.05), 0.5),
        M.GeneralizedDirichlet(torch.full((2,), 0.05), torch.full((2,), 0.05)),
        pf.FlowDistribution(dist.Dirichlet(torch.full((3,), 0.05)), [M.Calibration(3, temperature=0.5)]),
    ):
        assert d.log_prob(d.sample((5000,))).isfinite().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("temperature", (10.0, -50.0))
@pytest.mark.parametrize("alpha", (0.002, 0.01, 0.5))
def test_log_ratios_of_small_dirichlets(alpha, temperature, dtype):
    """Log-ratios of the parts are differences of logarithms of gamma variables, whose moments polygamma functions give; so are their slopes."""
    parts = torch.tensor([alpha, 2 * alpha, 1.0], dtype=dtype, requires_grad=True)
    temperature *= max(1.0, 0.05 / alpha)
    q = M.SimplicialGeneralizedBeta(parts, temperature).rsample((20_000,))
    ratio = (q[:, 0].log() - q[:, 1].log()) * temperature
    draws, first = ratio.detach().double(), torch.tensor([alpha, 2 * alpha]).double()
    mean, variance = torch.digamma(first).diff().neg(), torch.polygamma(1, first).sum()
    assert abs(draws.mean() - mean) < 4.5 * (variance / 20_000).sqrt()
    fourth = torch.polygamma(3, first).sum() + 3 * variance**2
    assert abs((draws - mean).square().mean() - variance) < 4.5 * ((fourth - variance**2) / 20_000).sqrt()
    slope = torch.autograd.grad(ratio.mean(), parts)[0].double()
    assert (slope[:2] / torch.polygamma(1, first) - torch.tensor([1.0, -1.0])).abs().max() < 0.1 and slope[2].abs() < 1e-3 * slope[0]


def test_sticks_of_small_betas():
    """Where both gamma variables of a stick underflow, it is not broken in the middle."""
    small = torch.full((2,), 0.002)
    first = M.GeneralizedDirichlet(small, small).sample((20_000,))[:, 0].double()
    expected = stats.beta(0.002, 0.002).cdf(0.75) - stats.beta(0.002, 0.002).cdf(0.25)
    assert abs(((first > 0.25) & (first < 0.75)).double().mean() - expected) < 4.5 * (expected / 20_000) ** 0.5


@pytest.mark.parametrize("kappa", (math.inf, math.nan, 1e300))
def test_rejection_ends_at_concentrations_that_are_not_checked(kappa):
    one = torch.tensor([1.0, kappa]).double()
    for d in (M.VonMisesFisher(unit(4), one, validate_args=False), M.Kent(_frame, one, 0.1, validate_args=False)):
        assert d.sample((100,))[:, 0].isfinite().all()


def test_strong_concentrations():
    mu = unit(3).float()
    for d in (M.VonMisesFisher(mu, 1e4), M.PowerSpherical(mu, 1e4), M.Kent(_frame.float(), 1e4, 4e3)):
        x = d.sample((1000,))
        assert d.log_prob(x).isfinite().all() and d.log_prob(-mu if not isinstance(d, M.PowerSpherical) else x[0]).isfinite().all()
    kappa = torch.tensor([0.0, 1e-8, 1.0, 1e4], requires_grad=True)
    d = M.VonMisesFisher(mu, kappa)
    d.rsample((10,)).sum().backward()
    assert kappa.grad.isfinite().all()


# --- maps of one coordinate


@pytest.mark.parametrize("f", [*CIRCLE.values(), *INTERVAL.values()], ids=[*CIRCLE, *INTERVAL])
def test_univariate_maps(f):
    x = torch.linspace(-math.pi, math.pi, 202)[1:-1].double() if f not in INTERVAL.values() else torch.linspace(-1, 1, 201).double()
    zero = torch.zeros(len(x), f.num_params).double()
    close(f.forward(x, zero)[0], x)
    for scale in (0.5, 2.0):
        params = scale * normal(2, f.num_params).expand(len(x), -1)
        y, log_slope = f.forward(x, params)
        back, reverse = f.inverse(y, params)
        turn = torch.remainder(back - x + 1, 2 * math.pi) - 1 if f not in INTERVAL.values() else back - x
        assert turn.abs().max() < 1e-9
        close(reverse, -log_slope, 1e-7)
        jac = torch.autograd.functional.jacobian(lambda x, p=params: f.forward(x, p)[0], x).diagonal()
        close(jac.log(), log_slope, 1e-8)
    if f in INTERVAL.values():
        assert y[0] == -1 and abs(y[-1] - 1) < 1e-12 and (y.diff() > 0).all()
        assert (f.forward(x[[0, -1]], params[:2])[1].abs() > 1e-3).all()  # slopes at the ends are free


@pytest.mark.parametrize("tail", (-60.0, -24.0, -10.0, 10.0, 60.0))
def test_gathering_in_single_precision(tail):
    """Tails heavier than e^8 would leave no digits of the slope in the middle."""
    f, x = pf.univariate.CircularGather(), torch.linspace(-math.pi, math.pi, 501)[1:-1]
    for scale in (-8.0, 0.0):
        params = torch.tensor([scale, tail, 0.5]).expand(len(x), 3)
        (y, log_slope), (y_exact, exact) = f.forward(x, params), f.forward(x.double(), params.double())
        assert (log_slope - exact).abs().max() < 1e-3 and (y - y_exact).abs().max() < 1e-3
        back = f.inverse(y_exact.float(), params)[0]
        assert (torch.remainder(back - x + 1, 2 * math.pi) - 1).abs().max() < 2e-3


def test_mobius_mixtures_come_apart():
    """Components that are equal at the start must not stay equal."""
    flow = pf.flows.torus(1, transforms=1, univariate=pf.univariate.MobiusMixture(3))
    optimizer = torch.optim.Adam(flow.parameters(), 0.05)
    target = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.VonMises(torch.tensor([-2.0, 1.0]), torch.tensor([8.0, 8.0])))
    x = torch.linspace(-math.pi, math.pi, 401)[:-1, None]
    p = target.log_prob(x[:, 0]).exp() * (2 * math.pi / 400)
    for _ in range(300):
        optimizer.zero_grad()
        loss = -(p * flow().log_prob(x)).sum()
        loss.backward()
        optimizer.step()
    entropy = -(p * target.log_prob(x[:, 0])).sum()
    assert loss - entropy < 0.1


# --- what bad input gets


def test_points_off_the_manifold():
    t = M.NormalizedTranslation(3)
    x = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.5]])
    for ask in (t, t.inv, lambda x: M.UniformSphere(3).log_prob(x), lambda x: pf.flows.sphere(3)().log_prob(x)):
        with pytest.raises(SupportError, match=r"1 of 2 points.*index \(1,\), is 0.5 away.*project"):
            ask(x)
    with pytest.raises(SupportError, match="NormalizedTranslation"):
        t(torch.full((3,), torch.nan))
    t(M.Sphere(3).project(x).double().float())
    rounded = M.Sphere(3).random_uniform((100,)).double()  # normalised in single precision
    assert M.VonMisesFisher(unit(3), 2.0).log_prob(rounded).isfinite().all()
    with pytest.raises(SupportError, match="loc"):
        M.VonMisesFisher(torch.ones(3), 2.0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_vectors_of_any_length_have_a_direction(dtype):
    x, sphere = unit(3).to(dtype), M.Sphere(3)
    for power in (-0.9, -0.5, 0.5, 0.9):
        close(sphere.project(x * torch.finfo(dtype).max ** power), x, 1e-6)
    long = (3 * x).requires_grad_()
    close(torch.autograd.grad(sphere.project(long)[0], long)[0], (sphere.tangent_basis(x) @ sphere.tangent_basis(x).mT)[0] / 3, 1e-6)
    with pytest.raises(SupportError, match="1 of 2 vectors are zero"):
        sphere.project(torch.stack([x, torch.zeros_like(x)]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_supports_allow_for_rounding_as_checks_do(dtype):
    """Points made in single precision belong to a support, a copy of it too, in either precision; points off by more do not."""
    vectors, shares, turns = M.Sphere(500).random_uniform((20,)), M.Simplex(500).random_uniform((20,)), torch.full((20, 2), math.pi)
    for manifold, points in ((M.Sphere(500), vectors), (M.Simplex(500), shares), (M.Torus(2), turns)):
        for x, inside in ((points.to(dtype), True), (1.001 * points.to(dtype), False)):
            assert manifold.contains(x).all() == inside
            for support in (manifold.support, copy.deepcopy(manifold.support), *(constraints.independent(manifold.support, k) for k in (0, 1))):
                assert M.contains(support, x).all() == inside


def test_zeros_on_the_simplex():
    for ask in (M.Calibration(3), lambda p: M.SimplicialGeneralizedBeta(torch.ones(3)).log_prob(p), lambda p: pf.flows.simplex(3)().log_prob(p)):
        with pytest.raises(SupportError, match=r"is \(0, 0.4, 0.6\): .*exactly zero.*clamp_min"):
            ask(torch.tensor([0.0, 0.4, 0.6]))
        with pytest.raises(SupportError, match="sum to one"):
            ask(torch.tensor([0.1, 0.4, 0.6]))


def test_angles_out_of_range():
    x = torch.tensor([[0.1, 4.0]])
    for ask in (M.TorusCoupling(CIRCLE["circular"], 2), lambda x: M.UniformTorus(2).log_prob(x), lambda x: pf.flows.torus(2)().log_prob(x)):
        with pytest.raises(SupportError, match="wraps them"):
            ask(x)
        ask(M.Torus(2).project(x))


def test_singular_matrices_and_long_shifts():
    flat = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    with pytest.raises(OptionError, match="singular"):
        M.AffineUniform(flat, torch.zeros(2))
    with pytest.raises(OptionError, match="singular"):
        M.AngularCentralGaussian(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
    with pytest.raises(OptionError, match="singular"):
        M.GeneralizedCalibration(3, matrix=flat)
    for size in (1.0, 1.5):
        with pytest.raises(SupportError, match=r"less than 1, got"):
            M.AffineUniform(torch.eye(3), torch.tensor([0.0, size, 0.0]))


BROKEN = {
    "sphere-small": (lambda: M.Sphere(1), ShapeError),
    "simplex-float": (lambda: M.Simplex(3.0), ShapeError),
    "torus-zero": (lambda: M.Torus(0), ShapeError),
    "product-empty": (lambda: M.Product(), OptionError),
    "product-other": (lambda: M.Product(M.Sphere(2), 3), OptionError),
    "temperature-zero": (lambda: M.Calibration(3, temperature=0.0), OptionError),
    "temperature-zero-sgb": (lambda: M.SimplicialGeneralizedBeta(torch.ones(3), 0.0), OptionError),
    "chart": (lambda: M.SimplexFlow(T.Affine(2), "clr"), OptionError),
    "chart-inner": (lambda: M.SimplexFlow(M.Rotation(3)), OptionError),
    "matrix-shape": (lambda: M.GeneralizedCalibration(3, matrix=torch.eye(3)), ShapeError),
    "map-of-the-line": (lambda: M.TorusCoupling(pf.univariate.Affine(), 2), OptionError),
    "direction": (lambda: M.CylinderAutoregressive(3, direction="both"), OptionError),
    "torus-direction": (lambda: M.TorusAutoregressive(CIRCLE["shift"], 2, "both"), OptionError),
    "torus-order": (lambda: M.TorusAutoregressive(CIRCLE["shift"], 2, order=torch.tensor([0, 0])), ShapeError),
    "components": (lambda: M.ExponentialMap(3, 0), OptionError),
    "mobius-components": (lambda: pf.univariate.MobiusMixture(0), OptionError),
    "negative-concentration": (lambda: M.VonMisesFisher(torch.tensor([0.0, 1.0]), -1.0), OptionError),
    **{
        f"concentration-{k}-{make.__name__}": (lambda make=make, k=k: make(torch.tensor([0.0, 1.0]), k), OptionError)
        for k in (math.inf, math.nan)
        for make in (M.VonMisesFisher, M.PowerSpherical)
    },
    "kent-infinite": (lambda: M.Kent(torch.eye(3), math.inf, 0.1), OptionError),
    "kent-nan": (lambda: M.Kent(torch.eye(3), math.nan, 0.1), OptionError),
    "negative-alpha": (lambda: M.SimplicialGeneralizedBeta(torch.tensor([1.0, -1.0])), OptionError),
    "alpha-and-shift": (lambda: M.SimplicialGeneralizedBeta(torch.ones(3), 1.0, torch.ones(2)), ShapeError),
    "no-broadcast": (lambda: M.VonMisesFisher(torch.eye(3), torch.ones(2)), ShapeError),
    "kent-oval": (lambda: M.Kent(torch.eye(3), 1.0, 0.6), OptionError),
    "kent-frame": (lambda: M.Kent(torch.ones(3, 3), 1.0, 0.1), OptionError),
    "kent-size": (lambda: M.Kent(torch.eye(4), 1.0, 0.1), ShapeError),
    "acg-upper": (lambda: M.AngularCentralGaussian(torch.ones(2, 2)), OptionError),
    "acg-nan": (lambda: M.AngularCentralGaussian(torch.tensor([[1.0, 0.0], [math.nan, 1.0]])), OptionError),
    "affine-nan": (lambda: M.AffineUniform(math.nan * torch.eye(2), torch.zeros(2)), OptionError),
    "affine-sizes": (lambda: M.AffineUniform(torch.eye(2), torch.zeros(3)), ShapeError),
    "logistic-upper": (lambda: M.LogisticNormal(torch.zeros(2), torch.ones(2, 2)), OptionError),
    "logistic-nan": (lambda: M.LogisticNormal(torch.tensor([0.0, math.nan]), torch.eye(2)), OptionError),
    "logistic-scalar": (lambda: M.LogisticNormal(torch.tensor(0.0), torch.eye(2)), ShapeError),
    "sgb-infinite": (lambda: M.SimplicialGeneralizedBeta(torch.tensor([1.0, math.inf])), OptionError),
    "sgb-number": (lambda: M.SimplicialGeneralizedBeta(1.0), ShapeError),
    "sgb-nan-shift": (lambda: M.SimplicialGeneralizedBeta(torch.ones(2), 1.0, torch.tensor([0.0, math.nan])), OptionError),
    "temperature-list": (lambda: M.Calibration(3, temperature=[1.0]), OptionError),
    "temperature-tensor": (lambda: M.Calibration(3, temperature=torch.ones(3)), OptionError),
    "calibration-nan": (lambda: M.GeneralizedCalibration(3, matrix=math.nan * torch.eye(2)), OptionError),
    "calibration-nan-shift": (lambda: M.GeneralizedCalibration(3, shift=torch.tensor([0.0, math.nan])), OptionError),
    "calibration-integers": (lambda: M.GeneralizedCalibration(3, matrix=torch.eye(2, dtype=torch.int64)), DtypeError),
    "calibration-list": (lambda: M.GeneralizedCalibration(3, shift=[0.0, 0.0]), DtypeError),
    "chart-list": (lambda: M.SimplexFlow(T.Affine(2), ["ilr"]), OptionError),
    "axis-size": (lambda: M.AxisFlow("3"), ShapeError),
    "dirichlet-tensor": (lambda: M.Dirichlet(3, torch.ones(3)), OptionError),
    **{
        f"list-{make.__name__}": (lambda make=make, given=given: make(*given), DtypeError)
        for make, given in (
            (M.VonMisesFisher, ([0.0, 1.0], 1.0)),
            (M.PowerSpherical, (torch.tensor([0.0, 1.0]), "1")),
            (M.AngularCentralGaussian, ([[1.0, 0.0], [0.0, 1.0]],)),
            (M.AffineUniform, (torch.eye(2), [0.0, 0.0])),
            (M.Kent, (torch.eye(3).tolist(), 1.0, 0.1)),
            (M.SimplicialGeneralizedBeta, ([1.0, 1.0],)),
            (M.LogisticNormal, ([0.0, 0.0], torch.eye(2))),
            (M.GeneralizedDirichlet, (torch.ones(2), [1.0, 1.0])),
        )
    },
    "logistic-diagonal": (lambda: M.LogisticNormal(torch.zeros(2), -torch.eye(2)), OptionError),
    "uniform": (lambda: M.Uniform(M.Product(M.Sphere(2))), OptionError),
    "mixed-supports": (lambda: T.Compose([M.Rotation(3), M.Calibration(3)]), SupportError),
    "mixed-with-euclidean": (lambda: T.Compose([M.Rotation(3), T.Affine(3)]), SupportError),
    "mixed-base": (lambda: pf.Flow(3, M.Rotation(3)), SupportError),
    "mixed-base-2": (lambda: pf.Flow(M.Uniform(M.Simplex(3)), M.Rotation(3)), SupportError),
    "mixed-base-distribution": (lambda: pf.FlowDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [M.Rotation(3)]), SupportError),
    "mixed-base-distribution-2": (lambda: pf.FlowDistribution(dist.Dirichlet(torch.ones(3)), [M.Rotation(3).inv]), SupportError),
    "mixed-base-distribution-3": (lambda: pf.FlowDistribution(dist.Normal(torch.zeros(3), 1.0).to_event(1), [M.Calibration(3)]), SupportError),
    "mixed-base-distribution-4": (lambda: pf.FlowDistribution(M.UniformSphere(3), [T.Affine(3)]), SupportError),
    "mixed-base-distribution-5": (lambda: pf.FlowDistribution(M.UniformSphere(3), [M.Rotation(3), T.Affine(3)]), SupportError),
    "points-size": (lambda: M.UniformSphere(3).log_prob(torch.ones(4)), ShapeError),
    "points-batch": (lambda: M.UniformSphere(3).expand((2,)).log_prob(M.Sphere(3).random_uniform((3,))), ShapeError),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_options_are_refused(what):
    make, error = BROKEN[what]
    with pytest.raises(error):
        make()


def test_whole_numbers_are_parameters_too():
    assert M.AngularCentralGaussian(torch.eye(2, dtype=torch.int64)).sample().dtype == torch.get_default_dtype()
    assert M.Calibration(3, temperature=2).temperature().item() == pytest.approx(2)


def test_gradients_at_the_identity_are_those_nearby():
    """Formulas with two branches meet where layers start, at a shift of zero."""
    x = M.Sphere(3).random_uniform((5,), dtype=torch.float64)
    for make in (M.NormalizedTranslation, M.NormalizedAffine, M.SphereMobius):
        for way in WAYS:
            layer = make(3).double()
            bias = (layer.shift if make is M.NormalizedAffine else layer.params).bias
            at = torch.autograd.grad(getattr(layer, way)(x)[1].sum(), bias)[0]
            with torch.no_grad():
                bias.add_(1e-7)
            close(at, torch.autograd.grad(getattr(layer, way)(x)[1].sum(), bias)[0], 1e-5)
            assert at.abs().max() > 0.1
    matrix, shift = torch.eye(3).double(), torch.zeros(3, dtype=torch.float64, requires_grad=True)
    slope = torch.autograd.grad(M.AffineUniform(matrix, shift).log_prob(x).sum(), shift)[0]
    close(slope, 2 * x.sum(0), 1e-9)


def test_gradients_at_the_equator_are_those_nearby():
    """The two halves of an odd map of heights meet there."""
    layer = perturbed(next(c for c in MANIFOLD_ZOO if c.id == "sphere-axis-odd-3"))
    axis = M.Sphere(3).project(layer.params.bias[-3:].detach())
    for way in WAYS:
        slopes = []
        for height in (-1e-6, 0.0, 1e-6):
            t = torch.tensor(height, dtype=torch.float64, requires_grad=True)
            x = t * axis + (1 - t * t).sqrt() * M.Sphere(3).tangent_basis(axis)[:, 0]
            slopes.append(torch.autograd.grad(getattr(layer, way)(x)[0] @ axis, t)[0])
        assert slopes[1] > 0.1
        close(slopes[1], (slopes[0] + slopes[2]) / 2, 1e-4)
