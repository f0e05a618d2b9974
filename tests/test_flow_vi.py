"""FlowVI end to end: known posteriors and evidences, stopping, interrupts, checkpoints, bad input."""

from __future__ import annotations

import functools
import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from torch.distributions import constraints

import pyro_flows as pf
from pyro_flows.errors import CheckpointError, ConvergenceWarning, DtypeError, ModelError, OptionError, ShapeError, SupportError
from pyro_flows.manifolds import UniformTorus, VonMisesFisher
from pyro_flows.model.log_joint import LogJoint
from pyro_flows.numerics.fingerprint import fingerprint, fingerprints_agree
from pyro_flows.numerics.random import random_state
from pyro_flows.posterior.missed_mass import missed_modes
from pyro_flows.training.checkpoint import Checkpoint
from pyro_flows.training.loop import Loop, Outcome
from pyro_flows.training.plateau import Plateau
from pyro_flows.vi.stages import STAGES
from pyro_flows.vi.warm_start import laplace

Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])
QUICK = {"progress": False, "max_steps": 150, "num_particles": 32, "num_eval": 4000, "flow": None}


def small_flow(dim):
    return pf.flows.realnvp(dim, transforms=2, hidden_features=(16,))


def eight_schools(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def regression(x, y):
    """Conjugate, badly scaled and collinear; flat prior on the intercept's scale-free part."""
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1000.0).to_event(1))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal((x * w.unsqueeze(-2)).sum(-1), 1.0), obs=y)


def skewed():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("z", dist.Normal(x * x, 0.4))


