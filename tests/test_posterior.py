"""A posterior whose every number is known: the guide is set to the exact answer of a conjugate model."""

from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from pyro_flows import AutoFlow, AutoStochasticFlow, flows
from pyro_flows.diagnostics import khat_limit
from pyro_flows.errors import CheckpointError, ImportanceError, ModelError, OptionError, ShapeError
from pyro_flows.model.log_joint import LogJoint
from pyro_flows.posterior.export import arviz
from pyro_flows.posterior.posterior import Posterior

N = dist.Normal
Y = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
LOC = torch.cat([torch.tensor([0.3], dtype=torch.float64), 0.8 * Y])
SD = torch.tensor([0.5, 0.8**0.5, 0.8**0.5, 0.8**0.5], dtype=torch.float64)
LOG_EVIDENCE = N(torch.zeros(3).double(), 5**0.5).log_prob(Y).sum().item()


def model(y, noise=1.0):
    pyro.sample("a", dist.LogNormal(0.3, 0.5))
    with pyro.plate("group", 3):
        b = pyro.sample("b", N(0.0, 2.0))
        pyro.deterministic("double", 2 * b)
        pyro.sample("y", N(b, noise), obs=y)


@pytest.fixture(autouse=True)
def _fresh():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def fitted(shift=0.0, factor=1.0, target=model, args=(Y,), loc=LOC, sd=SD, **options):
    """The exact posterior, or one that is off by so many standard deviations and by a factor in scale."""
    guide = AutoFlow(target, flow=None, init_scale=1.0).setup(*args)
    guide.standardize.set(loc + shift * sd, (factor * sd).diag())
    return Posterior.from_guide(guide, *args, **options)


@pytest.fixture
def exact():
    return fitted()


# Diagnostics ------------------------------------------------------------------------------------------------------


def test_an_exact_guide_reaches_the_evidence(exact):
    assert exact.elbo.mean == pytest.approx(LOG_EVIDENCE, abs=1e-9)
    assert exact.log_evidence.mean == pytest.approx(LOG_EVIDENCE, abs=1e-9)
    assert exact.ess == pytest.approx(1.0) and exact.khat < 0.7 and exact.verdict == "good"
    assert exact.num_log_density_evaluations == exact.evaluation.num_samples == 10_000
    assert exact.converged and exact.warnings == [] and exact.history == []


def test_a_shifted_guide_is_poor_and_the_reason_names_the_site():
    found = fitted(shift=0.5)
    assert found.verdict == "poor" and found.elbo.mean < LOG_EVIDENCE - 0.4
    assert found.log_evidence.mean == pytest.approx(LOG_EVIDENCE, abs=5 * found.log_evidence.se)
    assert any(name in found.reasons[0] for name in ("mean of a", "mean of b[", "mean of double["))


def test_an_unconverged_fit_of_few_effective_draws_is_poor():
    """A guide that is too wide in every direction has unbiased means and usable weights: only the training knows better."""
    for factor, expected in ((1.0, "good"), (1.6, "poor")):
        found = fitted(factor=factor, converged=False)
        assert found.verdict == expected and any("did not converge" in w for w in found.warnings)
    few = dataclasses.replace(fitted().evaluation, ess=0.15)
    assert few.verdict == "good" and few.unconverged().verdict == "poor" and "15.0%" in few.unconverged().reasons[0]


def test_evaluation_is_seeded_and_leaves_the_random_stream_alone():
    guide = fitted(shift=0.2).guide
    torch.manual_seed(7)
    wanted = torch.rand(2)
    torch.manual_seed(7)
    first, second, other = (Posterior.from_guide(guide, Y, seed=seed) for seed in (1, 1, 2))
    torch.testing.assert_close(torch.rand(2), wanted)
    assert first.elbo == second.elbo != other.elbo


def test_a_guide_that_stock_svi_trained_can_be_judged():
    guide = AutoFlow(model, flow=None).setup(Y)
    before = Posterior.from_guide(guide, Y)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(250):
        svi.step(Y)
    after = Posterior.from_guide(guide, Y)
    assert before.verdict == "poor" and after.verdict in ("good", "usable")
    assert after.elbo.mean == pytest.approx(LOG_EVIDENCE, abs=0.2) and after.log_joint.mode == "vmap"


