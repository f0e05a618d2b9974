"""The recipes of manifolds: distributions like all others, that start uniform and can be trained."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import Adam
from torch import nn
from zoo import normal

import pyro_flows as pf
from pyro_flows import manifolds as M
from pyro_flows.errors import OptionError, ShapeError, SupportError

RECIPES = {
    "sphere-2": (pf.flows.sphere, 2, M.Sphere(2), {}),
    "sphere-3": (pf.flows.sphere, 3, M.Sphere(3), {}),
    "sphere-antipodal": (pf.flows.sphere, 4, M.Sphere(4), {"antipodal": True}),
    "simplex-2": (pf.flows.simplex, 2, M.Simplex(2), {}),
    "simplex-4": (pf.flows.simplex, 4, M.Simplex(4), {"chart": "stick_breaking"}),
    "torus-1": (pf.flows.torus, 1, M.Torus(1), {}),
    "torus-5": (pf.flows.torus, 5, M.Torus(5), {"univariate": pf.univariate.MobiusMixture(3)}),
}
each = pytest.mark.parametrize("make, n, manifold, options", RECIPES.values(), ids=RECIPES)


@each
def test_recipes_are_distributions(make, n, manifold, options):
    for context_dim, batch in ((0, ()), (2, (4,)), (2, (3, 4))):
        flow = make(n, context_dim, **options)
        d = flow(torch.randn(*batch, 2)) if context_dim else flow()
        assert d.batch_shape == batch and d.event_shape == (manifold.size,)
        assert type(d.support) is type(manifold.support) and flow.transform.manifold == manifold
        x, log_prob = d.rsample_and_log_prob((7,))
        manifold.check(x, "draws")
        torch.testing.assert_close(log_prob, d.log_prob(x.detach()), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(log_prob, torch.full_like(log_prob, -manifold.log_volume), rtol=1e-3, atol=1e-3)
        assert d.expand((5, *batch)).sample().shape == (5, *batch, n)
        with pyro.plate("rows", batch[-1] if batch else 6):
            assert pyro.sample("x", d).shape[-1] == n


@each
def test_every_coordinate_and_the_context_matter_after_training(make, n, manifold, options):
    torch.manual_seed(0)
    flow, context = make(n, 2, transforms=4, hidden_features=(16,), **options), torch.randn(64, 2)
    x = manifold.random_uniform((64,))
    optimizer = torch.optim.Adam(flow.parameters(), 0.02)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = -flow(context).log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    dead = [name for name, p in flow.named_parameters() if p.grad is None or not p.grad.any()]
    if n == 2 and manifold == M.Simplex(2):  # one log-ratio: its linear layers have no triangles
        dead = [name for name in dead if not name.endswith(("lower", "upper"))]
    assert not dead
    with torch.no_grad():
        change = flow.transform.forward_and_ladj(x, context)[0] - x
        assert (change.abs().amax(0) > 1e-3).all()


@pytest.mark.thorough
def test_a_flow_learns_a_direction_as_a_guide_as_a_prior_and_as_a_likelihood():
    target = M.VonMisesFisher(torch.tensor([0.0, 0.6, 0.8]), 4.0)
    flow = pf.flows.sphere(3, transforms=2)

    def model():
        pyro.sample("x", target)

    def guide():
        pyro.module("flow", flow)
        pyro.sample("x", flow())

    svi = SVI(model, guide, Adam({"lr": 0.02}), Trace_ELBO(num_particles=64, vectorize_particles=True))
    for _ in range(400):
        svi.step()
    x, log_q = flow().rsample_and_log_prob((20_000,))
    assert (log_q - target.log_prob(x)).mean().item() < 0.02  # the divergence; one translation reaches 0.13
    rows = target.sample((2000,))
    fit = pf.fit_density(pf.flows.sphere(3, transforms=2), rows, max_steps=300, lr=1e-2, progress=False)
    entropy = -target.log_prob(target.sample((50_000,))).mean()
    with torch.no_grad():
        assert -fit.flow().log_prob(target.sample((20_000,))).mean() < entropy + 0.05


def test_rotations_as_quaternions():
    flow = pf.flows.sphere(4, transforms=2, antipodal=True)
    with torch.no_grad():
        for i, p in enumerate(flow.parameters()):
            p.add_(0.2 * normal(i, *p.shape).float())
    x = M.Sphere(4).random_uniform((500,))
    torch.testing.assert_close(flow().log_prob(x), flow().log_prob(-x), rtol=1e-4, atol=1e-4)
    uniform = M.Sphere(4).random_uniform((200_000,))
    with torch.no_grad():  # the density of rotations, under their uniform distribution
        assert (flow().log_prob(uniform).exp() * 2 * math.pi**2).mean().item() == pytest.approx(1, abs=0.05)


class Concentrated(nn.Module):
    """A base of one's own, as the recipe's docstring describes it."""

    def __init__(self):
        super().__init__()
        self.dim, self.manifold, self.log_concentration = 3, M.Sphere(3), nn.Parameter(torch.tensor(0.0))

    def forward(self, context=None):
        return M.PowerSpherical(torch.tensor([0.0, 0.0, 1.0]), self.log_concentration.exp())


def test_a_base_learns_its_concentration():
    flow = pf.flows.sphere(3, transforms=1, base=Concentrated())
    rows = M.PowerSpherical(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(20.0)).sample((300,))
    pf.fit_density(flow, rows, max_steps=20, lr=3e-2, progress=False)
    assert flow.base.log_concentration > 0.1
    x, log_prob = flow().rsample_and_log_prob((50,))
    assert x.requires_grad
    torch.testing.assert_close(log_prob, flow().log_prob(x), rtol=1e-3, atol=1e-3)


def test_trained_bases_and_mixed_ones():
    flow = pf.Flow(M.Dirichlet(3), [M.GeneralizedCalibration(3)])
    assert len(list(flow.parameters())) == 2
    rows = dist.Dirichlet(torch.tensor([2.0, 5.0, 1.0])).sample((500,))
    before = flow().log_prob(rows).mean()
    fit = pf.fit_density(flow, rows, max_steps=200, lr=3e-2, progress=False)
    assert fit.flow().log_prob(rows).mean() > before + 0.3
    with pytest.raises(SupportError, match="the base lives on"):
        pf.flows.sphere(3, base=pf.distributions.Gaussian(3))
    with pytest.raises(SupportError, match="same place"):
        pf.flows.sphere(3).standardized(M.Sphere(3).random_uniform((20,)))
    with pytest.raises(OptionError):
        M.Dirichlet(3, 0.0)
    with pytest.raises(OptionError):
        pf.flows.torus(2, univariate=pf.univariate.Affine())
    with pytest.raises(ShapeError):
        pf.flows.sphere(1)