def quietly(vi, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return vi.run(*args, **kwargs)


@pytest.fixture(scope="module")
def schools():
    return quietly(pf.FlowVI(eight_schools, progress=False, max_steps=500, num_eval=10_000), Y, SIGMA)


def test_eight_schools_centred(schools):
    """The funnel: evidence -31.311, means and spreads within a tenth of the reference."""
    assert schools.elbo.mean < -31.311 + 4 * schools.elbo.se
    assert schools.elbo.mean > -31.311 - 0.15
    assert abs(schools.log_evidence.mean + 31.311) < 0.05
    draws = schools.get_samples(20_000)
    reference = {"mu": (4.41, 3.32), "tau": (3.60, 3.18)}
    for site, (mean, sd) in reference.items():
        assert abs(draws[site].mean() - mean) < 0.1 * sd
        assert abs(draws[site].std() / sd - 1) < 0.15
    assert schools.ess > 0.6 and schools.verdict == "good"


def test_conjugate_regression_is_exact():
    torch.manual_seed(1)
    a = torch.randn(200, dtype=torch.float64)
    x = torch.stack([1000 * a, a + 0.01 * torch.randn(200, dtype=torch.float64)], -1)
    y = x @ torch.tensor([0.002, 3.0], dtype=torch.float64) + torch.randn(200, dtype=torch.float64)
    posterior = quietly(pf.FlowVI(regression, **QUICK), x, y)
    precision = x.T @ x + torch.eye(2, dtype=torch.float64) / 1e6
    covariance = torch.linalg.inv(precision)
    mean = covariance @ x.T @ y
    evidence = dist.MultivariateNormal(torch.zeros(200, dtype=torch.float64), torch.eye(200, dtype=torch.float64) + 1e6 * x @ x.T).log_prob(y)
    draws = posterior.get_samples(20_000)["w"]
    assert ((draws.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max() < 0.05
    assert (draws.std(0) / covariance.diagonal().sqrt() - 1).abs().max() < 0.05
    assert abs(posterior.log_evidence.mean - evidence) < 0.02 and posterior.ess > 0.99 and posterior.verdict == "good"
    assert posterior.converged and not posterior.warnings


def test_auto_stops_at_the_affine_layer_when_it_is_enough():
    posterior = quietly(pf.FlowVI(regression, **{**QUICK, "flow": "auto"}), torch.randn(20, 2), torch.randn(20))
    assert {h["stage"] for h in posterior.history} == {"warm start", "affine"}


def test_the_flow_is_trained_when_the_affine_layer_falls_short():
    posterior = quietly(pf.FlowVI(skewed, progress=False, max_steps=600, num_eval=4000))
    affine = [h["elbo"] for h in posterior.history if h["stage"] == "affine"][-1]
    assert posterior.elbo.mean > affine + 0.3
    assert -0.1 < posterior.elbo.mean < 4 * posterior.elbo.se  # the evidence is 0: the model is normalised
    draws = posterior.get_samples(20_000)
    assert abs(draws["z"].mean() - 1) < 0.15 and abs(draws["z"].std() - (2 + 0.16) ** 0.5) < 0.2


def test_never_worse_than_the_affine_stage():
    """A learning rate that ruins the flow: the affine layer is kept, and said so."""
    posterior = quietly(pf.FlowVI(skewed, progress=False, flow=small_flow, max_steps=60, lr=30.0, num_eval=4000))
    affine = [h["elbo"] for h in posterior.history if h["stage"] == "affine"][-1]
    assert posterior.elbo.mean > affine - 0.2
    assert any("affine layer" in w and "is kept" in w for w in posterior.warnings)


def two_heights():
    """Four fifths of the mass at -2, one fifth at 2, and numbers beside."""
    pyro.sample("b", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    m = pyro.sample("m", dist.Normal(0.0, 3.0))
    both = torch.stack([math.log(0.8) + dist.Normal(-2.0, 0.3).log_prob(m), math.log(0.2) + dist.Normal(2.0, 0.3).log_prob(m)])
    pyro.factor("heights", both.logsumexp(0) - dist.Normal(0.0, 3.0).log_prob(m))


def test_a_mode_that_the_warm_start_met_and_the_guide_misses_is_said():
    posterior = quietly(pf.FlowVI(two_heights, progress=False, max_steps=50, num_eval=2000))
    assert posterior.ess > 0.99 and posterior.verdict == "poor"
    assert re.match(r"At least (19|20|21)% of the posterior lies around another mode, with m = (1\.9|2)", posterior.reasons[0])


def test_missed_modes_are_measured():
    """Exactly, by where the guide lies; a guide that draws at a mode misses nothing there, whatever that mode's scale is said to be."""
    shares = {}
    for at in (-2.0, 2.0):
        guide = pf.AutoFlow(two_heights, flow=None).setup()
        loc, other = torch.zeros(2, 4, dtype=guide.loc.dtype)
        loc[3], other[3] = at, -at
        root = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.3]))
        guide.start_at(loc, root)
        log_joint = LogJoint(two_heights, guide)
        found = math.log(0.8 if at < 0 else 0.2)  # of an evidence of 1
        shares[at] = missed_modes(guide, log_joint, [(other, root), (other, 1.3 * root), (loc, root), (loc, 0.3 * root)], found)
    assert missed_modes(guide, log_joint, [(other, root)], found - 2000.0) == [1.0]  # a mass beyond any exponential
    assert shares[-2.0] == pytest.approx([0.2, 0.2, 0.0, 0.0], abs=0.03)
    assert shares[2.0] == pytest.approx([0.8, 0.8, 0.0, 0.0], abs=0.03)


@pytest.mark.parametrize("objective", ["elbo", "iwae", "score", "forward_kl"])  # "path" is every other test's
def test_other_objectives(objective):
    def model():
        pyro.sample("x", dist.Normal(torch.tensor([3.0, -1.0]), torch.tensor([2.0, 0.5])).to_event(1))

    draws = quietly(pf.FlowVI(model, objective=objective, **{**QUICK, "num_particles": 256})).get_samples(20_000)["x"]
    mean, sd = torch.tensor([3.0, -1.0], dtype=draws.dtype), torch.tensor([2.0, 0.5], dtype=draws.dtype)
    slack = 0.4 if objective == "iwae" else 0.1  # the IWAE bound is nearly flat around its optimum
    assert ((draws.mean(0) - mean) / sd).abs().max() < slack
    assert (draws.std(0) / sd - 1).abs().max() < slack


def test_seeded_and_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    quick = {**QUICK, "warm_start": False}
    a, b, c = (quietly(pf.FlowVI(skewed, seed=seed, **quick)).elbo.mean for seed in (3, 3, 4))
    assert a == b != c and torch.equal(before, torch.get_rng_state())
    assert torch.get_default_dtype() == torch.float32


def correlated():
    root = torch.eye(12) + 0.2 * torch.ones(12, 12).tril()
    pyro.sample("x", dist.MultivariateNormal(torch.zeros(12), scale_tril=root))


def test_a_residual_flow_beyond_its_exact_dimension():
    """The guide's density is exact in any dimension, or the posterior says that it is an estimate."""
    options = {**QUICK, "num_particles": 16, "max_steps": 4, "num_eval": 500}
    assert pf.AutoFlow(correlated, flow="residual").setup().inner[0][0].log_det == "exact"
    small = functools.partial(pf.flows.residual, transforms=2, hidden_features=(8,))
    posterior = quietly(pf.FlowVI(correlated, **(options | {"flow": small})))
    assert set(posterior.engines.values()) <= {"eager", "captured"} and posterior.engines["flow"] == "eager"
    assert posterior.log_evidence.mean == pytest.approx(0.0, abs=0.3) and not any("estimate" in w for w in posterior.warnings)

    def estimated(dim):
        flow = small(dim)
        for layer in flow.transform.parts:
            layer.log_det = "estimate"
        return flow

    posterior = quietly(pf.FlowVI(correlated, **(options | {"flow": estimated})))
    assert math.isfinite(posterior.elbo.mean) and any("log_det='exact'" in w for w in posterior.warnings)


def test_float32():
    posterior = quietly(pf.FlowVI(skewed, dtype=torch.float32, **QUICK))
    assert posterior.get_samples(10)["x"].dtype == torch.float32


def test_a_model_that_vmap_refuses_runs_eagerly():
    def model():
        x = pyro.sample("x", dist.Normal(1.0, 2.0))
        if x.item() > 1e6:
            raise RuntimeError

    posterior = quietly(pf.FlowVI(model, progress=False, flow=None, num_particles=4, num_eval=200))
    assert any("vmap" in w for w in posterior.warnings) and abs(posterior.elbo.mean) < 0.2


def test_interrupted_and_resumed_bit_for_bit(tmp_path):
    options = {**QUICK, "flow": small_flow, "max_steps": 300}
    whole = quietly(pf.FlowVI(skewed, **options))
    path = tmp_path / "run.pt"

    def stop(record):
        if record["stage"] == "flow" and record["step"] == 150:
            raise KeyboardInterrupt

    half = quietly(pf.FlowVI(skewed, checkpoint=path, callbacks=[stop], **options))
    assert not half.converged and any("interrupted" in w and "same checkpoint" in w for w in half.warnings) and math.isfinite(half.elbo.mean)
    assert any("interrupted" in w and "same" not in w for w in quietly(pf.FlowVI(skewed, callbacks=[stop], **options)).warnings)
    resumed = quietly(pf.FlowVI(skewed, checkpoint=path, **options))
    assert resumed.elbo == whole.elbo and resumed.history == whole.history
    assert resumed.num_log_density_evaluations == whole.num_log_density_evaluations
    for (name, a), b in zip(whole.guide.state_dict().items(), resumed.guide.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    again = quietly(pf.FlowVI(skewed, checkpoint=path, **options))  # finished: nothing is left to train
    assert again.history == whole.history


@pytest.mark.thorough
def test_more_steps_from_a_checkpoint(tmp_path):
    """While the rate holds, a run does not know its max_steps; a finished one goes on where it ended."""
    options = {**QUICK, "flow": small_flow, "warm_start": False, "num_eval": 1000}
    whole = quietly(pf.FlowVI(skewed, **(options | {"max_steps": 400})))

    def stop(record):
        if record["stage"] == "flow" and record["step"] == 150:
            raise KeyboardInterrupt

    halted = tmp_path / "halted.pt"
    quietly(pf.FlowVI(skewed, checkpoint=halted, callbacks=[stop], **(options | {"max_steps": 300})))
    resumed = quietly(pf.FlowVI(skewed, checkpoint=halted, **(options | {"max_steps": 400})))
    assert resumed.elbo == whole.elbo and resumed.history == whole.history

    ended = tmp_path / "ended.pt"
    short = quietly(pf.FlowVI(skewed, checkpoint=ended, **(options | {"max_steps": 120})))
    longer = quietly(pf.FlowVI(skewed, checkpoint=ended, **(options | {"max_steps": 450})))
    assert longer.history[: len(short.history)] == short.history and longer.history[-1]["step"] > 120
    assert longer.elbo.mean > short.elbo.mean - 0.02
    steps = longer.history[-1]["step"] - short.history[-1]["step"]
    spent = longer.num_log_density_evaluations - short.num_log_density_evaluations
    assert spent == steps * QUICK["num_particles"] + 2 * 4096  # and the comparison with the affine stage, again
    assert quietly(pf.FlowVI(skewed, checkpoint=ended, **(options | {"max_steps": 120}))).history == longer.history
    assert quietly(pf.FlowVI(skewed, checkpoint=ended, **(options | {"max_steps": 460}))).history == longer.history  # too few for a further cycle
    assert torch.load(ended, weights_only=True)["loop"]["counters"]["step"] == longer.history[-1]["step"]  # from which a later run can go on


def test_a_flow_that_has_not_begun_begins_after_a_resume(tmp_path, monkeypatch):
    """The affine layer has had its rounds, however short: more steps are the flow's."""

    def stop(run, bar):
        raise KeyboardInterrupt

    options = {**QUICK, "flow": small_flow, "warm_start": False, "num_eval": 500, "checkpoint": tmp_path / "run.pt"}
    with monkeypatch.context() as patch:
        patch.setitem(STAGES, "flow", stop)
        half = quietly(pf.FlowVI(eight_schools, **(options | {"max_steps": 5})), Y, SIGMA)
    whole = quietly(pf.FlowVI(eight_schools, **(options | {"max_steps": 50})), Y, SIGMA)
    added = whole.history[len(half.history) :]
    assert whole.history[: len(half.history)] == half.history and {record["stage"] for record in added} == {"flow"}


def test_more_rounds_of_an_affine_layer_from_a_checkpoint(tmp_path):
    fits = []
    for max_steps in (20, 200, 200):
        fit = pf.FlowVI(eight_schools, checkpoint=tmp_path / "run.pt", **(QUICK | {"max_steps": max_steps, "warm_start": False}))
        fits.append(quietly(fit, Y, SIGMA))
    assert not fits[0].converged and fits[1].converged and fits[1].elbo.mean > fits[0].elbo.mean
    assert fits[2].history == fits[1].history and len(fits[1].history) > len(fits[0].history)


def test_a_checkpoint_keeps_every_generator(tmp_path):
    state = random_state()
    assert len(state["cuda"]) == torch.cuda.device_count()
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    module, checkpoint = torch.nn.Linear(1, 1), Checkpoint(tmp_path / "run.pt", "FlowVI")
    checkpoint.save(module, {})
    drawn = [torch.rand(3, device=device) for device in devices]
    assert len(checkpoint.load(module)["cuda"]) == torch.cuda.device_count()
    for device, numbers in zip(devices, drawn, strict=True):
        assert torch.equal(torch.rand(3, device=device), numbers)


def test_foreign_and_damaged_checkpoints(tmp_path):
    path = tmp_path / "run.pt"
    quietly(pf.FlowVI(skewed, checkpoint=path, **QUICK))
    with pytest.raises(CheckpointError, match="another model"):
        pf.FlowVI(eight_schools, checkpoint=path, **QUICK).run(Y, SIGMA)
    for other in ({"seed": 1}, {"lr": 1e-3}):
        with pytest.raises(CheckpointError, match="options differ"):
            pf.FlowVI(skewed, checkpoint=path, **(QUICK | other)).run()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="cannot be read"):
        pf.FlowVI(skewed, checkpoint=path, **QUICK).run()
    torch.save({"format": "other"}, path)
    with pytest.raises(CheckpointError, match="not a FlowVI checkpoint"):
        pf.FlowVI(skewed, checkpoint=path, **QUICK).run()
    with pytest.raises(CheckpointError, match="folder"):
        pf.FlowVI(skewed, checkpoint=tmp_path / "missing" / "run.pt")


BAD_DATA = Y.clone().index_fill_(0, torch.tensor([2]), float("nan"))


def no_latents(y):
    pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)


