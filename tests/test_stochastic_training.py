"""Continuously indexed flows, the gradients of their bounds, the recipes, and their training."""

import pytest
import torch

import pyro_flows as pf
from benchmarks.stochastic import log_density
from benchmarks.toys import TOYS
from pyro_flows.distributions import GaussianMixture
from pyro_flows.errors import DataError, IntractableError, OptionError
from pyro_flows.stochastic import ContinuouslyIndexed, LWTACoupling, StochasticFlow
from pyro_flows.transforms import Coupling
from pyro_flows.univariate import Affine, RationalQuadraticSpline

SMALL = {"hidden_features": (8,)}


def perturbed(flow, scale=0.4):
    with torch.no_grad():
        for p in flow.parameters():
            p += scale * torch.randn_like(p)
    return flow.eval()


def indexed(layers=2, **options):
    parts = [ContinuouslyIndexed(Coupling(Affine(), 2, torch.tensor([i % 2 == 0, i % 2 == 1]), **SMALL), **SMALL) for i in range(layers)]
    return perturbed(StochasticFlow(2, parts, **options).double(), 0.3)


# --- continuous indices


def test_a_continuous_index_integrated_out():
    """The bound of many particles against quadrature over the index."""
    flow = indexed(1)
    layer = flow.layers[0]
    with torch.no_grad():  # a wide kernel, so that a mean over it settles
        layer.posterior[-1].weight.zero_()
        layer.posterior[-1].bias.copy_(torch.tensor([0.0, 1.2]))
    x = flow().sample((6,))
    u = torch.linspace(-12, 12, 4001).double()
    with torch.no_grad():
        moved = layer.pull(x.unsqueeze(-2), u[:, None])
        density = torch.trapezoid((flow.base().log_prob(moved.value) + moved.ladj + moved.log_prior).exp(), u).log()
        torch.testing.assert_close(flow().log_prob_bound(x, 20_000), density, atol=0.02, rtol=0)
        gaps = [((density - flow().log_prob_bound(x.expand(500, 6, 2), m)).mean()).item() for m in (1, 10, 100)]
    assert gaps[0] > gaps[1] > gaps[2] > -1e-3


def test_continuous_inverse_and_draws():
    flow = indexed()
    assert flow().has_rsample and not flow().exact
    x, path = flow().sample_with_path((40,))
    found = flow().inverse(x)
    torch.testing.assert_close(flow.push(found.z, found.indices)[0], x)
    torch.testing.assert_close(flow.push(path.z, path.indices)[0], x)
    torch.testing.assert_close(flow.push(path.z, path.indices)[1], path.log_prob)
    assert torch.equal(flow().inverse(x, "map").z, flow().inverse(x, "map").z)
    drawn = flow().rsample((3,))
    assert torch.autograd.grad(drawn.sum(), flow.layers[0].prior[-1].bias)[0].abs().sum() > 0
    with pytest.raises(IntractableError, match="ContinuouslyIndexed cannot be summed out.*log_prob_bound"):
        flow().log_prob(x)


@pytest.mark.parametrize("gradient, particles", [("total", 1), ("stl", 1), ("total", 5), ("dreg", 5)])
def test_gradients_with_continuous_indices(gradient, particles):
    """Every estimate has one mean: that of finite differences of the bound, under common random numbers."""
    flow = indexed()
    x = flow().sample((3,)).expand(6000, 3, 2)

    def bound(how):
        torch.manual_seed(11)
        return flow().log_prob_bound(x, particles, how)

    parameters = dict(flow.named_parameters())
    chosen = ["layers.0.posterior.2.bias", "layers.1.posterior.2.bias", "layers.1.mover.2.bias", "layers.0.prior.2.bias"]
    chosen.append("layers.1.transform.net.2.bias")
    found = torch.autograd.grad(bound(gradient).mean(0).sum(), [parameters[n] for n in chosen])
    for name, estimate in zip(chosen, found, strict=True):
        p, h = parameters[name], 1e-4
        wanted = torch.zeros_like(p)
        with torch.no_grad():
            for i in range(len(p)):
                p[i] += h
                up = bound("total").mean(0).sum()
                p[i] -= 2 * h
                wanted[i] = (up - bound("total").mean(0).sum()) / (2 * h)
                p[i] += h
        tolerance = 1e-6 if gradient == "total" else 0.04
        torch.testing.assert_close(estimate, wanted, atol=tolerance, rtol=0.03)


