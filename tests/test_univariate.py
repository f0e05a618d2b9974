"""Univariate maps: what holds for all of them, and what the spline and the affine map promise by themselves."""

from __future__ import annotations

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, interpolate, special, stats
from scipy.optimize import brentq
from torch import Tensor, nn
from zoo import BY_ROOT, CIRCLE, UNIVARIATES

from pyro_flows import univariate as U
from pyro_flows.errors import OptionError
from pyro_flows.univariate import Affine, RationalQuadraticSpline, Univariate, soft_clamp

each_map = pytest.mark.parametrize("f", UNIVARIATES.values(), ids=UNIVARIATES.keys())
each_way = pytest.mark.parametrize("way", ("forward", "inverse"))
SCALES = (0.3, 1.0, 3.0, 10.0, 30.0)


def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (scale * torch.randn(shape, dtype=torch.float64)).to(dtype)


def slope(f: Univariate, way: str, x: Tensor, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``(y, dy/dx by autograd, log slope as the map says)``."""
    x = x.detach().requires_grad_()
    y, log_slope = getattr(f, way)(x, params)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0], log_slope.detach()


# --- every map


@each_map
def test_contract(f):
    assert isinstance(f, Univariate) and f.num_params >= 1
    assert dataclasses.is_dataclass(f) and hash(f) == hash(dataclasses.replace(f)) and f == pickle.loads(pickle.dumps(f))
    assert repr(f).startswith(type(f).__name__)
    for shape in ((), (4,), (3, 4), (0,)):
        for out in (*f.forward(normal(*shape), normal(*shape, f.num_params)), *f.inverse(normal(*shape), normal(f.num_params).expand(*shape, -1))):
            assert out.shape == shape


@each_way
@each_map
def test_zero_parameters_are_the_identity(f, way):
    x = torch.cat([torch.linspace(-8, 8, 1001), torch.tensor([-1e6, -1e3, 1e3, 1e6])]).double()
    y, log_slope = getattr(f, way)(x, torch.zeros(len(x), f.num_params, dtype=torch.float64))
    torch.testing.assert_close(y, x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


@each_way
@each_map
def test_log_slope_is_the_derivative_and_positive(f, way):
    for scale in (0.3, 1.0, 3.0):
        x, params = normal(300, 100, scale=2.5), normal(300, 1, f.num_params, scale=scale).expand(-1, 100, -1)
        _, derivative, log_slope = slope(f, way, x, params)
        assert (derivative > 0).all()
        torch.testing.assert_close(derivative.log(), log_slope, rtol=1e-9, atol=1e-9)


@each_map
def test_inverse_is_the_root(f):
    """Against scipy's root finder, which knows the forward map alone."""
    for params, y in zip(normal(20, f.num_params, scale=1.5), normal(20, scale=2.0), strict=True):
        root = brentq(lambda x, p=params, y=y: (f.forward(y.new_tensor(x), p)[0] - y).item(), -1e3, 1e3, xtol=1e-13)
        assert f.inverse(y, params)[0].item() == pytest.approx(root, abs=1e-9)


@settings(max_examples=100)
@given(data=st.data())
@each_map
def test_round_trip_of_anything(f, data):
    params = torch.from_numpy(data.draw(hnp.arrays(np.float64, f.num_params, elements=st.floats(-20, 20))))
    x = torch.tensor(data.draw(st.floats(-1e3, 1e3)), dtype=torch.float64)
    y, log_slope = f.forward(x, params)
    back, reverse = f.inverse(y, params)
    tol = 1e-11 * (1 + x.abs().item() + params.abs().max().item()) * max(1.0, math.exp(-log_slope.item()))
    assert abs((back - x).item()) < tol
    above = f.forward(x + 1e-3, params)[0]
    assert above > y, "not increasing"
    if abs(x.item()) > 1e-6 and log_slope > -5:  # next to a knot the two may fall into different bins
        assert abs((log_slope + reverse).item()) < 1e-4


# --- the maps that are inverted by a root

each_root = pytest.mark.parametrize("f", BY_ROOT.values(), ids=BY_ROOT.keys())


@each_root
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_inverse_of_far_away(f, dtype):
    """Others return the end of a fixed bracket, silently: ``inv(f(25)) = 10``."""
    x = torch.tensor([25.0, 1e2, 1e3, 1e4, 1e6], dtype=dtype)
    x = torch.cat([x, -x])
    for params in normal(10, f.num_params, scale=1.0, dtype=dtype):
        y, log_slope = f.forward(x, params.expand(len(x), -1))
        back, reverse = f.inverse(y, params.expand(len(x), -1))
        tol = 1e-4 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(back, x, rtol=tol, atol=tol)
        torch.testing.assert_close(reverse, -log_slope, rtol=0, atol=100 * tol)


@each_root
def test_parts_differ_from_the_start(f):
    """Equal parts would get equal gradients at the identity and stay equal: no two columns of the Jacobian may be proportional."""
    x, params = torch.linspace(-2.5, 2.5, 200, dtype=torch.float64), torch.zeros(f.num_params, dtype=torch.float64)
    jacobian = torch.func.jacrev(lambda p: f.forward(x, p.expand(200, -1))[0])(params)
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) >= 4