def test_a_random_density_is_reported_and_refuses_importance():
    def subsampled(y):
        b = pyro.sample("b", N(0.0, 1.0))
        with pyro.plate("rows", 3, subsample_size=2) as rows:
            pyro.sample("y", N(b, 1.0), obs=y[rows])

    guide = AutoFlow(subsampled, flow=None).setup(Y)
    posterior = Posterior.from_guide(guide, Y, num_samples=200)
    assert "'rows'" in posterior.warnings[0]
    with pytest.raises(ImportanceError, match="rows"):
        posterior.get_samples(10, importance=True)


def test_repr_says_what_and_how_good(exact):
    text = repr(exact)
    for part in ("a, b[3]", "4 dimensions", "ELBO", "verdict: good", "several seeds"):
        assert part in text
    assert "still gaining" in repr(fitted(converged=False)) and "beware" in repr(fitted(warnings=["beware"]))


# Draws and densities ----------------------------------------------------------------------------------------------


def test_samples_have_shapes_supports_and_moments(exact):
    samples = exact.get_samples(20_000)
    assert {k: tuple(v.shape) for k, v in samples.items()} == {"a": (20_000,), "b": (20_000, 3), "double": (20_000, 3)}
    assert (samples["a"] > 0).all() and not samples["b"].requires_grad
    torch.testing.assert_close(samples["double"], 2 * samples["b"])
    z = torch.cat([samples["a"].log()[:, None], samples["b"]], 1)
    assert (((z.mean(0) - LOC) / SD).abs() < 5 / 20_000**0.5).all()
    assert ((z.std(0) / SD - 1).abs() < 5 / 40_000**0.5).all()


def test_samples_follow_the_global_seed(exact):
    pyro.set_rng_seed(3)
    first = exact.get_samples(5)["b"]
    assert not torch.equal(first, exact.get_samples(5)["b"])
    pyro.set_rng_seed(3)
    torch.testing.assert_close(exact.get_samples(5)["b"], first)


def test_importance_corrects_a_guide_that_is_off():
    posterior = fitted(shift=0.4, factor=1.2)
    raw, corrected = (posterior.get_samples(8000, importance=flag) for flag in (False, True))
    for name, at, sd in (("b", LOC[1:], SD[1:]), ("a", math.exp(0.3 + 0.125), math.exp(0.425) * (math.exp(0.25) - 1) ** 0.5)):
        assert (((raw[name].mean(0) - at) / sd).abs() > 0.25).all()
        assert (((corrected[name].mean(0) - at) / sd).abs() < 0.08).all()
    assert corrected["double"].shape == (8000, 3)
    torch.testing.assert_close(corrected["double"], 2 * corrected["b"])


def test_importance_is_refused_above_the_khat_limit():
    narrow = fitted(factor=0.35)
    assert narrow.khat > 0.7
    with pytest.raises(ImportanceError, match=rf"k-hat is \d\.\d\d, above the limit of {khat_limit(1000):.2f}.*richer flow"):
        narrow.get_samples(100, importance=True)


def test_bad_numbers_of_samples(exact):
    with pytest.raises(OptionError, match="num_samples"):
        exact.get_samples(0)
    with pytest.raises(OptionError, match="num_samples"):
        Posterior.from_guide(exact.guide, Y, num_samples=1)


def log_prob_by_hand(a, b):
    return dist.LogNormal(0.3, 0.5).log_prob(a) + N(0.8 * Y, 0.8**0.5).log_prob(b).sum(-1)


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_log_prob_is_the_density_in_the_constrained_space(exact, batch):
    a, b = torch.rand(batch) + 0.2, torch.randn(*batch, 3)
    value = exact.log_prob({"a": a, "b": b, "double": 2 * b})
    assert value.shape == batch
    torch.testing.assert_close(value, log_prob_by_hand(a, b))