def test_sticking_the_landing_lands():
    """Where q is the posterior the estimate has no variance; the total gradient has, and half of it is no gradient at all."""
    layer = ContinuouslyIndexed(Coupling(Affine(), 2, **SMALL), **SMALL).double()
    flow = StochasticFlow(2, [layer])
    with torch.no_grad():
        layer.mover[-1].weight.zero_()  # the index does nothing, so its posterior is its prior
    x = torch.randn(50, 2).double()
    q = list(layer.posterior.parameters())
    stl = torch.autograd.grad(flow().log_prob_bound(x, 1, "stl").sum(), q)
    total = torch.autograd.grad(flow().log_prob_bound(x, 1, "total").sum(), q)
    assert max(g.abs().max().item() for g in stl) < 1e-12
    assert max(g.abs().max().item() for g in total) > 1e-2


def test_mixed_kinds_are_told_apart():
    discrete = LWTACoupling(2, 3, **SMALL)
    flow = StochasticFlow(2, [ContinuouslyIndexed(Coupling(Affine(), 2, **SMALL), **SMALL), discrete])
    assert flow.inferred_kinds == {True, False}
    with pytest.raises(OptionError, match="of one kind"):
        flow().log_prob_bound(torch.zeros(2), 2)
    assert flow().log_prob_bound(torch.zeros(2), 2, "rws").isfinite()
    assert StochasticFlow(2, list(reversed(flow.layers))).inferred_kinds == {False}


# --- recipes


RECIPES = {
    "lwta": lambda d, c: pf.flows.lwta(d, c, transforms=3, units=3, **SMALL),
    "interleaved": lambda d, c: pf.flows.lwta(d, c, transforms=3, units=2, blocks=4, placement="interleaved", **SMALL),
    "splines": lambda d, c: pf.flows.lwta(d, c, transforms=2, units=2, univariate=RationalQuadraticSpline(4), **SMALL),
    "ar_lwta": lambda d, c: pf.flows.ar_lwta(d, c, transforms=2, units=3, **SMALL),
    "cif": lambda d, c: pf.flows.cif(d, c, transforms=3, **SMALL),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("dim, context_dim", [(1, 0), (3, 0), (3, 2)])
def test_recipes(name, dim, context_dim):
    flow = perturbed(RECIPES[name](dim, context_dim).double(), 0.2)
    given = (torch.randn(5, context_dim).double(),) if context_dim else ()
    x = flow(*given).sample(() if context_dim else (5,))
    assert x.shape == (5, dim)
    found = flow(*given).inverse(x)
    torch.testing.assert_close(flow.push(found.z, found.indices, *given)[0], x)
    bound = flow(*given).log_prob_bound(x, 4)
    assert bound.shape == (5,) and bool(bound.isfinite().all())
    grads = torch.autograd.grad(bound.sum(), list(flow.parameters()), allow_unused=True)
    if dim == 1:  # masked nets of one coordinate have inputs that nothing sees
        return
    dead = [n for (n, _), g in zip(flow.named_parameters(), grads, strict=True) if g is None or not bool(g.isfinite().all()) or not bool(g.any())]
    assert not dead
    assert flow(*given).exact == (name != "cif")


def test_interleaved_blocks_stand_between_couplings():
    flow = pf.flows.lwta(2, transforms=6, units=3, blocks=4, placement="interleaved", **SMALL)
    kinds = "".join("L" if isinstance(layer, LWTACoupling) else "c" for layer in flow.layers)
    assert kinds == "LLccLccLcc"
    assert flow.num_paths == 27 and flow().exact
    with pytest.raises(OptionError, match="placement"):
        pf.flows.lwta(2, placement="top")
    with pytest.raises(OptionError, match="blocks"):
        pf.flows.lwta(2, blocks=0)


# --- training


def test_lwta_beats_a_bijection_on_the_ring():
    target = TOYS["8gaussians"]
    x, test = target.sample(5000), target.sample(4000)
    kls = []
    for flow in (pf.flows.lwta(2, transforms=1, hidden_features=(16, 16)), pf.flows.realnvp(2, hidden_features=(16, 16))):
        fit = pf.fit_density(flow, x, max_steps=150, batch_size=256, lr=1e-2, progress=False)
        assert fit.loss_name == "negative log-likelihood"
        with torch.no_grad():
            kls.append(((log_density(target, test) - flow().log_prob(test)).mean()).item())
    assert kls[0] < 0.1 and kls[0] < 0.3 * kls[1]


@pytest.mark.parametrize("objective", ["elbo", "stl", "iwae", "dreg"])
def test_bounds_train_continuous_indices(objective):
    x = torch.randn(2000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.4]])
    flow = pf.flows.cif(2, transforms=2, hidden_features=(16,), index_features=(8,))
    fit = pf.fit_density(flow, x, objective=objective, num_particles=4, max_steps=100, lr=1e-2, progress=False)
    assert fit.loss_name == f"negative {objective} bound"
    entropy = 1 + torch.log(torch.tensor(2 * torch.pi * 0.4))
    assert fit.validation_loss < entropy.item() + 0.1