def test_mixture_follows_the_published_formula():
    """With a correction of no weight and no affine map: Flow++, equation 8, in scipy's words."""
    f, x = U.MixtureCDF(3, min_slope=1e-12), torch.linspace(-6, 6, 50, dtype=torch.float64)
    params = normal(f.num_params)
    params[0], params[1], params[2] = 0.0, 0.0, -50.0
    weights, locs, scales = params[3:6].softmax(0), params[6:9] + torch.linspace(-2, 2, 3).double(), (3 * (params[9:] / 3).tanh()).exp()
    cdf = sum(w * stats.logistic.cdf(x.numpy(), m, s) for w, m, s in zip(weights.tolist(), locs.tolist(), scales.tolist(), strict=True))
    np.testing.assert_allclose(f.forward(x, params.expand(50, -1))[0], special.logit(cdf), rtol=1e-9, atol=1e-9)


def test_gaussianization_makes_a_mixture_normal():
    f, x = U.Gaussianization(3, min_slope=1e-12), torch.linspace(-5, 5, 50, dtype=torch.float64)
    params = normal(f.num_params)
    params[0] = -50.0
    weights, locs, scales = params[1:4].softmax(0), params[4:7] + torch.linspace(-2, 2, 3).double(), (3 * (params[7:] / 3).tanh()).exp()
    parts = [(w, stats.norm(m, s)) for w, m, s in zip(weights.tolist(), locs.tolist(), scales.tolist(), strict=True)]
    cdf, density = (sum(w * getattr(d, what)(x.numpy()) for w, d in parts) for what in ("cdf", "pdf"))
    y, log_slope = f.forward(x, params.expand(50, -1))
    np.testing.assert_allclose(stats.norm.cdf(y), cdf, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(stats.norm.logpdf(y) + log_slope.numpy(), np.log(density), rtol=1e-7, atol=1e-7)


def test_unconstrained_integrates_its_slope():
    f = U.UnconstrainedMonotone(hidden=4)
    for params, x in zip(normal(5, f.num_params, scale=3.0), (-7.0, -3.0, 0.5, 3.9, 20.0), strict=True):
        slope_at = lambda t, p=params: f.forward(p.new_tensor(t), p)[1].exp().item()  # noqa: E731
        area = integrate.quad(slope_at, 0, x, points=[math.copysign(min(abs(x), f.bound), x)], limit=200, epsrel=1e-11)[0]
        assert (f.forward(params.new_tensor(x), params)[0] - params[0]).item() == pytest.approx(area, rel=1e-8)


def test_bernstein_is_its_formula():
    f, params = U.BernsteinPolynomial(6, 3.0), normal(7)
    increments = (4 * (params[1:] / 4).tanh()).exp()
    coefficients = torch.cat([torch.zeros(1).double(), increments.cumsum(0)]) - increments.sum() / 2 + params[0]
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)
    exact = interpolate.BPoly((coefficients - params[0])[:, None].numpy() + params[0].item(), [-3, 3])(x.numpy())
    np.testing.assert_allclose(f.forward(x, params.expand(20, -1))[0] - params[0], exact - params[0].item(), rtol=1e-10, atol=1e-10)