def impossible(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Exponential(x.exp()), obs=y)


def discrete():
    pyro.sample("k", dist.Bernoulli(0.5))


def rows_of(likelihood):
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", likelihood(scale), obs=y)

    return model


directions = rows_of(lambda scale: VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), scale))
compositions = rows_of(lambda scale: dist.Dirichlet(scale * torch.ones(3)))
angles = rows_of(lambda scale: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), UniformTorus(1).expand([2])))


@pytest.mark.parametrize(
    ("model", "args", "error", "words"),
    [
        (no_latents, (Y,), ModelError, "no continuous latent site"),
        (eight_schools, (BAD_DATA, SIGMA), ModelError, "argument 0 has 1 NaN"),
        (eight_schools, (Y, SIGMA / 0), ModelError, "argument 1 has 8 NaN or infinite"),
        (eight_schools, (Y, SIGMA[:5]), ModelError, "model failed.*site 'theta'.*[Cc]heck"),
        (impossible, (-Y,), SupportError, "'y'.*outside the support"),
        (directions, (torch.eye(3) * torch.tensor([1.0, 1.25, 1.0]),), SupportError, r"'y'.*1 of 3 points.*\(1,\), is 0.25 away.*project"),
        (compositions, (torch.tensor([[0.2, 0.3, 0.5], [0.0, 0.4, 0.6]]),), SupportError, r"'y'.*1 of 2 points.*\(1,\).*exactly zero.*clamp_min"),
        (angles, (torch.tensor([[1.0], [4.0]]),), SupportError, r"'y'.*1 of 2 points.*\(1,\), is 0.858 away.*wraps them"),
        (discrete, (), SupportError, "enumerate"),
        (lambda: None, (), ModelError, "no continuous latent site"),
    ],
)
def test_bad_models_and_data(model, args, error, words):
    with pytest.raises(error, match=words):
        pf.FlowVI(model, **QUICK).run(*args)


