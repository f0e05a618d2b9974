"""Continuous flows on spheres and tori: densities, geodesics, flow matching."""

from __future__ import annotations

import math

import pyro.distributions as dist
import pytest
import torch
from zoo import normal

import pyro_flows as pf
from pyro_flows import manifolds as M
from pyro_flows.errors import OptionError, SupportError

MANIFOLDS = [M.Sphere(2), M.Sphere(3), M.Torus(1), M.Torus(2)]


def moved(manifold, **options):
    torch.manual_seed(0)
    flow = M.RiemannianContinuousFlow(manifold, **options).double()
    with torch.no_grad():
        for i, p in enumerate(flow.parameters()):
            p += 0.2 * normal(i, *p.shape)
    return flow


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=str)
def test_density_integrates_to_one(manifold):
    flow = pf.Flow(M.Uniform(manifold), moved(manifold, solver="rk4", steps=20))
    x, weight = manifold.quadrature(40 if manifold.intrinsic_dim == 2 else 200)
    with torch.no_grad():
        density = flow().log_prob(x).exp()
    assert density.max() > 1.2 * density.min()
    assert abs(float((density * weight).sum()) - 1) < 1e-5


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=str)
def test_adaptive_steps_find_the_same(manifold):
    fixed, adaptive = moved(manifold, solver="rk4", steps=40), moved(manifold, rtol=1e-9, atol=1e-9)
    x = manifold.random_uniform((20,), dtype=torch.float64)
    with torch.no_grad():
        (y, ladj), (y_too, ladj_too) = fixed.forward_and_ladj(x), adaptive.forward_and_ladj(x)
        back, ladj_back = adaptive.inverse_and_ladj(y_too)
    assert manifold.distance(y).max() < 1e-12
    torch.testing.assert_close(y, y_too, atol=1e-5, rtol=0)
    torch.testing.assert_close(ladj, ladj_too, atol=1e-5, rtol=0)
    off = manifold.project(back - x) if isinstance(manifold, M.Torus) else back - x
    assert off.abs().max() < 1e-6
    torch.testing.assert_close(ladj_back, -ladj_too, atol=1e-6, rtol=0)


def test_estimated_divergence_is_unbiased():
    sphere = M.Sphere(3)
    exact, estimated = moved(sphere, solver="rk4", steps=4), moved(sphere, trace="hutchinson", solver="rk4", steps=4)
    x = sphere.random_uniform((1,), dtype=torch.float64).expand(4000, 3)
    torch.manual_seed(0)
    with torch.no_grad():
        draws, expected = estimated.forward_and_ladj(x)[1], exact.forward_and_ladj(x[:1])[1]
    assert draws.std() > 0 and abs(draws.mean() - expected.item()) < 3 * draws.std() / 4000**0.5


@pytest.mark.parametrize("manifold", [M.Sphere(2), M.Sphere(4), M.Torus(3)], ids=str)
def test_geodesics(manifold):
    torch.manual_seed(0)
    start, end = manifold.random_uniform((2, 50), dtype=torch.float64)
    t, h = torch.rand(50, 1, dtype=torch.float64) * 0.9 + 0.05, 1e-6
    place, velocity = manifold.geodesic(start, end, t)
    assert manifold.distance(place).max() < 1e-12
    step = manifold.geodesic(start, end, t + h)[0] - manifold.geodesic(start, end, t - h)[0]
    torch.testing.assert_close((manifold.project(step) if isinstance(manifold, M.Torus) else step) / (2 * h), velocity, atol=1e-7, rtol=0)
    speed = velocity.norm(dim=-1)
    torch.testing.assert_close(speed, manifold.geodesic(start, end, torch.zeros_like(t))[1].norm(dim=-1))  # even, and no longer than half way round
    assert speed.max() <= math.pi * (1 if isinstance(manifold, M.Sphere) else 3**0.5)
    torch.testing.assert_close(manifold.geodesic(start, end, torch.ones_like(t))[0], end)
    assert all(part.isfinite().all() for opposite in (start, -start) for part in manifold.geodesic(start, opposite, t))
    assert manifold.distance(manifold.geodesic(start, manifold.project(-start), t)[0]).max() < 1e-12


@pytest.mark.parametrize(
    ("manifold", "target"),
    [
        (M.Sphere(3), M.VonMisesFisher(torch.tensor([0.0, 0.6, 0.8]), torch.tensor(4.0))),
        (M.Torus(1), dist.VonMises(torch.tensor([2.5]), torch.tensor([2.0])).to_event(1)),  # across the seam
    ],
    ids=["vonmises-fisher", "vonmises"],
)
def test_flow_matching_learns_a_density(manifold, target):
    torch.manual_seed(0)
    x, test = target.sample((4000,)), target.sample((500,))
    flow = pf.Flow(M.Uniform(manifold), M.RiemannianContinuousFlow(manifold, solver="rk4", steps=8))
    with torch.no_grad():
        assert (target.log_prob(test) - flow().log_prob(test)).mean() > 0.5  # so that there is something to learn
    fit = pf.fit_density(flow, x, objective="flow_matching", max_steps=400, batch_size=256, lr=1e-2, progress=False)
    with torch.no_grad():
        kl = (target.log_prob(test) - fit.flow().log_prob(test)).mean()
    assert -0.03 < kl < 0.06


def test_what_is_solved_stays_on_the_manifold():
    torus = M.Torus(1)
    flow = moved(torus, solver="rk4", steps=20)
    x = torch.linspace(-3.14, 3.14, 50, dtype=torch.float64)[:, None]
    for found in (flow.solve(x).value, flow.regularization(x).value, flow.path(x)):
        assert torus.distance(found).max() == 0
    torch.testing.assert_close(flow.solve(x, inverse=True).value, flow.inverse_and_ladj(x)[0])


def test_context():
    torus = M.Torus(2)
    flow = M.RiemannianContinuousFlow(torus, context_dim=3, solver="rk4", steps=4)
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3
    y, ladj = flow.forward_and_ladj(torus.random_uniform((5,)), torch.randn(7, 1, 3))
    assert y.shape == (7, 5, 2) and ladj.shape == (7, 5) and not torch.equal(y[0], y[1])


def test_errors():
    with pytest.raises(OptionError, match="Sphere or a Torus"):
        M.RiemannianContinuousFlow(M.Simplex(3))
    with pytest.raises(OptionError, match="geodesics"):
        M.Simplex(3).geodesic(*torch.rand(2, 3), torch.zeros(1))
    with pytest.raises(SupportError, match="do not lie on"):
        M.RiemannianContinuousFlow(M.Sphere(3)).forward_and_ladj(torch.ones(2, 3))