def test_log_prob_of_draws_and_its_gradient(exact):
    samples = exact.get_samples(10)
    torch.testing.assert_close(exact.log_prob(samples), log_prob_by_hand(samples["a"], samples["b"]))
    a = torch.tensor(1.3, requires_grad=True)
    exact.log_prob({"a": a, "b": torch.zeros(3)}).backward()
    assert a.grad.item() == pytest.approx(-(1 + (math.log(1.3) - 0.3) / 0.25) / 1.3)


def test_log_prob_has_no_nan_at_the_edge_of_the_simplex():
    def model():
        pyro.sample("p", dist.Dirichlet(torch.ones(3)))

    posterior = Posterior.from_guide(AutoFlow(model, flow=None).setup(), num_samples=100)
    log_q = posterior.log_prob({"p": torch.tensor([[0.0, 0.4, 0.6], [0.4, 0.6, 0.0], [0.2, 0.2, 0.6]])})
    assert torch.isneginf(log_q[:2]).all() and torch.isfinite(log_q[2])


def test_log_prob_names_what_is_wrong(exact):
    with pytest.raises(ShapeError, match="'b' is missing"):
        exact.log_prob({"a": torch.ones(3)})
    with pytest.raises(ShapeError, match="'b' has shape"):
        exact.log_prob({"a": torch.ones(4), "b": torch.ones(4, 2)})
    with pytest.raises(ShapeError, match="'b'"):
        exact.log_prob({"a": torch.ones(4), "b": torch.ones(5, 3)})


# Predictive -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_draws_observations_anew(exact, parallel):
    samples = exact.get_samples(1500)
    found = exact.predictive(samples=samples, parallel=parallel)
    assert {k: tuple(v.shape) for k, v in found.items()} == {"double": (1500, 3), "y": (1500, 3)}
    torch.testing.assert_close(found["double"], samples["double"])
    residual = found["y"] - samples["b"]
    assert abs(residual.mean()) < 5 / 4500**0.5 and residual.std() == pytest.approx(1.0, abs=0.06)
    # other arguments: nothing observed, a hundredth of the noise
    quiet = exact.predictive(None, noise=0.01, samples=samples, parallel=parallel)
    assert (quiet["y"] - samples["b"]).std() == pytest.approx(0.01, rel=0.06)


def test_predictive_takes_fresh_draws_and_flat_priors():
    def flat(y):
        b = pyro.sample("b", dist.ImproperUniform(dist.constraints.real, (), ()))
        with pyro.plate("rows", 3):
            pyro.sample("y", N(b, 1.0), obs=y)

    posterior = fitted(target=flat, loc=Y.mean()[None], sd=torch.tensor([3**-0.5]))
    assert posterior.ess == pytest.approx(1.0)  # the exact posterior again
    for parallel in (False, True):
        assert posterior.predictive(num_samples=7, parallel=parallel)["y"].shape == (7, 3)
    with pytest.raises(ModelError, match="flat"):
        posterior.to_arviz("prior", num_samples=5)


def line(x, y=None):
    w = pyro.sample("w", N(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", N((x * w).sum(-1), 1.0), obs=y)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: p.predictive(torch.ones(5, 3)), ModelError, "posterior predictive.*site 'rows'.*arguments"),
        (lambda p: p.predictive(y=None), ModelError, "missing 1 required.*arguments"),
        (lambda p: p.predictive(samples={"v": torch.zeros(3, 2)}), ShapeError, "'w' is missing"),
        (lambda p: p.predictive(samples={"w": torch.zeros(3, 3)}), ShapeError, "'w' has shape"),
        (lambda p: p.predictive(samples={"w": torch.zeros(2)}), ShapeError, "runs"),
    ],
)
def test_predictive_names_what_is_wrong(call, error, words):
    found = fitted(target=line, args=(torch.ones(5, 2), torch.ones(5)), loc=torch.zeros(2), sd=torch.ones(2))
    with pytest.raises(error, match=words) as caught:
        call(found)
    assert "Trace Shapes" not in str(caught.value)