def test_nan_in_a_keyword_argument_is_named():
    with pytest.raises(ModelError, match="argument 'y'.*first at"):
        pf.FlowVI(eight_schools, **QUICK).run(y=BAD_DATA, sigma=SIGMA)


def test_mixed_dtypes_name_the_remedy():
    weights = torch.randn(3, 3)

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(weights @ x, 1.0).to_event(1), obs=torch.zeros(3))

    with pytest.raises(DtypeError, match=r"flow.double\(\), or choose .*dtype=torch.float32"):
        pf.FlowVI(model, **QUICK).run()
    assert math.isfinite(quietly(pf.FlowVI(model, dtype=torch.float32, **QUICK)).elbo.mean)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"flow": "nsff"}, "flow='nsff'"),
        ({"engine": "warp"}, "engine="),
        ({"objective": "kl"}, "objective="),
        ({"num_particles": 0}, "num_particles"),
        ({"max_steps": 1.5}, "max_steps"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"dtype": torch.int64}, "dtype"),
        ({"affine": "round"}, "affine="),
        ({"guide": object()}, "guide must be an AutoFlow"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(OptionError, match=words):
        pf.FlowVI(skewed, **options)
    with pytest.raises(ModelError, match="callable"):
        pf.FlowVI("model")


def test_typed_errors_are_also_the_builtin_kinds():
    assert issubclass(ShapeError, ValueError) and issubclass(DtypeError, TypeError) and issubclass(OptionError, ValueError)


def test_laplace_keeps_the_collinear_direction():
    """Scales from 1e-3 to 1e3 and a correlation of .9999: the covariance comes back whole."""
    torch.manual_seed(0)
    scale = torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)
    correlation = torch.tensor([[1.0, 0.9999, 0.3], [0.9999, 1.0, 0.3], [0.3, 0.3, 1.0]], dtype=torch.float64)
    covariance = scale[:, None] * correlation * scale
    target = torch.distributions.MultivariateNormal(torch.zeros(3, dtype=torch.float64), covariance)
    step, tril = laplace(target.log_prob, 0.1 * scale)
    torch.testing.assert_close(step, -0.1 * scale, rtol=1e-5, atol=1e-12)
    torch.testing.assert_close((tril @ tril.mT) / covariance, torch.ones(3, 3, dtype=torch.float64), rtol=1e-4, atol=0)