@pytest.mark.parametrize("objective", ["rws", "elbo", "iwae"])
def test_bounds_train_discrete_indices(objective):
    side = torch.randint(2, (1500, 1)) * 4.0 - 2.0
    x = torch.randn(1500, 2) * 0.4 + side
    flow = pf.flows.lwta(2, transforms=2, units=3, blocks=3, hidden_features=(16,), max_paths=2)
    assert flow.needs_laws
    fit = pf.fit_density(flow, x, objective=objective, num_particles=4, max_steps=100, batch_size=128, lr=2e-2, progress=False)
    entropy = torch.log(torch.tensor(2.0)) + 1 + torch.log(torch.tensor(2 * torch.pi * 0.16))
    assert fit.validation_loss < entropy.item() + 0.35
    exact = StochasticFlow(flow.base, list(flow.layers), max_paths=1000)
    with torch.no_grad():
        assert -exact().log_prob(x[:500]).mean().item() < fit.validation_loss + 0.1


def test_auto_objectives_and_refusals():
    x = torch.randn(60, 2)
    options = {"max_steps": 2, "progress": False}
    lwta, cif = pf.flows.lwta(2, transforms=1, units=2, **SMALL), pf.flows.cif(2, transforms=1, **SMALL)
    deep = pf.flows.lwta(2, transforms=1, units=2, blocks=3, max_paths=1, **SMALL)
    names = [pf.fit_density(flow, x, **options).loss_name for flow in (lwta, cif, deep)]
    assert names == ["negative log-likelihood", "negative iwae bound", "negative rws bound"]
    for flow, objective, says in (
        (lwta, "elbo", "exact density"),
        (cif, "likelihood", "only a bound"),
        (cif, "rws", "continuous indices"),
        (deep, "dreg", "discrete ones"),
        (deep, "magic", "not known"),
        (pf.flows.realnvp(2), "iwae", "exact density"),
    ):
        with pytest.raises(OptionError, match=says):
            pf.fit_density(flow, x, objective=objective, **options)
    with pytest.raises(OptionError, match="num_particles"):
        pf.fit_density(cif, x, num_particles=0, **options)
    with pytest.raises(OptionError, match="labels need a flow"):
        base = pf.flows.lwta(2, transforms=1, base=GaussianMixture(2, 2), **SMALL)
        pf.fit_density(base, x, labels=torch.zeros(60, dtype=torch.long), **options)
    with pytest.raises(DataError, match="beyond the flow's bound"):
        pf.fit_density(pf.flows.lwta(2, transforms=1, univariate=RationalQuadraticSpline(4), **SMALL), 40 * x, **options)


def test_training_reports_and_revives_dead_units():
    x = torch.randn(500, 2)
    flow = pf.flows.lwta(2, transforms=1, units=4, **SMALL)
    with torch.no_grad():
        flow.layers[0].net[-1].bias[flow.layers[0].rows(1, 0).bias] -= 60.0
    assert flow.usage()[0][0, 1].item() == 0.0
    fit = pf.fit_density(flow, x, max_steps=5, validation=0, progress=False)  # nothing is revived without a validation
    assert any("units that win less than once in 1000 draws: 1 of 4 in layer 0" in w for w in fit.warnings)
    fit = pf.fit_density(flow, x, max_steps=40, progress=False)
    assert not any("units that win" in w for w in fit.warnings)
    assert flow.usage()[0].min().item() > 1e-3