def test_prior_predictive_names_the_site():
    def flat(y):
        mu = pyro.sample("mu", dist.ImproperUniform(dist.constraints.real, (), ()))
        pyro.sample("y", N(mu, 1.0), obs=y)

    def wide(y):
        rate = pyro.sample("rate", N(0.0, 100.0))
        pyro.sample("y", dist.Poisson(rate), obs=y)

    def moving(y):
        x = pyro.sample("x", N(0.0, 1.0))
        pyro.sample("y", N(x, 1.0), obs=y)
        pyro.sample("left" if x < 0 else "right", N(0.0, 1.0), obs=y)

    one = torch.ones(1)
    for target, words in ((flat, "'mu'.*proper prior"), (wide, "'rate'.*[Pp]rior")):
        found = fitted(target=target, args=(torch.tensor(1.0),), loc=one, sd=1e-3 * one)
        with pytest.raises(ModelError, match=words):
            found.to_arviz(predictive="prior", num_samples=30)
    found = fitted(target=moving, args=(torch.tensor(1.0),), loc=0 * one, sd=one)
    with pytest.raises(ModelError, match="'(left|right)' is not the same"):
        found.predictive(num_samples=30)


def test_parallel_predictive_of_an_unsuited_model_says_so(exact):
    def unplated(y):
        b = pyro.sample("b", N(0.0, 1.0))
        pyro.sample("y", N(torch.stack([b, b, b]).reshape(3), 1.0).to_event(1), obs=y)

    posterior = Posterior.from_guide(AutoFlow(unplated, flow=None).setup(Y), Y, num_samples=100)
    with pytest.raises(ModelError, match="parallel=True"):
        posterior.predictive(num_samples=5, parallel=True)
    assert posterior.predictive(num_samples=5)["y"].shape == (5, 3)


# Tables -----------------------------------------------------------------------------------------------------------


def test_summary_is_a_table_under_a_header(exact):
    table = exact.summary()
    assert list(table.index) == ["a", "b[0]", "b[1]", "b[2]", "double[0]", "double[1]", "double[2]"]
    assert {"mean", "sd"} <= set(table.columns)
    assert abs(float(table.loc["b[1]", "mean"]) + 1.6) < 0.08
    text = str(table)
    for part in ("ELBO", "log evidence", "ESS", "100.0% of 10,000", "k-hat", "Verdict: good", "can be used as they are", "b[1]"):
        assert part in text
    assert text == repr(table) and table.attrs["header"] in text
    assert "Verdict" in table._repr_html_() and "<table" in table._repr_html_()
    assert "Verdict" not in repr(table[["mean"]])  # what is computed from it is a plain table
    poor = str(fitted(shift=1.0, warnings=["slow"]).summary(num_samples=50, var_names=["a"]))
    assert "Do not use these draws" in poor and "Warning: slow" in poor and "b[0]" not in poor
    with pytest.raises(OptionError, match="'c'"):
        exact.summary(var_names=["c"])


def test_arviz_groups_and_dimensions(exact):
    data = exact.to_arviz(predictive=("posterior", "prior"), num_samples=200)
    groups = {
        "posterior": {"a": (), "b": ("group",), "double": ("group",)},
        "log_likelihood": {"y": ("group",)},
        "posterior_predictive": {"y": ("group",)},
        "prior": {"a": (), "b": ("group",), "double": ("group",)},
        "prior_predictive": {"y": ("group",)},
    }
    for group, variables in groups.items():
        found = data[group]
        assert {k: v.dims for k, v in found.data_vars.items()} == {k: ("chain", "draw", *d) for k, d in variables.items()}
        assert found["y" if "y" in variables else "a"].shape[:2] == (1, 200)
    assert data["observed_data"]["y"].dims == ("group",)
    np.testing.assert_allclose(data["observed_data"]["y"].values, Y)
    likelihood = N(torch.tensor(data["posterior"]["b"].values), 1.0).log_prob(Y)
    np.testing.assert_allclose(data["log_likelihood"]["y"].values, likelihood)
    gap = data["sample_stats"]["lp"].values - data["sample_stats"]["log_q"].values
    np.testing.assert_allclose(gap, LOG_EVIDENCE, atol=1e-9)
    spread = [float(data[g]["b"].std()) for g in ("prior", "posterior")]
    assert spread[0] > 1.5 > spread[1] + 0.1