def test_trainer_stops_by_itself_and_keeps_the_best():
    """A quadratic with noise: it stops before the last step, at a state better than where it started."""

    flat, schedule = torch.zeros(1), Plateau(max_steps=20_000, max_lr=0.05, cycles=1)

    def step():
        return Outcome(flat - 3 + 0.1 * torch.randn(1), -((flat - 3) ** 2).item(), 0.5)

    loop = Loop([flat], step, schedule, flat.clone, flat.copy_)
    loop.run(lambda window: None)
    assert schedule.converged and loop.step < 5000 and abs(loop.best.item() - 3) < 0.05


@pytest.mark.parametrize(("slope", "converged"), [(5e-4, False), (0.0, True)])
def test_a_small_spread_is_no_convergence_while_the_elbo_rises(slope, converged):
    """As on the way out of a funnel's neck: the guide matches what it covers, and still gains."""
    steps = iter(range(10_000))

    def step():
        return Outcome(torch.zeros(1), slope * next(steps) + 1e-3 * torch.randn(1).item(), 0.03)

    flat, schedule = torch.zeros(1), Plateau(max_steps=2000, max_lr=0.01)
    Loop([flat], step, schedule, flat.clone, flat.copy_).run(lambda window: None)
    assert schedule.converged == converged


def test_the_affine_layer_goes_on_while_it_gains():
    """From the neck of the funnel, which four rounds do not leave; -32.59 is the best that a Gaussian can do."""
    start = {"mu": torch.tensor(4.4), "tau": torch.tensor(0.03), "theta": torch.full((8,), 4.4)}
    guide = pf.AutoFlow(eight_schools, flow=None, init_scale=0.02, init_loc_fn=init_to_value(values=start))
    posterior = quietly(pf.FlowVI(eight_schools, guide, progress=False, num_eval=4000), Y, SIGMA)
    assert posterior.converged and posterior.elbo.mean > -32.7