def test_sum_of_squares_is_its_formula():
    f, params = U.SumOfSquares(3, 2.0), normal(9)
    start = np.array([math.sqrt((1 - f.min_slope) / 2), 0, 0, 0])
    p, q = (np.polynomial.Polynomial(start + c) for c in (params[1:5].numpy(), params[5:].numpy() / 2))
    area = (p * p + q * q).integ()
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)
    exact = f.min_slope * x.numpy() + 2 * (area(x.numpy() / 2) - area(0)) + params[0].item()
    np.testing.assert_allclose(f.forward(x, params.expand(20, -1))[0], exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: U.MixtureCDF(1), "components"),
        (lambda: U.Gaussianization(1), "components"),
        (lambda: U.DeepSigmoid(1), "units"),
        (lambda: U.DeepSigmoid(layers=0), "layers"),
        (lambda: U.MixtureCDF(min_slope=0.0), "min_slope"),
        (lambda: U.UnconstrainedMonotone(0), "hidden"),
        (lambda: U.UnconstrainedMonotone(bound=0.0), "bound"),
        (lambda: U.BernsteinPolynomial(0), "degree"),
        (lambda: U.BernsteinPolynomial(bound=-1.0), "bound"),
        (lambda: U.SumOfSquares(degree=0), "degree"),
        (lambda: U.SumOfSquares(min_slope=1.0), "min_slope"),
    ],
)
def test_maps_refuse(make, says):
    with pytest.raises(OptionError, match=says):
        make()


# --- the circle


