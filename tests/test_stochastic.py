"""Stochastic flows: densities that integrate to one, inverses that follow the posterior, bounds in their order, and what must fail."""

import copy
import itertools
import pickle

import pytest
import torch
from scipy import stats
from torch import nn

import pyro_flows as pf
from pyro_flows.distributions import BoxUniform, GaussianMixture, StudentT
from pyro_flows.errors import DtypeError, IntractableError, OptionError, ShapeError, SupportError
from pyro_flows.stochastic import ARLWTA, LWTACoupling, StochasticFlow
from pyro_flows.transforms import Coupling, LULinear
from pyro_flows.univariate import Affine, RationalQuadraticSpline

FIRST = torch.tensor([True, False])
SMALL = {"hidden_features": (8,)}


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)


def perturbed(flow, scale=0.4):
    with torch.no_grad():
        for p in flow.parameters():
            p += scale * torch.randn_like(p)
    return flow.eval()


def two_blocks(**options):
    layers = [LWTACoupling(2, 3, moved=FIRST, **SMALL), LWTACoupling(2, 3, moved=~FIRST, **SMALL), Coupling(Affine(), 2, FIRST, **SMALL)]
    return StochasticFlow(2, [*layers, LWTACoupling(2, 2, moved=~FIRST, **SMALL)], **options)


FLOWS = {
    "base": lambda: StochasticFlow(2, [LWTACoupling(2, 4, moved=FIRST, **SMALL), LWTACoupling(2, 4, moved=~FIRST, **SMALL)]),
    "mixed": two_blocks,
    "splines": lambda: StochasticFlow(2, [LWTACoupling(2, 3, RationalQuadraticSpline(4, 3.0), **SMALL), LULinear(2)]),
    "groups": lambda: StochasticFlow(2, [LULinear(2), LWTACoupling(2, 3, moved=FIRST | True, groups=2)]),
    "mixture base": lambda: StochasticFlow(GaussianMixture(2, 3), [LWTACoupling(2, 3, **SMALL)]),
    "ar": lambda: StochasticFlow(2, [ARLWTA(2, 3, order=torch.tensor([1, 0]), **SMALL)]),
    "ar above a map": lambda: StochasticFlow(2, [LULinear(2), ARLWTA(2, 3, **SMALL)]),
}


def grid_mass(density, reach=20.0, points=600):
    line = torch.linspace(-reach, reach, points)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        p = torch.cat([density(part).exp() for part in grid.split(20_000)])
    area = (2 * reach / (points - 1)) ** 2
    return (p.sum() * area).item(), ((p * p).sum() * area).item()


@pytest.mark.parametrize("name", FLOWS)
def test_mass_is_one_and_draws_follow_the_density(name):
    flow = perturbed(FLOWS[name](), 0.1 if name == "mixed" else 0.25)  # there, so that all of the mass is on the grid
    assert flow().exact
    mass, square = grid_mass(flow().log_prob)
    assert mass == pytest.approx(1, abs=1e-4)
    x = flow().sample((20_000,))
    other = flow().sample((20_000,))
    with torch.no_grad():  # E[p(x)] over draws is the integral of p^2, which quadrature knows
        mean, error = flow().log_prob(x).exp().mean(), flow().log_prob(other).exp().std() / 20_000**0.5
    assert abs(mean - square) < 4 * error


def test_a_gate_at_a_common_point_has_another_mass():
    """The classic error, as a control: the activation taken at the point itself instead of each branch's own preimage."""
    layer = perturbed(LWTACoupling(2, 4, moved=FIRST, **SMALL), 0.5)

    def wrong(x):
        kept, moved = layer.split(x)
        params, constants, slopes = layer._conditioned(kept, None)
        z, log_slope = layer.univariate.inverse(moved.unsqueeze(-2) - layer.shift, params)
        gate = layer._log_gate(moved, constants, slopes).mT
        z = torch.cat([z, kept.unsqueeze(-2).expand(*z.shape)], -1)
        base = StochasticFlow(2, [layer]).base()
        return (base.log_prob(z) + gate.squeeze(-1) + log_slope.sum(-1)).logsumexp(-1)

    assert abs(grid_mass(wrong)[0] - 1) > 0.01


