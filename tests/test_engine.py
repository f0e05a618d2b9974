"""The captured step: every engine computes the same numbers, and falls back with a reason."""

from __future__ import annotations

import gc
import logging
import os
import pathlib
import time
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_value
from zoo import ZOO, perturbed

import pyro_flows as pf
from pyro_flows.errors import CaptureError, OptionError
from pyro_flows.model.log_joint import LogJoint
from pyro_flows.training import engine as engine_module
from pyro_flows.training.engine import prepare
from pyro_flows.vi.flat_flow import FlatFlow
from pyro_flows.vi.objectives import OBJECTIVES, Path, build_step, find_objective
from pyro_flows.vi.scores import push_score

Y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12], dtype=torch.float64)
SIGMA = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18], dtype=torch.float64)


def eight_schools(y=Y, sigma=SIGMA):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


def branching():
    x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    scale = 1.0 if x[0].item() > 0 else 2.0
    pyro.sample("y", dist.Normal(x[1], scale), obs=torch.tensor(0.5))


def small():
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 0.5), obs=torch.tensor(1.0))


def step_of(objective, flat_flow, log_joint):
    """The step as a function of parameters and noise, at the posterior's full power."""
    step = build_step(find_objective(objective), flat_flow, log_joint)
    return lambda flat, noise: step(flat, noise, torch.ones((), dtype=flat.dtype))


def make_step(model, flow="auto", objective="path", particles=16, **options):
    torch.set_default_dtype(torch.float64)
    guide = pf.AutoFlow(model, flow=flow, **options).setup()
    with torch.no_grad():
        for p in guide.flow.parameters():
            p.add_(0.05 * torch.randn_like(p))
    log_joint = LogJoint(model, guide)
    flat_flow = FlatFlow(guide.flow)
    example = (flat_flow.read(), guide.flow.base().sample((particles,)))
    return guide, log_joint, flat_flow, step_of(objective, flat_flow, log_joint), example