def test_arviz_only_what_was_asked_for(exact):
    for asked, wanted in (((), False), (False, False), (True, True), ("posterior", True)):
        data = exact.to_arviz(asked, num_samples=3)
        assert ("posterior_predictive" in _groups(data)) == wanted and "prior" not in _groups(data)
    with pytest.raises(OptionError, match="predictive"):
        exact.to_arviz("future")


def _groups(data):
    names = data.groups() if callable(data.groups) else data.groups
    return {name.strip("/") for name in names}


def test_arviz_nested_plates_events_and_clashing_names():
    def nested(y):
        with pyro.plate("column", 3, dim=-1), pyro.plate("draw", 2, dim=-2):  # ArviZ has a dimension of that name
            theta = pyro.sample("theta", dist.Dirichlet(torch.ones(4)))
            pyro.sample("y", dist.Categorical(theta), obs=y)
        with pyro.plate("two", 2):
            pyro.sample("w", N(torch.zeros(2), 1.0))
        pyro.sample("free", N(torch.zeros(5), 1.0).to_event(1))

    y = torch.tensor([[0, 1, 2], [3, 0, 1]])
    data = Posterior.from_guide(AutoFlow(nested, flow=None).setup(y), y, num_samples=50).to_arviz(num_samples=4)
    dims = {k: v.dims[2:] for k, v in data["posterior"].data_vars.items()}
    assert dims == {"theta": ("draw_plate", "column", "theta_dim_2"), "w": ("two",), "free": ("free_dim_0",)}
    assert data["observed_data"]["y"].dims == ("draw_plate", "column")
    np.testing.assert_allclose(data["posterior"]["theta"].sum("theta_dim_2"), 1.0)


def test_arviz_file_and_back(exact, tmp_path):
    path = tmp_path / "posterior.nc"
    data = exact.to_arviz(num_samples=50)
    data.to_netcdf(path)
    back = arviz().from_netcdf(path)
    np.testing.assert_array_equal(back["posterior"]["b"].values, data["posterior"]["b"].values)
    attributes = back["posterior"].attrs
    assert attributes["verdict"] == "good" and attributes["elbo"] == pytest.approx(LOG_EVIDENCE)


# Figures ----------------------------------------------------------------------------------------------------------


def test_plot_has_its_panels_and_a_file(exact, tmp_path):
    exact.history = [{"stage": s, "step": i, "elbo": -8.0 - 1 / (i + 1)} for s in ("affine", "flow") for i in range(5)]
    path = tmp_path / "posterior.png"
    figure = exact.plot(path, num_samples=500)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[:6] == ["ELBO during training", "Tail of the importance weights", "a", "b[0]", "b[1]", "b[2]"]
    assert titles[6].startswith("Pairs") and len(figure.axes) in (2 + 4 + 3, 2 + 4 + 4)
    assert figure.get_suptitle().startswith("GOOD")
    assert path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 20_000
    lines = figure.axes[0].get_lines()
    assert {line.get_label() for line in lines} == {"affine", "flow", "log evidence"}
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []  # nothing is left in pyplot's state


def test_plot_has_one_axis_of_steps_and_one_khat():
    found = fitted(factor=0.8)
    steps = [("affine", 50), ("affine", 100), ("affine", 50), ("affine", 100), ("flow", 50), ("flow", 70)]
    found.history = [{"stage": stage, "step": step, "elbo": -8.0} for stage, step in steps]
    figure = found.plot(num_samples=500)
    drawn = {line.get_label(): list(line.get_xdata()) for line in figure.axes[0].get_lines()}
    assert drawn["affine"] == [50, 100, 150, 200] and drawn["flow"] == [250, 270]
    words = " ".join([figure.get_suptitle(), *(text.get_text() for text in figure.axes[1].get_legend().get_texts())])
    assert re.findall(r"k-hat (\S+)", words) == [f"{found.khat:.2f}"] * 2