@pytest.mark.parametrize("name", FLOWS)
def test_paths_are_brute_force(name):
    """The sum over paths, the folded sum and a loop over all winners agree."""
    flow = perturbed(FLOWS[name]())
    x = flow().sample((6,))
    paths = flow().log_prob_paths(x)
    choices = [list(itertools.product(range(layer.units), repeat=layer.groups)) for layer in flow.stochastic]
    total = []
    for winners in itertools.product(*choices):
        z, log_p = x, 0.0
        given = [torch.tensor(w) for w in winners]
        for layer in reversed(flow.layers):
            if layer in flow.stochastic:
                z, ladj, prior = layer.pull(z, given.pop())
                log_p = log_p + prior
            else:
                z, ladj = layer.inverse_and_ladj(z)
            log_p = log_p + ladj
        total.append(log_p + flow.base().log_prob(z))
    wanted = torch.stack(total).logsumexp(0)
    torch.testing.assert_close(flow().log_prob(x), wanted)
    torch.testing.assert_close(paths.log_prob.logsumexp(-1), wanted)
    torch.testing.assert_close(paths.log_prob.sort(-1).values, torch.stack(total, -1).sort(-1).values)
    back, log_p = flow.push(paths.z, paths.indices)
    torch.testing.assert_close(back, x.unsqueeze(-2).expand_as(back))
    torch.testing.assert_close(log_p, paths.log_prob)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("winners", ["sample", "map"])
def test_inverse_given_the_winners_is_exact(name, winners):
    flow = perturbed(FLOWS[name]())
    x, path = flow().sample_with_path((50,))
    found = flow().inverse(x, winners)
    back, log_p = flow.push(found.z, found.indices)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(log_p, found.log_prob)
    if winners == "map":
        assert bool((found.log_prob >= path.log_prob - 1e-9).all())


@pytest.mark.parametrize("name", FLOWS)
def test_the_most_probable_path_is_that_of_all_layers_together(name):
    flow = perturbed(FLOWS[name](), 1.0)
    x = flow().sample((300,))
    torch.testing.assert_close(flow().inverse(x, "map").log_prob, flow().log_prob_paths(x).log_prob.amax(-1))


def test_no_path_leads_to_a_point_of_density_zero():
    flow = StochasticFlow(BoxUniform(2), [LWTACoupling(2, 2, moved=FIRST, **SMALL), LULinear(2)])
    x = torch.cat([flow().sample((3,)), torch.full((2, 2), 50.0)])
    for winners in ("sample", "map"):
        with pytest.raises(SupportError, match="2 of 5 points have density zero"):
            flow().inverse(x, winners)
        with pytest.raises(SupportError, match="1 of 3 points are not finite"):
            flow().inverse(torch.tensor([[0.0, 0.0], [torch.nan, 0.0], [0.1, 0.1]]), winners)
        assert flow().inverse(x[:3], winners).log_prob.isfinite().all()


def _homogeneity(first, second):
    """p-value that two samples of index rows have the same law."""
    both = torch.cat([first, second])
    _, code = torch.unique(both, dim=0, return_inverse=True)
    counts = torch.stack([code[: len(first)].bincount(minlength=int(code.max()) + 1), code[len(first) :].bincount(minlength=int(code.max()) + 1)])
    counts = counts[:, counts.sum(0) > 20]
    return stats.chi2_contingency(counts.numpy())[1]


@pytest.mark.parametrize("name", ["base", "mixed", "ar", "groups"])
def test_the_stochastic_inverse_has_the_generative_law(name):
    flow = perturbed(FLOWS[name](), 0.3)
    x, path = flow().sample_with_path((20_000,))
    found = flow().inverse(x)
    for i in range(2):
        assert stats.kstest(found.z[:, i].numpy(), "norm")[1] > 1e-3
    assert _homogeneity(torch.cat(found.indices, -1), torch.cat(path.indices, -1)) > 1e-3


