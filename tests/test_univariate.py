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
from scipy.optimize import brentq
from torch import Tensor
from zoo import UNIVARIATES

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


def in_bins(f: RationalQuadraticSpline, params: Tensor, count: int, edges: int = 0) -> Tensor:
    """Points inside every bin, however narrow, crowded towards its ends; ``(..., K * count)``."""
    left, width = f._knots(params)[edges], f._knots(params)[edges + 2]
    t = torch.sin(torch.linspace(1e-3, math.pi / 2 - 1e-3, count, dtype=params.dtype)) ** 2
    return (left[..., None] + width[..., None] * t).flatten(-2)


@each_spline
@pytest.mark.parametrize("scale", SCALES)
def test_slopes_stay_in_range(f, scale):
    """The guarantee that other libraries' `minimum slope` at the knots does not give: theirs falls to 1e-6 in a bin."""
    params = normal(200, f.num_params, scale=scale)
    x = in_bins(f, params, 40)
    _, derivative, _ = slope(f, "forward", x, params[:, None].expand(-1, x.shape[1], -1))
    assert derivative.min() >= f.min_slope * (1 - 1e-6)
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
    left, bottom, width, height, d = (v.numpy() for v in f._knots(params))
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
    left, bottom, width, height, d = f._knots(normal(300, f.num_params, scale=10.0))
    for start, size in ((left, width), (bottom, height)):
        assert (start[:, 0] == -f.bound).all() and (size > 0).all()
        torch.testing.assert_close(start[:, 1:], (start + size)[:, :-1])
        torch.testing.assert_close((start + size)[:, -1], torch.full((300,), f.bound).double())
    assert (d[:, 0] == 1).all() and (d[:, -1] == 1).all()


@each_spline
def test_value_and_slope_are_continuous_at_the_knots(f):
    params = normal(200, f.num_params, scale=2.0)
    left, bottom, width, _, d = f._knots(params)
    knots, step = left[:, 1:], 1e-6 * torch.minimum(width[:, 1:], width[:, :-1])
    rows = params[:, None].expand(-1, f.bins - 1, -1)
    at, before, after = (f.forward(x, rows)[0] for x in (knots, knots - step, knots + step))
    torch.testing.assert_close(at, bottom[:, 1:])
    for difference in ((at - before) / step, (after - at) / step):
        torch.testing.assert_close(difference, d[:, 1:-1], rtol=0.03, atol=1e-6)
    for x in (knots - step / 100, knots, knots + step / 100):
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
    edges = f._knots(params)[("forward", "inverse").index(way)]
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