@pytest.mark.parametrize("options", [{"shift": 6.0, "factor": 0.2}, {"factor": 3.0}])
def test_plot_of_a_poor_fit(options):
    figure = fitted(**options).plot(num_samples=200)
    assert figure.get_suptitle().startswith("POOR")


def test_plot_in_one_and_in_many_dimensions():
    def wide(y):
        b = pyro.sample("b", N(torch.zeros(80), 1.0).to_event(1))
        pyro.sample("y", N(b[:3], 1.0).to_event(1), obs=y)

    def single(y):
        pyro.sample("y", N(pyro.sample("b", N(0.0, 1.0)), 1.0), obs=y[0])

    for target, panels in ((wide, 2 + 8 + 4), (single, 2 + 1)):
        posterior = Posterior.from_guide(AutoFlow(target, flow=None).setup(Y), Y, num_samples=100)
        assert len(posterior.plot(num_samples=100).axes) == panels


# Files ------------------------------------------------------------------------------------------------------------


def test_save_and_load(tmp_path):
    guide = AutoFlow(model, flow="nsf", init_scale=0.7).setup(Y)
    with torch.no_grad():
        for parameter in guide.flow.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    posterior = Posterior.from_guide(
        guide,
        Y,
        num_samples=500,
        history=[{"stage": "flow", "step": 50, "elbo": -3.0}],
        warnings=["a note"],
        converged=False,
        timings={"flow": 1.5},
        engines={"flow": "captured"},
        seed=4,
    )
    path = tmp_path / "posterior.pt"
    posterior.save(path)
    assert list(tmp_path.iterdir()) == [path]
    torch.load(path, weights_only=True)
    torch.manual_seed(5)
    wanted = torch.rand(2)
    torch.manual_seed(5)
    back = Posterior.load(path, model, Y)
    torch.testing.assert_close(torch.rand(2), wanted)
    samples = posterior.get_samples(6)
    torch.testing.assert_close(back.log_prob(samples), posterior.log_prob(samples), rtol=0, atol=0)
    assert back.evaluation == posterior.evaluation and back.elbo.se == posterior.elbo.se
    for name in ("history", "warnings", "converged", "timings", "engines", "seed", "num_log_density_evaluations"):
        assert getattr(back, name) == getattr(posterior, name)
    z = torch.randn(3, 4)
    torch.testing.assert_close(back.log_joint(z), posterior.log_joint(z), rtol=0, atol=0)
    back.summary(num_samples=20)


@pytest.mark.parametrize("name", ["lwta", "cif"])
def test_a_stochastic_guide_in_a_file(tmp_path, name):
    guide = AutoStochasticFlow(model, name).setup(Y)
    posterior = Posterior.from_guide(guide, Y, num_samples=100)
    posterior.save(tmp_path / "posterior.pt")
    back = Posterior.load(tmp_path / "posterior.pt", model, Y)
    assert type(back.guide) is AutoStochasticFlow and back.guide.config == {"flow": name, "init_scale": 1.0}
    torch.manual_seed(0)
    wanted = posterior.get_samples(5)
    torch.manual_seed(0)
    for site, value in back.get_samples(5).items():
        torch.testing.assert_close(value, wanted[site], rtol=0, atol=0)


def test_load_keeps_the_dtype(tmp_path):
    """A fit in float64 is read back as one where the default dtype and the data are float32."""
    path = tmp_path / "posterior.pt"
    exact = fitted()
    exact.save(path)
    torch.set_default_dtype(torch.float32)
    back = Posterior.load(path, model, Y.float())
    assert back.get_samples(2)["b"].dtype == torch.float64
    torch.testing.assert_close(back.log_joint(torch.zeros(1, 4, dtype=torch.float64)), exact.log_joint(torch.zeros(1, 4).double()))
    assert torch.get_default_dtype() == torch.float32