def test_a_wrong_inverse_is_noticed():
    """Controls: winners drawn uniformly fail both tests; a posterior without the determinant fails that of the winners."""
    flow = perturbed(FLOWS["base"](), 0.5)
    x, path = flow().sample_with_path((20_000,))
    paths = flow().log_prob_paths(x)
    drawn = torch.cat(path.indices, -1)

    def pick(logits):
        place = torch.distributions.Categorical(logits=logits).sample()
        rows = torch.arange(len(x))
        return paths.z[rows, place], torch.cat([u[rows, place] for u in paths.indices], -1)

    z, winners = pick(torch.zeros_like(paths.log_prob))
    assert stats.kstest(z[:, 0].detach().numpy(), "norm")[1] < 1e-6
    assert _homogeneity(winners, drawn) < 1e-6
    ladj = flow.push(paths.z, paths.indices)[1] - flow.base().log_prob(paths.z)  # log prior - ladj
    prior = sum(layer.push(z_in, u).log_prior for layer, z_in, u in _steps(flow, paths))
    z, winners = pick(flow.base().log_prob(paths.z) + prior)
    assert ladj.shape == prior.shape
    assert _homogeneity(winners, drawn) < 1e-4


def _steps(flow, paths):
    z = paths.z
    for layer, u in zip(flow.stochastic, paths.indices, strict=True):
        yield layer, z, u
        z = layer.push(z, u).value


def test_bounds_stand_in_their_order():
    flow = perturbed(two_blocks())
    bounded = StochasticFlow(flow.base, list(flow.layers), max_paths=1)
    bounded.law_loc += 1.5  # a poor kernel, for gaps that can be seen; fitted below
    assert flow().exact and not bounded().exact and (bounded.num_paths, bounded.listed) == (1, 1)
    assert [StochasticFlow(flow.base, list(flow.layers), max_paths=m).listed for m in (2, 3, 5, 6)] == [1, 3, 3, 4]
    x = flow().sample((3000,))
    with torch.no_grad():
        exact = flow().log_prob(x)
        gaps = [exact - bounded().log_prob_bound(x, m) for m in (1, 10, 100)]
    means, errors = [g.mean().item() for g in gaps], [g.std().item() / len(x) ** 0.5 for g in gaps]
    assert means[0] > means[1] > means[2] > -3 * errors[2]
    assert means[0] > 5 * errors[0] and means[2] < 0.2 * means[0]
    bounded.fit_laws()
    with torch.no_grad():
        assert ((exact - bounded().log_prob_bound(x)).mean()).item() < 0.3 * means[0]
    with torch.no_grad():  # unbiased: the weights average to the density
        weight = bounded().log_prob_bound(x[:20], 20_000) - exact[:20]
    assert weight.abs().max().item() < 0.05


@pytest.mark.parametrize("gradient, particles", [("total", 1), ("total", 4), ("rws", 4)])
def test_a_point_of_density_zero_does_not_spoil_the_bounds_of_others(gradient, particles):
    layers = [LWTACoupling(2, 2, moved=FIRST, **SMALL), LULinear(2), LWTACoupling(2, 2, moved=~FIRST, **SMALL)]
    flow = StochasticFlow(BoxUniform(2), layers, max_paths=1)
    x = torch.cat([flow().sample((3,)), torch.full((1, 2), 50.0)])
    bound = flow().log_prob_bound(x, particles, gradient)
    assert bound[3].item() == -torch.inf
    bound[:3][bound[:3].isfinite()].sum().backward()
    found = [p.grad for p in flow.parameters() if p.grad is not None]
    assert found and all(bool(g.isfinite().all()) for g in found)