@pytest.mark.parametrize(("objective", "flow"), [("path", "auto"), ("elbo", None), ("iwae", None), ("score", None), ("forward_kl", None)])
def test_captured_equals_eager(objective, flow):
    assert objective in OBJECTIVES
    _, _, _, step, example = make_step(eight_schools, flow, objective)
    captured = prepare(step, example, "captured", 100)
    assert captured.name == "captured"
    fresh = (example[0] + 0.01 * torch.randn_like(example[0]), torch.randn_like(example[1]))
    for a, b in zip(captured(*fresh), step(*fresh), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_score_and_the_path_have_one_mean():
    """Two estimates of one gradient, from many draws."""
    gradients = {}
    for objective in ("path", "score"):
        torch.manual_seed(0)
        flat_flow = FlatFlow(pf.Flow(2, pf.transforms.Affine(2)))
        flat = flat_flow.read() + 0.1
        step = step_of(objective, flat_flow, lambda x: -0.5 * (x - 0.3).square().sum(-1))
        gradients[objective] = step(flat, torch.randn(200_000, 2))[0]
    assert gradients["path"].abs().min() > 0.1
    torch.testing.assert_close(gradients["score"], gradients["path"], atol=0.01, rtol=0.02)


@pytest.mark.thorough
@pytest.mark.skipif(not engine_module._has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager():
    _, _, _, step, example = make_step(small, flow=None)
    compiled = prepare(step, example, "compiled", 100)
    assert compiled.name == "compiled" and compiled.seconds > 0
    fresh = (example[0] + 0.01, torch.randn_like(example[1]))
    for a, b in zip(compiled(*fresh), step(*fresh), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_the_step_is_the_path_gradient():
    """Against the definition, with autograd on the modules themselves and one particle at a time."""
    guide, log_joint, flat_flow, step, (flat, noise) = make_step(eight_schools, particles=4)
    rows = []
    for e in noise:
        x = guide.flow.transform.forward_and_ladj(e[None])[0].detach().requires_grad_()
        gap = guide.flow().log_prob(x)[0] - log_joint(x)[0]
        rows.append(torch.autograd.grad(gap, x)[0][0])
    rows = torch.stack(rows)
    norms = rows.norm(dim=-1)
    rows = rows * (10 * norms.median() / norms).clamp(max=1.0)[:, None] / len(noise)
    x = guide.flow.transform.forward_and_ladj(noise)[0]
    gradients = torch.autograd.grad((x * rows).sum(), list(guide.flow.transform.parameters()), allow_unused=True, materialize_grads=True)
    learned, fixed = step(flat, noise)[0].split([sum(g.numel() for g in gradients), 110])
    torch.testing.assert_close(learned, torch.cat([g.reshape(-1) for g in gradients]), rtol=1e-8, atol=1e-10)
    assert (fixed == 0).all()  # the location and scale that whiten ride along, and are not learned


def test_a_captured_graph_follows_the_whitening():
    """The affine stage folds its layer into the fixed one and goes on with the same graph."""
    guide, _, flat_flow, step, (_, noise) = make_step(small, flow=None)
    captured = prepare(step, (flat_flow.read(), noise), "captured", 100)
    guide.standardize.set(torch.tensor([3.0, -2.0]), torch.tensor([[2.0, 0.0], [0.5, 1.5]]))
    for a, b in zip(captured(flat_flow.read(), noise), step(flat_flow.read(), noise), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_path_and_total_gradient_agree_on_average():
    """Both are unbiased: at a fixed guide their means over many draws are the same."""
    torch.manual_seed(3)
    _, log_joint, flat_flow, path, (flat, _) = make_step(eight_schools, flow=None, particles=8192)
    total = step_of("elbo", flat_flow, log_joint)
    with torch.no_grad():
        noise = torch.randn(8192, 10)
        a = torch.stack([path(flat, n)[0] for n in noise.chunk(32)])
        b = torch.stack([total(flat, n)[0] for n in noise.chunk(32)])
    error = ((a.var(0) + b.var(0)) / 32).sqrt()
    z = (a.mean(0) - b.mean(0))[error > 0] / error[error > 0]
    assert z.abs().max() < 4.5


def test_non_finite_particles_are_dropped_and_counted():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        pyro.factor("cliff", torch.where(x[0] > 0, torch.full_like(x[0], torch.nan), -x[0]))

    start = init_to_value(values={"x": torch.zeros(2)})
    _, _, _, step, (flat, noise) = make_step(model, flow=None, init_loc_fn=start)
    gradient, elbo, spread, dropped = step(flat, noise)
    assert 0 < int(dropped) < len(noise)
    assert torch.isfinite(gradient).all() and torch.isfinite(elbo) and torch.isfinite(spread)


def test_auto_falls_back_to_eager_and_says_why(caplog):
    _, log_joint, _, step, example = make_step(branching, flow=None)
    assert log_joint.mode == "loop"
    with caplog.at_level(logging.WARNING, "pyro_flows"):
        engine = prepare(step, example, "auto", 100, log_joint.reason)
    assert engine.name == "eager" and "vmap refused" in engine.reason and "vmap refused" in caplog.text
    with pytest.raises(CaptureError, match="vmap refused"):
        prepare(step, example, "captured", 100, log_joint.reason)


def test_auto_without_a_compiler_says_so_and_stays_captured(monkeypatch, caplog):
    _, _, _, step, example = make_step(eight_schools, flow=None)
    monkeypatch.setattr(engine_module, "_has_compiler", lambda: False)
    with caplog.at_level(logging.INFO, "pyro_flows"):
        engine = prepare(step, example, "auto", 10**9)
    assert engine.name == "captured" and "no C++ compiler" in engine.reason and "no C++ compiler" in caplog.text


def test_auto_does_not_compile_short_runs():
    _, _, _, step, example = make_step(eight_schools, flow=None)
    assert prepare(step, example, "auto", 100).name == "captured"


def test_captured_is_faster_than_eager():
    _, _, _, step, example = make_step(eight_schools)
    captured = prepare(step, example, "captured", 100)

    def seconds(run):
        times = []
        for _ in range(5):
            start = time.process_time()
            run(*example)
            times.append(time.process_time() - start)
        return min(times)

    with torch.no_grad():
        assert seconds(captured) < seconds(step) / 2


@pytest.mark.parametrize("engine", ["fast", "", "Compiled"])
def test_unknown_engine(engine):
    with pytest.raises(OptionError, match="engine="):
        prepare(lambda x: (x,), (torch.zeros(1),), engine, 1)


def test_unknown_objective_and_bad_particle_count():
    for name in ("kl", "summed path"):  # the latter is for stochastic flows, whose guides name it
        with pytest.raises(OptionError, match="objective="):
            pf.FlowVI(eight_schools, objective=name)
    with pytest.raises(OptionError, match="multiple of 8"):
        pf.FlowVI(eight_schools, objective="iwae", num_particles=12)


def test_an_objective_of_ones_own():
    """An object with the methods of an Objective is taken as it is: this one counts, and is as good as the path gradient."""

    @dataclass(frozen=True)
    class Mine(Path):
        name: str = "mine"
        calls: list = field(default_factory=list)

        def validate(self, num_particles):
            self.calls.append(num_particles)

    mine = Mine()
    fits = [pf.FlowVI(small, objective=o, flow=None, progress=False, max_steps=60, num_eval=500).run() for o in (mine, "path")]
    assert fits[0].history == fits[1].history and mine.calls == [64, 128]


@pytest.mark.parametrize("case", [c for c in ZOO if not c.context_dim], ids=lambda c: c.id)
def test_the_pushed_score_is_the_gradient_of_the_density(case):
    """The gradient of log q at the flow's own draws, against autograd through the inverse; both in float64, at perturbed parameters."""
    transform, noise = perturbed(case).eval(), case.points(6)
    x, ladj, score = push_score(transform, noise, -noise)
    y, forward_ladj = transform.forward_and_ladj(noise)
    point = y.detach().requires_grad_()
    z, inverse_ladj = transform.inverse_and_ladj(point)
    (expected,) = torch.autograd.grad((inverse_ladj - 0.5 * z.square().sum(-1)).sum(), point)
    for a, b in ((x, y), (ladj, forward_ladj), (score, expected)):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("direction", ["density", "sampling"])
@pytest.mark.parametrize("log_det", ["exact", "estimate"])
def test_the_path_gradient_of_layers_with_fixed_points(direction, log_det):
    """Against plain autograd, with the density's parameters held fixed; an estimated log-det gives it on average."""
    torch.manual_seed(0)
    flow = pf.flows.residual(9, transforms=2, hidden_features=(8,), direction=direction, lipschitz=0.5).double()
    for layer in flow.transform.parts:
        layer.log_det = log_det
    flat_flow = FlatFlow(flow)
    flat_flow.write(flat_flow.read() + 0.3 * torch.randn(len(flat_flow.read()), dtype=torch.float64))
    noise = torch.randn(8, 9, dtype=torch.float64)
    step = step_of("path", flat_flow, lambda x: -1.5 * x.square().sum(-1))
    gradient = step(flat_flow.read(), noise)[0]

    for layer in flow.transform.parts:
        layer.log_det = "exact"
    x = flow.transform(noise)
    point = x.detach().requires_grad_()
    (slope,) = torch.autograd.grad((flow().log_prob(point) + 1.5 * point.square().sum(-1)).sum(), point)
    expected = torch.autograd.grad((x * slope).sum() / 8, [p for _, p in flow.transform.named_parameters()])
    error = (gradient - torch.cat([e.flatten() for e in expected])).norm() / gradient.norm()
    assert error < (1e-8 if log_det == "exact" else 0.3)


def test_lost_particles_do_not_look_like_progress():
    def cliff(x):
        return torch.where(x[:, 0] > 0, -torch.inf, -x.square().sum(-1))

    flat_flow = FlatFlow(pf.Flow(2, pf.transforms.Affine(2)))
    step, noise = step_of("path", flat_flow, cliff), torch.randn(8, 2)
    elbos = []
    for lost in (0, 3, 8):
        noise[:, 0] = -noise[:, 0].abs()
        noise[:lost, 0] *= -1
        gradient, elbo, spread, dropped = step(flat_flow.read(), noise)
        assert int(dropped) == lost and torch.isfinite(gradient).all() and bool(gradient.any()) == (lost < 8)
        elbos.append(float(elbo))
    assert elbos[0] > elbos[1] > elbos[2] == -torch.inf and spread == torch.inf


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_draw_without_a_density_does_not_spoil_the_gradient(objective):
    """Leaving out the draws whose value and slope are not numbers gives the gradient of the others alone."""
    torch.set_default_dtype(torch.float64)

    def broken(x):
        return -1.5 * x.square().sum(-1) + 0 * (1 - x[..., 0]).sqrt()

    flat_flow = FlatFlow(pf.Flow(2, pf.transforms.Affine(2)))
    flat, noise = flat_flow.read(), torch.randn(16, 2)
    noise[::2, 0] = noise[::2, 0].abs() + 1.1
    noise[1::2, 0] = -noise[1::2, 0].abs()
    found = step_of(objective, flat_flow, broken)(flat, noise)
    assert int(found[3]) == 8 and found[0].isfinite().all()
    if objective != "iwae":  # there a group of eight has half as many weights
        alone = step_of(objective, flat_flow, broken)(flat, noise[1::2])
        torch.testing.assert_close(found[0], alone[0])


@pytest.mark.skipif(not pathlib.Path("/proc/self/statm").exists(), reason="reads this process's memory from /proc")
def test_a_captured_step_is_freed_with_its_data():
    """TorchScript's own tracing registers each function for good, the data that its graph holds included."""

    def resident():
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def capture():
        data = torch.ones(2**22)  # 16 MiB
        run = prepare(lambda x: ((x * data).sum(),), (torch.ones(1),), "captured", 1).run
        assert not isinstance(run, torch.fx.GraphModule)
        run(torch.ones(1))

    capture()
    before = resident()
    for _ in range(6):
        capture()
        gc.collect()
    assert resident() - before < 48