def test_standardized_and_resumed(tmp_path):
    x = torch.randn(400, 2) * torch.tensor([100.0, 0.01]) + torch.tensor([5.0, 3.0])
    flows = [pf.flows.lwta(2, transforms=1, units=2, blocks=3, max_paths=2, **SMALL).standardized(x) for _ in range(2)]
    flows[1].load_state_dict(flows[0].state_dict())
    assert abs(flows[0]().sample((4000,))[:, 0].std().item() / 250 - 1) < 0.5
    options = {"max_steps": 40, "batch_size": 64, "progress": False, "num_particles": 2}
    whole = pf.fit_density(flows[0], x, **options)

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 20:
            raise Stop

    with pytest.raises(Stop):
        pf.fit_density(flows[1], x, checkpoint=tmp_path / "c", callbacks=[stop], **options)
    resumed = pf.fit_density(flows[1], x, checkpoint=tmp_path / "c", **options)
    assert whole.history[-1]["loss"] == resumed.history[-1]["loss"]
    for a, b in zip(flows[0].state_dict().values(), flows[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


# --- bounds at their edges


def test_the_baseline_of_a_path_does_not_see_it():
    """VIMCO's signal where one path has nearly all the weight, and where some are impossible."""
    from pyro_flows.stochastic.bounds import _leave_one_out, log_mean_exp

    inf = float("inf")
    log_weight = torch.tensor([[0.0, 0.0, 0.0], [-50.0, -1.0, -inf], [-60.0, -inf, -inf], [-70.0, -2.0, -inf]], dtype=torch.float64)
    signal = _leave_one_out(log_weight)
    assert signal.isfinite().all()
    for i in range(4):
        others = torch.cat([log_weight[:i], log_weight[i + 1 :]])
        replaced = log_mean_exp(torch.cat([others, others.mean(0, keepdim=True)]))
        expected = log_mean_exp(log_weight) - replaced
        possible = replaced > -inf  # elsewhere any constant is a baseline
        assert torch.allclose(signal[i][possible], expected[possible], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gradient, particles", [("stl", 1), ("dreg", 3)])
def test_the_gradient_of_points_is_counted_once(gradient, particles):
    """The point's own gradient, as of a context that another net makes, is on average that of the bound itself."""
    flow = indexed(1)
    x = torch.tensor([0.7, -0.4], dtype=torch.float64, requires_grad=True)

    def slope(gradient):
        torch.manual_seed(3)
        return torch.autograd.grad(flow().log_prob_bound(x.expand(20000, 2), particles, gradient).mean(), x)[0]

    total = slope("total")
    assert float((slope(gradient) - total).norm()) < 0.1 * float(total.norm())


def test_impossible_paths_weigh_nothing():
    """Over a box some preimages lie outside: the folded sum is that of the listed paths, and bounds and gradients stay numbers."""
    from pyro_flows.distributions import BoxUniform

    layers = [LWTACoupling(2, units=3, **SMALL), LWTACoupling(2, units=3, moved=torch.tensor([False, True]), **SMALL)]
    flow = StochasticFlow(BoxUniform(2, -3.0, 3.0), layers).double()
    x = torch.tensor([[0.0, 0.0], [2.5, 0.0], [2.5, 0.1], [0.0, 2.9]], dtype=torch.float64)
    folded, listed = flow().log_prob(x), flow.list_paths(x).log_prob.logsumexp(-1)
    assert folded.isfinite().all() and torch.allclose(folded, listed, atol=1e-12)
    assert flow().log_prob(x.new_tensor([50.0, 0.0])) == -torch.inf
    bounded = StochasticFlow(flow.base, layers, max_paths=2).double()
    bounded.fit_laws()
    for gradient in ("total", "rws"):
        bound = bounded().log_prob_bound(x, 16, gradient)
        bound.sum().backward()
        assert bound.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in bounded.parameters())