@pytest.mark.parametrize("gradient, particles", [("total", 1), ("total", 8), ("rws", 64)])
def test_gradients_of_bounds_with_discrete_indices(gradient, particles):
    """The mean of the estimate against the derivative of the bound itself: of its expectation over all winners, by enumeration."""
    torch.manual_seed(3)
    layer = perturbed(LWTACoupling(2, 2, moved=FIRST, hidden_features=(4,)), 0.6)
    coupling = perturbed(Coupling(Affine(), 2, FIRST, hidden_features=(4,)), 0.5)
    flow = StochasticFlow(2, [coupling, layer], max_paths=1)
    x = flow().sample((4,))
    parameters = list(layer.parameters())
    repeated = x.expand(4000 if gradient == "total" else 1000, 4, 2)
    estimate = torch.autograd.grad(flow().log_prob_bound(repeated, particles, gradient).mean(0).sum(), parameters)
    if gradient == "rws":  # many particles: the density's own gradient
        wanted = torch.autograd.grad(StochasticFlow(2, [coupling, layer])().log_prob(x).sum(), parameters)
    else:
        q = layer.infer(x, None, flow.law(1)).base_dist.logits.squeeze(-2).log_softmax(-1)
        log_p = StochasticFlow(2, [coupling, layer])().log_prob_paths(x).log_prob
        log_w = log_p - q
        value = 0.0
        combos = torch.cartesian_prod(*[torch.arange(2)] * particles).reshape(-1, particles)
        for combo in combos:
            value = value + (q[:, combo].sum(-1).exp() * (log_w[:, combo].logsumexp(-1) - torch.tensor(float(particles)).log())).sum()
        wanted = torch.autograd.grad(value, parameters)
    size = torch.cat([w.reshape(-1) for w in wanted]).norm()
    error = torch.cat([(e - w).reshape(-1) for e, w in zip(estimate, wanted, strict=True)]).norm()
    assert error < 0.08 * size


def test_one_unit_is_a_coupling_to_the_bit():
    coupling = perturbed(Coupling(Affine(), 3, **SMALL))
    layer = LWTACoupling(3, 1, **SMALL)
    layer.net.load_state_dict(coupling.net.state_dict())
    x = torch.randn(10, 3)
    flow = pf.Flow(3, coupling)
    assert torch.equal(StochasticFlow(3, [layer])().log_prob(x), flow().log_prob(x)) or torch.allclose(
        StochasticFlow(3, [layer])().log_prob(x), flow().log_prob(x), atol=1e-15, rtol=0
    )
    assert torch.equal(layer.pull(x, torch.zeros(10, 1, dtype=torch.long)).value, coupling.inverse_and_ladj(x)[0])


def test_constant_gates_are_a_gaussian_mixture():
    layer = perturbed(LWTACoupling(1, 4))
    with torch.no_grad():
        layer.net.bias[-4:] = 0.0  # slopes
    flow = StochasticFlow(1, [layer])
    params, constants, _ = layer._conditioned(torch.zeros(0), None)
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=constants[:, 0]),
        torch.distributions.Normal(params[:, 0, 1] + layer.shift[:, 0], (2 * torch.tanh(params[:, 0, 0] / 2)).exp()),
    )
    x = torch.linspace(-6, 6, 50)
    torch.testing.assert_close(flow().log_prob(x[:, None]), mixture.log_prob(x))


@pytest.mark.parametrize("beta, wanted", [(3.0, 0.164), (10.0, 0.054), (30.0, 0.018)])
def test_isometries_leave_a_gap(beta, wanted):
    """Two shifts by +-1 and a gate of slope beta: what falls into the gap is at most .8 / beta, though no map stretches anything."""
    layer = LWTACoupling(1, 2, spread=1.0)
    with torch.no_grad():
        layer.net.bias[-2:] = torch.tensor([-beta / 2, beta / 2])
    flow = StochasticFlow(1, [layer])
    grid = torch.linspace(-1, 1, 4001)
    with torch.no_grad():
        gap = torch.trapezoid(flow().log_prob(grid[:, None]).exp(), grid)
    assert gap.item() == pytest.approx(wanted, abs=1e-3)
    assert gap.item() < 0.8 / beta


def test_ar_lwta_equals_all_winners_and_is_a_sequence_of_conditionals():
    flow = perturbed(StochasticFlow(3, [ARLWTA(3, 3, **SMALL)]), 0.6)
    assert flow.num_paths == 1 and flow().exact
    x = flow().sample((1000,))
    with torch.no_grad():
        torch.testing.assert_close(flow().log_prob_paths(x[:50]).log_prob.logsumexp(-1), flow().log_prob(x[:50]))
        # probability integral transform of each coordinate given those before it, by summing units' normal distribution functions numerically
        pit = _conditional_distribution(flow, x)
    for i in range(3):
        assert stats.kstest(pit[:, i].numpy(), "uniform")[1] > 1e-3