def test_a_flow_made_by_hand_needs_its_guide(tmp_path):
    def build(dim):
        return flows.nsf(dim, transforms=1)

    path = tmp_path / "posterior.pt"
    posterior = Posterior.from_guide(AutoFlow(model, flow=build).setup(Y), Y, num_samples=50)
    posterior.save(path)
    with pytest.raises(CheckpointError, match="AutoFlow made in the same way"):
        Posterior.load(path, model, Y)
    back = Posterior.load(path, AutoFlow(model, flow=build), Y)
    samples = posterior.get_samples(4)
    torch.testing.assert_close(back.log_prob(samples), posterior.log_prob(samples))
    with pytest.raises(CheckpointError, match="another flow"):
        Posterior.load(path, AutoFlow(model, flow="nsf"), Y)


def test_bad_files(tmp_path, exact):
    path = tmp_path / "posterior.pt"
    exact.save(path)
    whole = path.read_bytes()
    with pytest.raises(CheckpointError, match="no file"):
        Posterior.load(tmp_path / "nowhere.pt", model, Y)
    for name, content in (("cut.pt", whole[: len(whole) // 2]), ("text.pt", b"hello"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            Posterior.load(tmp_path / name, model, Y)
    for content in ({"weights": torch.zeros(3)}, [1, 2]):
        torch.save(content, tmp_path / "foreign.pt")
        with pytest.raises(CheckpointError, match="not written by Posterior.save"):
            Posterior.load(tmp_path / "foreign.pt", model, Y)
    known = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in known.items() if k != "evaluation"}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="another version"):
        Posterior.load(tmp_path / "old.pt", model, Y)
    with pytest.raises(CheckpointError, match="cannot be written"):
        exact.save(tmp_path / "no" / "folder.pt")

    def other(y):
        pyro.sample("y", N(pyro.sample("c", N(0.0, 1.0)), 1.0), obs=y[0])

    with pytest.raises(CheckpointError, match="another model.*'b'.*'c'"):
        Posterior.load(path, other, Y)


def test_load_wants_the_arguments_of_the_fit(tmp_path):
    path = tmp_path / "posterior.pt"
    found = fitted(target=line, args=(torch.ones(5, 2), torch.arange(5.0) / 3), loc=torch.zeros(2), sd=torch.ones(2))
    found.save(path)
    x, y = found.log_joint.args
    z = torch.randn(3, 2)
    for back in (Posterior.load(path, line, x, y=y), Posterior.load(path, line, y=y.float(), x=x)):
        torch.testing.assert_close(back.log_joint(z), found.log_joint(z), rtol=1e-6, atol=0)
    for args, words in (
        ((), "arguments of the fit.*missing"),
        ((x,), "other arguments.*'y'.*predictive"),
        ((x, y.flip(0)), "other arguments.*'y'"),
        ((x[:4], y[:4]), "other arguments.*'x', 'y'"),
        ((x, y, 1), "arguments of the fit"),
    ):
        with pytest.raises(CheckpointError, match=words):
            Posterior.load(path, line, *args)

    Posterior.from_guide(AutoFlow(model, flow=None).setup(Y), Y, num_samples=50).save(path)
    with pytest.raises(CheckpointError, match="other arguments.*'noise'"):
        Posterior.load(path, model, Y, noise=2.0)
    Posterior.load(path, model, y=Y, noise=1.0)


def test_guide_models_are_unwrapped(exact):
    """``guide.model`` draws initial values at every site; the log joint must not."""
    assert exact.log_joint.model is model
    assert LogJoint(exact.guide.model, exact.guide, (Y,)).mode == "vmap"


def test_heavy_libraries_are_not_imported_with_the_package():
    heavy = "('arviz', 'matplotlib', 'pandas', 'xarray')"
    code = f"import sys, pyro_flows, pyro_flows.posterior.posterior, pyro_flows.cli; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_parallel_draws_of_a_site_that_no_latent_reaches():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8):
            pyro.sample("coin", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})

    posterior = Posterior.from_guide(AutoFlow(model, flow=None).setup(), num_samples=100)
    assert posterior.predictive(num_samples=5, parallel=True)["coin"].shape == (5, 8)