@pytest.mark.parametrize("f", CIRCLE.values(), ids=CIRCLE.keys())
class TestCircle:
    """A bijection of the circle, smooth across the seam."""

    def test_round_trips(self, f):
        x, params = math.pi * (2 * torch.rand(200, 50).double() - 1), normal(200, 1, f.num_params, scale=3.0).expand(-1, 50, -1)
        for there, back in (("forward", "inverse"), ("inverse", "forward")):
            y, derivative, log_slope = slope(f, there, x, params)
            again, reverse = getattr(f, back)(y, params)
            assert (y >= -math.pi).all() and (y < math.pi).all()
            torch.testing.assert_close((again - x).cos(), torch.ones_like(x), rtol=0, atol=1e-14)
            torch.testing.assert_close(derivative.log(), log_slope, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(reverse, -log_slope, rtol=1e-6, atol=1e-6)
            if there == "forward":
                assert derivative.min() >= getattr(f, "min_slope", 0.0) * (1 - 1e-6)

    def test_it_goes_round_once(self, f):
        """The slope integrates to one turn, and the seam is a point like any other."""
        x, params = torch.linspace(-math.pi, math.pi, 20_001, dtype=torch.float64)[:-1], normal(20, 1, f.num_params).expand(-1, 20_000, -1)
        _, log_slope = f.forward(x.expand(20, -1), params)
        torch.testing.assert_close(log_slope.exp().mean(-1), torch.ones(20).double(), rtol=1e-4, atol=0)
        ends = torch.tensor([-math.pi, -math.pi + 1e-9, math.pi - 1e-9], dtype=torch.float64).expand(20, -1)
        y, at_seam = f.forward(ends, params[:, :3])
        torch.testing.assert_close(at_seam, at_seam[:, :1].expand(-1, 3), rtol=0, atol=1e-5)
        torch.testing.assert_close((y - y[:, :1]).cos(), torch.ones(20, 3).double(), rtol=0, atol=1e-9)
        assert f.num_params == 1 or (at_seam[:, 0].abs() > 1e-2).any()  # free, not one, unless it only turns

    def test_identity_phase_and_turns(self, f):
        x, params = math.pi * (2 * torch.rand(100).double() - 1), torch.zeros(100, f.num_params).double()
        torch.testing.assert_close(f.forward(x, params)[0], x)
        params[:, -1] = 1.0
        torch.testing.assert_close((f.forward(x, params)[0] - x - 1).cos(), torch.ones(100).double())
        params = normal(f.num_params).expand(100, -1)
        for got, expected in zip(f.forward(x + 4 * math.pi, params), f.forward(x, params), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        assert f == pickle.loads(pickle.dumps(f)) and hash(f) == hash(dataclasses.replace(f))


# --- the affine map


@pytest.mark.parametrize("bound", (0.5, 2.0, 7.0))
def test_affine_scale_is_clamped(bound):
    f, raw = Affine(bound), torch.tensor([-1e30, -50.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 50.0, 1e30], dtype=torch.float64)
    params = torch.stack([raw, torch.full_like(raw, 3.0)], -1)
    y, log_slope = f.forward(torch.ones_like(raw), params)
    assert log_slope.abs().max() <= bound and log_slope[0] == -bound and log_slope[-1] == bound
    assert (log_slope.diff() >= 0).all() and log_slope[4] == 0
    torch.testing.assert_close(log_slope[5], raw[5], rtol=1e-4, atol=0)  # slope one at zero
    torch.testing.assert_close(y, log_slope.exp() + 3)
    torch.testing.assert_close(soft_clamp(raw, bound), log_slope)
    beyond = torch.tensor(2 * bound).double().requires_grad_()  # a parameter past the bound still learns
    torch.testing.assert_close(torch.autograd.grad(soft_clamp(beyond, bound), beyond)[0].item(), 1 / math.cosh(2) ** 2)


@pytest.mark.parametrize("bound", (0.0, -1.0, math.nan))
def test_affine_refuses(bound):
    with pytest.raises(OptionError, match="max_log_scale"):
        Affine(bound)


# --- the spline

SPLINES = [
    RationalQuadraticSpline(bins, bound, min_slope)
    for bins, bound, min_slope in ((2, 5.0, 1e-3), (8, 5.0, 1e-3), (16, 3.0, 1e-2), (8, 1.0, 1e-4), (4, 5.0, 0.09))
]
each_spline = pytest.mark.parametrize("f", SPLINES, ids=lambda f: f"{f.bins}-{f.bound}-{f.min_slope}")


def max_slope(f: RationalQuadraticSpline) -> float:
    """The largest slope that the parametrisation allows.

    Secants lie in ``[c, 1/c]`` with ``c = max(sqrt(min_slope), 4 min_slope)``, and a knot's slope is at most four times the
    smaller neighbouring secant. In a bin of secant ``s`` with relative knot slopes ``a, b`` the slope is at most
    ``s max(a, b, 2)``, so at most ``4/c`` everywhere.
    """
    return 4 / max(math.sqrt(f.min_slope), 4 * f.min_slope)


def knots(f: RationalQuadraticSpline, params: Tensor) -> tuple[Tensor, ...]:
    """Left and bottom edges, widths, heights ``(..., K)`` and slopes at the knots ``(..., K + 1)``, the slopes from their definition."""
    k = f.bins
    xs, ys = f._edges(params[..., : 2 * k].movedim(-1, 0)).movedim(1, -1)[..., 1:-1]
    secants = ys.diff(dim=-1) / xs.diff(dim=-1)
    factors = 4.0 ** torch.tanh(params[..., 2 * k :] / math.log(4))
    inner = torch.minimum(secants[..., 1:], secants[..., :-1]) * factors
    return xs[..., :-1], ys[..., :-1], xs.diff(dim=-1), ys.diff(dim=-1), nn.functional.pad(inner, (1, 1), value=1.0)


def in_bins(f: RationalQuadraticSpline, params: Tensor, count: int, edges: int = 0) -> Tensor:
    """Points inside every bin, however narrow, crowded towards its ends; ``(..., K * count)``."""
    left, width = knots(f, params)[edges], knots(f, params)[edges + 2]
    t = torch.sin(torch.linspace(1e-3, math.pi / 2 - 1e-3, count, dtype=params.dtype)) ** 2
    return (left[..., None] + width[..., None] * t).flatten(-2)


@each_spline
@pytest.mark.parametrize("scale", SCALES)
def test_slopes_stay_in_range(f, scale):
    """The guarantee that other libraries' `minimum slope` at the knots does not give: theirs falls to 1e-6 in a bin."""
    params = normal(200, f.num_params, scale=scale)
    x = in_bins(f, params, 40)
    _, derivative, _ = slope(f, "forward", x, params[:, None].expand(-1, x.shape[1], -1))
    assert derivative.min() >= getattr(f, "min_slope", 0.0) * (1 - 1e-6)
    assert derivative.max() <= max_slope(f) * (1 + 1e-6)
    if scale >= 10 and f.bins > 2:  # and the bounds are of the right size
        assert derivative.min() < 2 * f.min_slope and derivative.max() > 0.8 * max_slope(f)


@settings(max_examples=200)
@given(
    raw=hnp.arrays(np.float64, 11, elements=st.floats(-1e3, 1e3)),
    min_slope=st.floats(1e-5, 0.0999),
    t=st.floats(-0.9999, 0.9999),
)
def test_slopes_stay_in_range_whatever_the_parameters(raw, min_slope, t):
    f = RationalQuadraticSpline(4, 3.0, min_slope)
    _, derivative, log_slope = slope(f, "forward", torch.tensor([3 * t]).double(), torch.from_numpy(raw)[None])
    assert f.min_slope * (1 - 1e-6) <= derivative.item() <= max_slope(f) * (1 + 1e-6)
    assert derivative.item() == pytest.approx(log_slope.exp().item(), rel=1e-8)


@each_spline
def test_values_follow_the_published_formula(f):
    """The formula of Durkan et al. (2019), equations 4 and 5, written once more in numpy."""
    params = normal(50, f.num_params, scale=2.0)
    x = in_bins(f, params, 20)
    y, log_slope = f.forward(x, params[:, None].expand(-1, x.shape[1], -1))
    left, bottom, width, height, d = (v.numpy() for v in knots(f, params))
    for row in range(len(params)):
        k = np.searchsorted(left[row], x[row].numpy(), side="right") - 1
        s, xi = height[row, k] / width[row, k], (x[row].numpy() - left[row, k]) / width[row, k]
        d0, d1, mid = d[row, k], d[row, k + 1], xi * (1 - xi)
        below = s + (d1 + d0 - 2 * s) * mid
        np.testing.assert_allclose(y[row], bottom[row, k] + height[row, k] * (s * xi**2 + d0 * mid) / below, rtol=1e-9, atol=1e-11)
        expected = s**2 * (d1 * xi**2 + 2 * s * mid + d0 * (1 - xi) ** 2) / below**2
        np.testing.assert_allclose(log_slope[row], np.log(expected), rtol=1e-9, atol=1e-9)


@each_spline
def test_bins_fill_the_interval(f):
    """Each bin has its share of the interval, and the tails go on with slope one."""
    params, k = normal(300, f.num_params, scale=10.0), f.bins
    left, bottom, width, height, d = knots(f, params)
    p, q = (1e-3 / k + (1 - 1e-3) * torch.softmax(params[:, part], -1) for part in (slice(k), slice(k, 2 * k)))
    torch.testing.assert_close(width, 2 * f.bound * ((1 - f._mix) * p + f._mix * q))
    torch.testing.assert_close(height, 2 * f.bound * ((1 - f._mix) * q + f._mix * p))
    tails = f._edges(params[..., : 2 * k].movedim(-1, 0))[:, [0, 1, -2, -1]]
    expected = torch.tensor([-f.bound - 1, -f.bound, f.bound, f.bound + 1], dtype=torch.float64)
    torch.testing.assert_close(tails, expected[:, None].expand_as(tails))
    for start, size in ((left, width), (bottom, height)):
        assert (start[:, 0] == -f.bound).all() and (size > 0).all()
        torch.testing.assert_close(start[:, 1:], (start + size)[:, :-1])
        torch.testing.assert_close((start + size)[:, -1], torch.full((300,), f.bound).double())
    assert (d[:, 0] == 1).all() and (d[:, -1] == 1).all()


@each_spline
def test_value_and_slope_are_continuous_at_the_knots(f):
    params = normal(200, f.num_params, scale=2.0)
    left, bottom, width, _, d = knots(f, params)
    inner, step = left[:, 1:], 1e-6 * torch.minimum(width[:, 1:], width[:, :-1])
    rows = params[:, None].expand(-1, f.bins - 1, -1)
    at, before, after = (f.forward(x, rows)[0] for x in (inner, inner - step, inner + step))
    torch.testing.assert_close(at, bottom[:, 1:])
    for difference in ((at - before) / step, (after - at) / step):
        torch.testing.assert_close(difference, d[:, 1:-1], rtol=0.03, atol=1e-6)
    for x in (inner - step / 100, inner, inner + step / 100):
        torch.testing.assert_close(f.forward(x, rows)[1], d[:, 1:-1].log(), rtol=0, atol=1e-3)


@each_way
@each_spline
def test_value_and_slope_are_continuous_at_the_seam(f, way):
    params = normal(200, 1, f.num_params, scale=10.0).expand(-1, 8, -1)
    far = torch.tensor([f.bound, f.bound * (1 + 1e-9), f.bound + 1, 1e2 * f.bound]).double()
    x = torch.cat([-far, far]).expand(200, -1)
    y, log_slope = getattr(f, way)(x, params)
    assert torch.equal(y, x) and not log_slope.any()
    x = f.bound * torch.tensor([-1 + 1e-9, 1 - 1e-9]).double().expand(200, -1)
    y, derivative, log_slope = slope(f, way, x, params[:, :2])
    torch.testing.assert_close(y, x, rtol=0, atol=1e-7 * f.bound)
    torch.testing.assert_close(derivative, torch.ones_like(x), rtol=0, atol=1e-4)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-4)


@each_way
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_gradients_at_knots_and_seam(way, scale, dtype):
    """On a knot, one float to either side of it, at the seam and far away: finite, and never lost to a clamp."""
    f = RationalQuadraticSpline()
    params = normal(300, f.num_params, scale=scale, dtype=dtype)
    edges = knots(f, params)[("forward", "inverse").index(way)]
    fixed = torch.tensor([f.bound, 1e2, 1e3, 1e4, 1e5, 1e6, 1e20], dtype=dtype).expand(300, -1)
    at = torch.cat([edges, fixed, -fixed], -1)
    x = torch.cat([at, torch.nextafter(at, 2 * at), torch.nextafter(at, 0 * at)], -1).requires_grad_()
    rows = params[:, None].expand(-1, x.shape[-1], -1).clone().requires_grad_()
    y, log_slope = getattr(f, way)(x, rows)
    derivative = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    torch.testing.assert_close(derivative, log_slope.exp(), rtol=5e-3, atol=0)
    for g in torch.autograd.grad((y + log_slope).sum(), (x, rows)):
        assert g.isfinite().all()


BUDGET = [(0.3, 5e-6, 5e-6, 1e-5, 2e-5), (1.0, 2e-4, 2e-5, 2e-4, 1e-4), (3.0, 5e-4, 1e-4, 2e-3, 4e-3), (30.0, 5e-4, 1e-4, 2e-3, 1e-2)]


@pytest.mark.parametrize("scale, there_and_back, back_and_there, log_slopes, exact", BUDGET)
def test_float32_budget(scale, there_and_back, back_and_there, log_slopes, exact):
    """Others are off by .04 to .9. What is left is the rounding of y, 2.4e-7, over the smallest slope, 1e-3."""
    f = RationalQuadraticSpline()
    params = normal(300, 1, f.num_params, scale=scale, dtype=torch.float32).expand(-1, 300, -1)
    point = 5.2 * (2 * torch.rand(300, 300) - 1)
    y, log_slope = f.forward(point, params)
    back, reverse = f.inverse(y, params)
    again, _ = f.forward(f.inverse(point, params)[0], params)
    assert (back - point).abs().max() < there_and_back
    assert (again - point).abs().max() < back_and_there
    assert (log_slope + reverse).abs().quantile(0.999) < log_slopes
    assert (y - f.forward(point.double(), params.double())[0]).abs().max() < exact


@pytest.mark.parametrize(
    "options",
    [{"bins": 1}, {"bins": 0}, {"bound": 0.0}, {"bound": -1.0}, {"min_slope": 0.0}, {"min_slope": 0.1}, {"min_slope": -1e-3}],
    ids=str,
)
def test_spline_refuses(options):
    with pytest.raises(OptionError, match=next(iter(options))):
        RationalQuadraticSpline(**options)