def _conditional_distribution(flow, x, nodes=200, reach=12.0):
    """F(x_k | x_<k), by quadrature of the factor that belongs to coordinate k."""
    layer, found = flow.layers[0], []
    for k in range(x.shape[-1]):
        steps = torch.linspace(0, 1, nodes)
        moved = x.unsqueeze(-2).repeat(1, nodes, 1)
        moved[..., k] = -reach + (x[:, k, None] + reach) * steps
        z, weight = layer.candidates(moved)
        density = (weight[..., k] + flow.base().base_dist.log_prob(z)[..., k]).logsumexp(-1).exp()
        found.append(torch.trapezoid(density, moved[..., k]))
    return torch.stack(found, -1)


def test_shapes_and_copies():
    flow = perturbed(two_blocks())
    for batch in ((), (3,), (2, 3)):
        x = flow().sample(batch)
        assert x.shape == (*batch, 2)
        assert flow().log_prob(x).shape == batch
        assert flow().log_prob_bound(x, 3).shape == batch
        assert flow().inverse(x).z.shape == (*batch, 2)
    expanded = flow().expand((5,))
    assert expanded.sample((2,)).shape == (2, 5, 2) and expanded.log_prob(torch.zeros(2)).shape == (5,)
    x = torch.randn(7, 2)
    for copied in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        torch.testing.assert_close(copied().log_prob(x), flow().log_prob(x))
    single = copy.deepcopy(flow).float()
    torch.testing.assert_close(single().log_prob(x.float()).double(), flow().log_prob(x), atol=1e-3, rtol=1e-3)
    other = two_blocks()
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other().log_prob(x), flow().log_prob(x))


@pytest.mark.parametrize("make", [lambda: LWTACoupling(2, 3, context_dim=2, **SMALL), lambda: ARLWTA(2, 3, context_dim=2, **SMALL)])
def test_contexts(make):
    flow = perturbed(StochasticFlow(2, [make(), LULinear(2), make()], max_paths=9))
    context = torch.randn(5, 2)
    x = flow(context).sample((3,))
    assert x.shape == (3, 5, 2)
    for i in range(5):
        torch.testing.assert_close(flow(context).log_prob(x)[:, i], flow(context[i]).log_prob(x[:, i]))
    found = flow(context).inverse(x)
    torch.testing.assert_close(flow.push(found.z, found.indices, context)[0], x)
    assert not torch.allclose(flow(context).log_prob(x[0]), flow(-context).log_prob(x[0]))
    flow.fit_laws(100, context)
    flow.usage(100, context)


def test_a_student_base_folds_and_a_mixture_does_not():
    assert StochasticFlow(StudentT(3), [ARLWTA(3, 3, **SMALL)]).folds
    flow = StochasticFlow(GaussianMixture(3, 2), [ARLWTA(3, 3, **SMALL)])
    assert not flow.folds and flow.num_paths == 27


def test_dead_units_are_reported_and_revived():
    for layer in (LWTACoupling(3, 4, groups=2, moved=torch.tensor([True, True, False]), **SMALL), ARLWTA(2, 4, **SMALL)):
        layer = perturbed(layer, 0.3)
        with torch.no_grad():
            for tensor, start in layer._outputs():
                if tensor.dim() == 1:
                    tensor[start + layer.rows(2, 1).bias] -= 60.0
        flow = StochasticFlow(layer.dim, [layer])
        x = flow().sample((500,))
        before = flow().log_prob(x).detach()
        usage = flow.usage()[0]
        assert usage[1, 2].item() == 0.0 and usage[0].min().item() > 0.001
        torch.testing.assert_close(usage.sum(-1), torch.ones(usage.shape[0]))
        assert flow.revive() == 1
        assert flow.usage()[0][1, 2].item() > 0.02
        assert (flow().log_prob(x).detach() - before).abs().mean().item() < 0.1
        assert flow.revive() == 0


