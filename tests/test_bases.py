"""Bases: densities that integrate to one and belong to their samples; shapes, modules, and what each is for."""

from __future__ import annotations

import copy
import io
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn

import pyro_flows as pf
from pyro_flows import distributions as D
from pyro_flows.errors import OptionError, ShapeError
from pyro_flows.transforms import Affine

BASES = {
    "gaussian": D.Gaussian,
    "gaussian-trainable": lambda dim: D.Gaussian(dim, trainable=True),
    "student": lambda dim: D.StudentT(dim, torch.linspace(3.0, 8.0, dim)),
    "student-trainable": lambda dim: D.StudentT(dim, 6.0, trainable=True),
    "box": lambda dim: D.BoxUniform(dim, -1.0, torch.linspace(1.0, 2.0, dim)),
    "mixture": lambda dim: D.GaussianMixture(dim, 3),
    "mixture-fixed": lambda dim: D.GaussianMixture(dim, 3, trainable=False),
    "resampled": lambda dim: D.Resampled(dim, truncation=5, hidden_features=(16,), num_nodes=2**14),
    "resampled-once": lambda dim: D.Resampled(dim, truncation=1, hidden_features=(4,)),
}
each_base = pytest.mark.parametrize("name", BASES)


def build(name: str, dim: int) -> nn.Module:
    """A base in float64 and evaluation mode, its parameters moved."""
    base = BASES[name](dim).double().eval()
    with torch.no_grad():
        for p in base.parameters():
            p += 0.4 * torch.randn_like(p)
    return base


def test_every_base_is_tested():
    public = {getattr(D, n) for n in D.__all__}
    assert {b for b in public if issubclass(b, nn.Module)} - {D.Flow, D.AugmentedFlow} == {type(make(2)) for make in BASES.values()}


@each_base
def test_integrates_to_one_and_belongs_to_its_samples(name):
    d = build(name, 2)()
    x = d.sample((4000,))
    with torch.no_grad():
        edge = 1.5 * x.abs().amax()
        axis = torch.linspace(-1, 1, 800).double() * edge  # zero lies between two points
        grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1)
        mass = d.log_prob(grid).exp() * (axis[1] - axis[0]) ** 2
    assert mass.sum().item() == pytest.approx(1, abs=0.012)  # heavy tails beyond the grid, jumps of the box, the error of Z
    for marginal, value in ((mass.sum(1), x[:, 0]), (mass.sum(0), x[:, 1]), (mass.sum(1), x[:, 0])):
        cdf = marginal.cumsum(0) / marginal.sum()
        at = torch.searchsorted(axis, value.contiguous()).clamp(1, len(axis) - 1)
        place = (value - axis[at - 1]) / (axis[1] - axis[0])
        assert stats.kstest((cdf[at - 1] + place * (cdf[at] - cdf[at - 1])).numpy(), "uniform").pvalue > 1e-3
    quadrants = [(mass[i][:, j].sum() / mass.sum()).item() for i in (axis < 0, axis >= 0) for j in (axis < 0, axis >= 0)]
    observed = torch.bincount((2 * (x[:, 0] >= 0) + (x[:, 1] >= 0)).long(), minlength=4)
    assert stats.chisquare(observed.numpy(), [len(x) * q for q in quadrants]).pvalue > 1e-3


@pytest.mark.parametrize("dim", (1, 3))
@each_base
def test_shapes(name, dim):
    d = build(name, dim)()
    assert d.batch_shape == () and d.event_shape == (dim,) and d.support.event_dim == 1
    x = d.sample((4, 2))
    assert x.shape == (4, 2, dim) and d.log_prob(x).shape == (4, 2) and d.sample().shape == (dim,)
    wide = d.expand((2,))
    assert wide.batch_shape == (2,) and wide.sample((4,)).shape == (4, 2, dim)
    torch.testing.assert_close(wide.log_prob(x), d.log_prob(x))
    with pyro.plate("rows", 2):
        assert pyro.sample("z", d).shape == (2, dim)