def test_improper_and_constrained_sites_fit():
    def model(y):
        loc = pyro.sample("loc", dist.ImproperUniform(constraints.real, (), ()))
        scale = pyro.sample("scale", dist.ImproperUniform(constraints.positive, (), ()))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(loc, scale), obs=y)

    y = torch.tensor([4.0, 5, 6, 7, 8, 9, 10, 11])
    draws = quietly(pf.FlowVI(model, progress=False, max_steps=400, num_eval=4000), y).get_samples(20_000)
    # loc | y is Student-t with n - 2 degrees of freedom under flat priors on loc and scale
    df, n = len(y) - 2, len(y)
    scale = (y.var() * (n - 1) / df / n) ** 0.5
    assert abs(draws["loc"].mean() - y.mean()) < 0.1 * scale
    low, high = torch.quantile(draws["loc"], torch.tensor([0.05, 0.95], dtype=torch.float64))
    assert abs((high - low) / 2 / scale - 1.943) < 0.15


def test_a_checkpoint_of_other_data_is_refused(tmp_path):
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    fit = pf.FlowVI(model, checkpoint=tmp_path / "run.pt", **QUICK)
    quietly(fit, torch.zeros(3))
    with pytest.raises(CheckpointError, match="data"):
        fit.run(torch.ones(3))


def test_fingerprints_do_not_depend_on_how_sums_are_made():
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = fingerprint((x, 2.0), {"y": x[:3]})
    again = fingerprint((x, 2.0), {"y": x[:3]})
    again[0][1]["sums"][0] *= 1 + 1e-13  # as with another number of threads
    assert again != found and fingerprints_agree(again, found, 1e-12)
    one = x.clone()
    one[5] += 1e-3
    for args, kwargs in (((one, 2.0), {"y": x[:3]}), ((x, 2.5), {"y": x[:3]}), ((x, 2.0), {"y": x[:2]}), ((x, 2.0), {})):
        assert not fingerprints_agree(fingerprint(args, kwargs), found, 1e-12)
    gaps = torch.tensor([1.0, float("nan"), 3.0])
    assert fingerprints_agree(fingerprint((gaps,), {}), fingerprint((gaps,), {}), 0.0)


def test_data_that_broadcast_are_refused():
    def plain(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([8]).to_event(1))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def plated(y):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8):
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    for model in (plain, plated):
        quietly(pf.FlowVI(model, **(QUICK | {"max_steps": 1})), Y)
        with pytest.raises(ShapeError, match="'y'"):
            pf.FlowVI(model, **QUICK).run(Y[:, None])


def test_data_beyond_a_support_that_a_latent_sets_are_not_refused():
    def model(y):
        top = pyro.sample("top", dist.LogNormal(4.0, 0.1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Uniform(0.0, top), obs=y)

    init = functools.partial(pf.AutoFlow, model, flow=None, init_loc_fn=init_to_value(values={"top": torch.tensor(60.0)}))
    assert math.isfinite(quietly(pf.FlowVI(model, init(), **QUICK), torch.tensor([1.0, 30.0])).elbo.mean)


def test_a_param_is_held_fixed_and_named():
    def model(y):
        scale = pyro.param("scale", torch.tensor(2.0, dtype=torch.float64))
        pyro.sample("y", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), scale), obs=y)

    assert any("'scale' was held fixed" in w for w in quietly(pf.FlowVI(model, **QUICK), torch.tensor(1.0)).warnings)


@pytest.mark.thorough
def test_an_interrupted_flow_is_not_worse_than_its_affine_layer():
    def stop(record):
        if record["stage"] == "flow":
            raise KeyboardInterrupt

    options = {**QUICK, "flow": small_flow, "lr": 30.0}
    affine = quietly(pf.FlowVI(skewed, **(QUICK | {"flow": None})))
    halted = quietly(pf.FlowVI(skewed, callbacks=[stop], **options))
    assert halted.elbo.mean > affine.elbo.mean - 4 * (halted.elbo.se + affine.elbo.se)