def test_what_is_refused():
    flow = two_blocks(max_paths=4)
    with pytest.raises(IntractableError, match="max_paths=4 paths.*log_prob_bound"):
        flow().log_prob(torch.zeros(2))
    with pytest.raises(IntractableError, match="draw them with inverse"):
        flow().log_prob_paths(torch.zeros(2))
    with pytest.raises(IntractableError, match="discrete index has no gradient"):
        flow().rsample()
    with pytest.raises(OptionError, match="continuous indices"):
        flow().log_prob_bound(torch.zeros(2), 4, "dreg")
    with pytest.raises(OptionError, match="gradient='magic'"):
        flow().log_prob_bound(torch.zeros(2), 4, "magic")
    with pytest.raises(OptionError, match="num_particles"):
        flow().log_prob_bound(torch.zeros(2), 0)
    with pytest.raises(OptionError, match="winners must be"):
        flow().inverse(torch.zeros(2), "best")
    with pytest.raises(ShapeError, match="in one dimension move the only coordinate"):
        LWTACoupling(1, 3, moved=torch.tensor([False]))
    with pytest.raises(ShapeError, match="boolean tensor of shape"):
        LWTACoupling(2, 3, moved=torch.tensor([True, False, True]))
    with pytest.raises(OptionError, match="groups"):
        LWTACoupling(4, 3, groups=3)
    with pytest.raises(OptionError, match="units"):
        LWTACoupling(4, 0)
    with pytest.raises(OptionError, match="with one it is Autoregressive"):
        ARLWTA(4, 1)
    with pytest.raises(ShapeError, match="order"):
        ARLWTA(2, 3, order=torch.tensor([0, 0]))
    with pytest.raises(ShapeError, match="differ in size"):
        StochasticFlow(3, [LWTACoupling(2)])
    with pytest.raises(OptionError, match="at least one"):
        StochasticFlow(2, [nn.Linear(2, 2)])
    with pytest.raises(OptionError, match="max_paths"):
        StochasticFlow(2, [LWTACoupling(2)], max_paths=0)
    with pytest.raises(ShapeError, match="expected points"):
        flow().log_prob_bound(torch.zeros(3))
    with pytest.raises(ShapeError, match="takes no context"):
        flow(torch.zeros(2))
    with pytest.raises(DtypeError, match="float"):
        flow().log_prob_bound(torch.zeros(2, dtype=torch.long))
    deep = StochasticFlow(40, [LULinear(40), ARLWTA(40, 3, **SMALL)])
    assert not deep().exact
    with pytest.raises(IntractableError, match="cannot be summed out"):
        deep().log_prob(torch.zeros(40))
    with pytest.raises(OptionError, match="too many to list"):
        deep.layers[1].branches(torch.zeros(40))
    assert deep().log_prob_bound(torch.zeros(40), 5).isfinite()


def test_a_transform_is_a_layer_without_an_index():
    """Wrapped or as it is, a transform gives the same flow; names of parameters are those of the transform."""
    transform = pf.transforms.Affine(2)
    plain = StochasticFlow(2, [LWTACoupling(2, 2, **SMALL), transform])
    wrapped = StochasticFlow(2, [plain.layers[0], pf.stochastic.Deterministic(transform)])
    assert {name for name in plain.state_dict() if name.startswith("layers.1.")} == {f"layers.1.{name}" for name in transform.state_dict()}
    assert [layer.has_index for layer in plain.steps] == [True, False] and len(plain.stochastic) == 1
    x = torch.randn(5, 2)
    assert torch.equal(plain().log_prob(x), wrapped().log_prob(x))
    for flow in (plain, copy.deepcopy(plain)):  # the steps of a copy are its own
        before = flow().log_prob(x)
        with torch.no_grad():
            next(flow.layers[1].parameters()).add_(1.0)
        assert not torch.equal(flow().log_prob(x), before)
    assert torch.equal(plain().log_prob(x), wrapped().log_prob(x))