@each_base
def test_in_a_flow(name):
    base = build(name, 2)
    flow = pf.Flow(base, Affine(2).double()).eval()
    x = flow().sample((5,))
    torch.testing.assert_close(flow().log_prob(x), base().log_prob(x))
    learned = list(base.parameters())
    for g in torch.autograd.grad(flow().log_prob(x).sum(), learned, allow_unused=True) if learned else ():
        assert name == "resampled-once" or (g is not None and torch.isfinite(g).all() and g.any())
    if base().has_rsample:
        y, log_prob = flow().rsample_and_log_prob((6,))
        torch.testing.assert_close(log_prob, flow().log_prob(y.detach().clone()))
    else:
        with pytest.raises(NotImplementedError):
            flow().rsample_and_log_prob((6,))
        with torch.no_grad():
            y, log_prob = flow().rsample_and_log_prob((6,))
            torch.testing.assert_close(log_prob, flow().log_prob(y))


@each_base
def test_copies_and_state(name):
    base, other = build(name, 2), build(name, 2)
    x = 0.5 * torch.rand(5, 2).double()
    file = io.BytesIO()
    torch.save(base.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    for again in (other, copy.deepcopy(base), pickle.loads(pickle.dumps(base))):
        torch.testing.assert_close(again().log_prob(x), base().log_prob(x))
    assert base.float()().log_prob(x.float()).dtype == torch.float32


@pytest.mark.parametrize("dim", (1, 2))
def test_mixture_against_pyros(dim):
    base = build("mixture", dim)
    oracle = dist.MixtureSameFamily(dist.Categorical(logits=base.logits), dist.Normal(base.loc, base.log_scale.exp()).to_event(1))
    z = torch.randn(20, dim).double()
    torch.testing.assert_close(base().log_prob(z), oracle.log_prob(z))
    torch.testing.assert_close(base.component_log_prob(z).logsumexp(-1), oracle.log_prob(z))


def test_resampled_against_its_own_procedure():
    """The truncated density, by hand: many rounds of proposals, accepted or not."""
    base = build("resampled", 1)
    a = lambda z: base.log_accept(z).exp()  # noqa: E731
    with torch.no_grad():
        proposals = torch.randn(400_000, 5, 1).double()
        kept = torch.rand(400_000, 5).double() < a(proposals)
        kept[:, -1] = True
        drawn = proposals[torch.arange(400_000), kept.int().argmax(1), 0]
        edges = torch.linspace(-2, 2, 9).double()
        observed = torch.histogram(drawn, edges)[0] / 400_000
        fine = torch.linspace(-2, 2, 8001).double()
        density = base().log_prob(fine[:, None]).exp()
        cells = torch.cumulative_trapezoid(density, fine)
        expected = torch.cat([cells[999::1000][:1], cells[999::1000].diff()])
    torch.testing.assert_close(observed, expected, rtol=0, atol=4e-3)


def test_resampled_normaliser_is_never_stale_and_the_modes_agree():
    base = build("resampled", 2)
    before = base.log_normalizer()
    with torch.no_grad():
        base.net[-1].bias += 1.0
        exact = base.log_accept(torch.randn(2**17, 2).double()).logsumexp(0) - math.log(2**17)
    assert base.log_normalizer() != before
    for mode in (True, False):
        assert base.train(mode).log_normalizer().item() == pytest.approx(exact.item(), abs=0.02)


BROKEN = {
    "box-sides": (lambda: D.BoxUniform(2, 1.0, torch.tensor([2.0, 0.5])), OptionError),
    "box-shape": (lambda: D.BoxUniform(2, torch.zeros(3)), ShapeError),
    "mixture-none": (lambda: D.GaussianMixture(2, 0), OptionError),
    "mixture-loc": (lambda: D.GaussianMixture(2, 3, torch.zeros(2, 2)), ShapeError),
    "mixture-dim": (lambda: D.GaussianMixture(0, 3), ShapeError),
    "truncation": (lambda: D.Resampled(2, 0), OptionError),
    "nodes": (lambda: D.Resampled(2, num_nodes=0), OptionError),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_options_are_refused(what):
    make, error = BROKEN[what]
    with pytest.raises(error):
        make()
