"""Maximum likelihood and distillation: known answers, the same numbers after an interrupt or over processes, and refusals before any work."""

from __future__ import annotations

import copy
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_flows as pf
from pyro_flows.distributions import BoxUniform, GaussianMixture, Resampled, StudentT
from pyro_flows.errors import CheckpointError, ConvergenceWarning, DataError, DtypeError, OptionError, ShapeError, SupportError, TrainingError
from pyro_flows.manifolds import RiemannianContinuousFlow, Sphere, Torus, Uniform
from pyro_flows.training.cosine import Cosine
from pyro_flows.transforms import Affine, Compose, TriangularLinear

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

from benchmarks.toys import TOYS

QUICK = {"max_steps": 60, "batch_size": 64, "progress": False}
TRUE = dist.MultivariateNormal(torch.tensor([2.0, -1.0]), scale_tril=torch.tensor([[1.5, 0.0], [-0.8, 0.5]]))


def small(context_dim: int = 0, **options) -> pf.Flow:
    torch.manual_seed(3)
    return pf.flows.realnvp(2, context_dim, transforms=2, hidden_features=(8,), **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# --- what it finds


def test_a_normal_is_found():
    """An affine flow fitted to all rows ends at the maximum likelihood estimate, which is the sample's mean and covariance."""
    x = TRUE.sample((2000,)).double()
    flow = pf.Flow(2, TriangularLinear(2)).double()
    fit = pf.fit_density(flow, x, validation=0.0, max_steps=600, batch_size=2000, lr=0.1, progress=False)
    weight = flow.transform.weight().detach()
    torch.testing.assert_close(flow.transform.shift.detach(), x.mean(0), rtol=0, atol=1e-3)
    torch.testing.assert_close(weight @ weight.T, x.T.cov(correction=0), rtol=0, atol=1e-3)
    assert math.isnan(fit.validation_loss) and fit.best_step == 600 and fit.held_out is None
    assert fit.history[-1]["loss"] == pytest.approx(-flow().log_prob(x).mean().item(), abs=1e-3)


def test_a_conditional_density_is_found():
    context = torch.randn(4000, 1)
    x = torch.cat([3 * context, -context], -1) + torch.randn(4000, 2) * torch.tensor([0.5, 2.0])
    fit = pf.fit_density(small(1), x, context, max_steps=400, lr=1e-2, progress=False)
    entropy = 2 * 0.5 * math.log(2 * math.pi * math.e) + math.log(0.5 * 2.0)
    assert entropy - 0.1 < fit.validation_loss < entropy + 0.15
    drawn = fit.flow(torch.tensor([[1.0], [-1.0]])).sample((4000,))
    torch.testing.assert_close(drawn.mean(0), torch.tensor([[3.0, -1.0], [-3.0, 1.0]]), rtol=0, atol=0.4)


def test_the_best_state_is_kept_and_training_stops_early():
    torch.manual_seed(0)
    x = torch.randn(60, 2)  # few rows, a large net: it overfits
    flow = pf.flows.maf(2, transforms=2, hidden_features=(64, 64))
    fit = pf.fit_density(flow, x, validation=0.3, max_steps=5000, patience=100, lr=1e-2, progress=False)
    validations = [h["validation"] for h in fit.history]
    assert fit.steps < 1000 and fit.best_step < fit.steps and fit.converged
    assert fit.validation_loss == min(validations) < validations[-1] - 0.1
    assert -flow().log_prob(fit.held_out.x).mean().item() == pytest.approx(fit.validation_loss, abs=1e-5)
    assert not flow.training


@pytest.mark.parametrize("name", ("student", "mixture", "resampled"))
def test_bases_learn(name):
    """Data that no normal can be: the base alone, under an affine layer, gains on it."""
    torch.manual_seed(0)
    x = {
        "student": lambda: dist.StudentT(2.0).sample((3000, 2)),
        "mixture": lambda: torch.randn(3000, 2) * 0.3 + torch.tensor([-2.0, 2.0])[torch.randint(2, (3000,))][:, None].expand(-1, 2),
        "resampled": lambda: (lambda z: z[z[:, 0].abs() > 0.7])(torch.randn(6000, 2)),
    }[name]()
    base = {
        "student": lambda: StudentT(2, 10.0, trainable=True),
        "mixture": lambda: GaussianMixture(2, 2, torch.tensor([[-1.0, 0.0], [1.0, 0.0]])),
        "resampled": lambda: Resampled(2, 20, (32,), 1024),
    }[name]()
    options = {"max_steps": 300, "lr": 2e-2, "progress": False}
    plain = pf.fit_density(pf.Flow(2, Affine(2)), x, **options).validation_loss
    fit = pf.fit_density(pf.Flow(base, Affine(2)), x, **options)
    print(name, plain, fit.validation_loss)
    assert fit.validation_loss < plain - 0.3
    if name == "student":
        assert ((base.log_df.exp() > 1.2) & (base.log_df.exp() < 4.0)).all()
    if name == "resampled":  # rows that are not there have density near nothing, and the density is one
        assert fit.flow().log_prob(torch.tensor([0.0, 0.0])) < -4.0
        fresh = base.log_normalizer(torch.randn(2**16, 2))
        assert base.log_normalizer().item() == pytest.approx(fresh.item(), abs=0.03)


@pytest.mark.parametrize("labelled", (1.0, 0.1))
def test_flow_gmm_learns_classes(labelled):
    torch.manual_seed(0)
    side = torch.rand(2000) < 0.5
    u = torch.stack([side.float() * 0.6, torch.rand(2000), *torch.rand(2, 2000)], -1)
    x = TOYS["moons"].centre(u) + 0.2 * torch.randn(2000, 2)
    labels = torch.where(torch.rand(2000) < labelled, side.long(), torch.tensor(-1))
    flow = pf.flows.flow_gmm(2, 2, transforms=4, hidden_features=(32,))
    pf.fit_density(flow, x, labels=labels, max_steps=400, lr=1e-2, progress=False)
    with torch.no_grad():
        guess = flow.base.component_log_prob(flow.transform.inv(x)).argmax(-1)
    accuracy = (guess == side).float().mean().item()
    print(labelled, accuracy)
    assert accuracy > (0.97 if labelled == 1.0 else 0.85)


# Uniform targets: whether points lie inside, and the area.
UNIFORM = {
    "annulus": (lambda x: (x.norm(dim=-1) - 1.5).abs() <= 0.5 + 1e-6, 3 * math.pi),
    "two squares": (lambda x: ((x[:, 0].abs() - 2).abs() <= 1 + 1e-6) & (x[:, 1].abs() <= 1 + 1e-6), 8.0),
}


@pytest.mark.parametrize("name", TOYS)
def test_toys_have_the_entropy_they_say(name):
    toy = TOYS[name]
    x = toy.sample(4000)
    assert x.shape == (4000, 2) and x.abs().max() < 5
    if toy.noise:
        surprise = -toy.log_prob(x, 2**13)
        assert surprise.mean().item() == pytest.approx(toy.entropy, abs=4 * surprise.std().item() / 4000**0.5)
    elif name in UNIFORM:
        inside, area = UNIFORM[name]
        assert inside(x).all() and toy.entropy == pytest.approx(math.log(area))
        assert (x > 0).all(-1).float().mean().item() == pytest.approx(0.25, abs=0.03)  # symmetric about both axes
    else:  # the checkerboard: eight squares of side 2, equally full
        cells = ((x + 4) / 2).floor().long()
        assert ((cells.sum(-1) % 2) == 0).all() or ((cells.sum(-1) % 2) == 1).all()
        assert torch.bincount(cells[:, 0] * 4 + cells[:, 1]).gt(400).sum() == 8


def test_distilling_a_maf_into_an_iaf():
    torch.manual_seed(0)
    x = TRUE.sample((2000,))
    x = torch.stack([x[:, 0], x[:, 1] + 0.3 * x[:, 0] ** 2], -1)
    teacher = pf.flows.maf(2, transforms=2, hidden_features=(32,))
    student = pf.flows.iaf(2, transforms=3, hidden_features=(32,))
    pf.fit_density(teacher, x, max_steps=300, lr=1e-2, progress=False)
    before = copy.deepcopy(teacher)
    fit = pf.distill(teacher, student, max_steps=400, lr=1e-2, progress=False)
    assert same(teacher, before) and all(p.requires_grad and p.grad is None for p in teacher.parameters())
    assert fit.history[0]["validation"] > 0.5 and 0 <= fit.validation_loss < 0.03
    drawn, wanted = student().sample((4000,)), teacher().sample((4000,))
    torch.testing.assert_close(drawn.mean(0), wanted.mean(0), rtol=0, atol=0.2)
    assert "KL(student || teacher)" in repr(fit)
    with torch.no_grad():  # the other divergence, by draws of the teacher
        assert (teacher().log_prob(wanted) - student().log_prob(wanted)).mean() < 0.1


def test_distilling_at_contexts():
    teacher, student = pf.flows.maf(2, 1, transforms=1), pf.flows.iaf(2, 1, transforms=1)
    with torch.no_grad():
        for p in teacher.parameters():
            p += 0.2 * torch.randn_like(p)
    fit = pf.distill(teacher, student, np.random.default_rng(0).normal(size=(40, 1)), max_steps=100, batch_size=64, lr=1e-2, progress=False)
    assert fit.validation_loss < 0.5 * fit.history[0]["validation"]


# --- data types


def test_mixed_data_types():
    x = TRUE.sample((200,))
    losses = []
    for value in (x, x.double(), x.numpy(), x.double().numpy(), x.tolist(), x.clone().requires_grad_()):
        losses.append(pf.fit_density(small(), value, **QUICK).validation_loss)
    assert losses == [losses[0]] * len(losses)
    fit = pf.fit_density(small(1).double(), x, x[:, :1].numpy(), **QUICK)
    assert fit.held_out.x.dtype == fit.held_out.context.dtype == torch.float64


# --- repeatable, resumable, interruptible


def test_the_seed_decides_and_the_global_state_is_left_alone():
    x = TRUE.sample((300,))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    flows = [small() for _ in range(3)]
    torch.manual_seed(5)
    for flow, seed in zip(flows, (0, 0, 1), strict=True):
        pf.fit_density(flow, x, seed=seed, **QUICK)
    assert torch.equal(torch.rand(3), expected)
    assert same(flows[0], flows[1]) and not same(flows[0], flows[2])


@pytest.mark.parametrize("make", (small, lambda: pf.Flow(Resampled(2, 5, (8,), 64), Affine(2))), ids=("flow", "resampled"))
def test_resuming_is_bit_for_bit(tmp_path, make):
    x = TRUE.sample((300,))
    torch.manual_seed(1)
    whole, half = make(), None
    half = copy.deepcopy(whole)
    resumed = copy.deepcopy(whole)
    fit = pf.fit_density(whole, x, **QUICK)

    def stop(record):
        if record["step"] == 40:
            raise KeyboardInterrupt

    path = tmp_path / "fit.pt"
    with pytest.warns(ConvergenceWarning, match="interrupted"):
        cut = pf.fit_density(half, x, checkpoint=path, callbacks=[stop], **QUICK)
    assert not cut.converged and cut.steps == 40 and cut.validation_loss == min(h["validation"] for h in cut.history)
    again = pf.fit_density(resumed, x, checkpoint=path, **QUICK)
    assert same(resumed, whole) and not same(half, whole)
    assert str(again.history) == str(fit.history) and again.validation_loss == fit.validation_loss
    done = pf.fit_density(half, x, checkpoint=path, **QUICK)  # finished: nothing is left to train
    assert same(half, whole) and str(done.history) == str(fit.history)


def test_foreign_checkpoints_are_refused(tmp_path):
    x, path = TRUE.sample((300,)), tmp_path / "fit.pt"
    pf.fit_density(small(), x, checkpoint=path, **QUICK)
    flow = small()
    for call in (
        lambda: pf.fit_density(flow, x + 1, checkpoint=path, **QUICK),
        lambda: pf.fit_density(flow, x, checkpoint=path, seed=1, **QUICK),
        lambda: pf.fit_density(pf.flows.realnvp(2), x, checkpoint=path, **QUICK),
    ):
        with pytest.raises(CheckpointError, match="belongs to another"):
            call()
    conditional, context = small(1), torch.randn(300, 1)
    pf.fit_density(conditional, x, context, checkpoint=tmp_path / "context.pt", **QUICK)
    with pytest.raises(CheckpointError, match="belongs to another"):
        pf.fit_density(conditional, x, context + 1, checkpoint=tmp_path / "context.pt", **QUICK)
    assert same(flow, small())
    with pytest.raises(CheckpointError, match="not a distill checkpoint"):
        pf.distill(small(), flow, checkpoint=path, **QUICK)


SCRIPT = """
    import sys, torch, pyro_flows as pf
    from pyro_flows.distributions import Resampled
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(301, 2, dtype=torch.float64) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]], dtype=torch.float64) + 1
    torch.manual_seed(int(sys.argv[2]) + int(__import__("os").environ.get("RANK", 0)))  # the first process's start counts
    flow = pf.flows.realnvp(2, transforms=2, hidden_features=(8,), base=Resampled(2, 5, (8,), 64)).double()
    fit = pf.fit_density(flow, x, max_steps=50, batch_size=31, progress=False)
    student = pf.flows.iaf(2, transforms=1, hidden_features=(8,)).double()
    other = pf.distill(pf.flows.maf(2, transforms=1).double(), student, max_steps=20, batch_size=15, progress=False)
    if int(__import__("os").environ.get("RANK", 0)) == int(sys.argv[3]):
        torch.save([flow.state_dict(), student.state_dict(), [h["validation"] for h in fit.history + other.history]], sys.argv[1])
"""


def test_two_processes_end_where_one_does(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pf.__file__).parents[1])}
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    runs = [
        subprocess.Popen([sys.executable, str(script), str(tmp_path / f"two{rank}.pt"), "0", str(rank)], env={**env, **group, "RANK": str(rank)})
        for rank in range(2)
    ]
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "one.pt"), "0", "0"])
    exec(compile(script.read_text(), str(script), "exec"), {})
    assert [run.wait(timeout=240) for run in runs] == [0, 0]
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "two0", "two1"))
    for other in (first, second):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-9)


# --- the result


def test_result(tmp_path, capsys):
    x = TRUE.sample((300,))
    records = []
    fit = pf.fit_density(small(), x, max_steps=60, batch_size=64, callbacks=[records.append])
    assert "fit_density 60/60" in capsys.readouterr().err
    assert records == fit.history and [h["step"] for h in records] == [0, 20, 40, 60] and set(records[0]) == {"step", "loss", "validation", "lr"}
    assert fit.history[-1]["lr"] == 0 and fit.seconds > 0 and len(fit.held_out.x) == 30
    assert f"{fit.validation_loss:.4f} nats (validation) at step {fit.best_step} of 60" in repr(fit)
    assert not fit.converged and "larger max_steps" in repr(fit)
    fit.plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").stat().st_size > 5000


def test_plots_of_other_fits():
    x = TRUE.sample((100,))
    options = QUICK | {"max_steps": 5}
    for fit in (
        pf.fit_density(pf.flows.maf(1, transforms=1), x[:, :1], **options),
        pf.fit_density(small(1), x, x[:, :1], **options),
        pf.fit_density(small(1), x, x[:, :1], validation=0, **options),
        pf.distill(small(), small(), **options),
    ):
        assert len(fit.plot().axes) == 2


# --- refusals


def test_standardized():
    x = np.random.default_rng(0).normal(size=(500, 2)) * [1e-3, 40.0] + [5.0, 1000.0]
    with pytest.raises(DataError, match=r"column 1 of x .*standardized\(x\)"):
        pf.fit_density(pf.flows.nsf(2), x, **QUICK)
    plain = pf.flows.nsf(2, transforms=2)
    flow = plain.standardized(x)
    z = flow.transform.inv(torch.from_numpy(x).float())
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=5e-2)
    torch.testing.assert_close(z.std(0), torch.ones(2), rtol=0, atol=5e-2)
    fit = pf.fit_density(flow, x, **QUICK)
    assert fit.validation_loss == pytest.approx(-flow().log_prob(fit.held_out.x).mean().item(), abs=1e-4)
    assert list(flow.parameters())[0] is list(plain.parameters())[0]
    pf.flows.nsf(2, transforms=2).standardized(x).load_state_dict(flow.state_dict())
    pf.fit_density(pf.flows.nsf(2, bound=5000.0), x, **QUICK | {"max_steps": 1})  # a bound that holds the data is fine
    for wrong, error in ((x[:, :1], ShapeError), (x * 0, DataError)):
        with pytest.raises(error):
            plain.standardized(wrong)


X = torch.linspace(-1, 1, 40).view(20, 2)
HOLED = X.clone().index_fill_(0, torch.tensor([3, 17]), float("nan"))


def matched(manifold):
    flow = pf.Flow(Uniform(manifold), RiemannianContinuousFlow(manifold))
    return lambda x: pf.fit_density(flow, x, objective="flow_matching")


DIRECTIONS = torch.nn.functional.normalize(torch.linspace(-1, 1, 60).cos().view(20, 3), dim=-1).index_put((torch.tensor(17),), torch.tensor(1.5))
TURNS = torch.linspace(-3, 3, 40).view(20, 2).index_put((torch.tensor(17),), torch.tensor(4.0))
SHARES = torch.linspace(0.1, 0.3, 20)[:, None] * torch.tensor([1.0, 2.0, -3.0]) + torch.tensor([0.0, 0.0, 1.0])
SHARES[17] = torch.tensor([0.0, 0.4, 0.6])
BROKEN = {
    "flow": (lambda: pf.fit_density(nn.Linear(2, 2), X), OptionError, "pf.Flow"),
    "dim": (lambda: pf.fit_density(small(), torch.randn(20, 3)), ShapeError, r"\(N, 2\)"),
    "vector": (lambda: pf.fit_density(small(), X[:, 0]), ShapeError, r"\(N, 2\)"),
    "batch": (lambda: pf.fit_density(small(), X[None]), ShapeError, r"\(N, 2\)"),
    "integers": (lambda: pf.fit_density(small(), X.long()), DtypeError, "uniform noise"),
    "numpy-integers": (lambda: pf.fit_density(small(), X.long().numpy()), DtypeError, "uniform noise"),
    "nan": (lambda: pf.fit_density(small(), HOLED), DataError, r"rows \[3, 17\]"),
    "infinite-context": (lambda: pf.fit_density(small(1), X, 1 / torch.arange(20.0)[:, None]), DataError, r"context .* rows \[0\]"),
    "few": (lambda: pf.fit_density(small(), X[:5]), DataError, "5 rows"),
    "few-for-dim": (lambda: pf.fit_density(pf.flows.maf(30), torch.randn(20, 30)), DataError, "at least 31"),
    "constant": (lambda: pf.fit_density(small(), X * torch.tensor([1.0, 0.0])), DataError, r"columns \[1\]"),
    "no-context": (lambda: pf.fit_density(small(1), X), ShapeError, r"context of shape \(N, 1\)"),
    "a-context": (lambda: pf.fit_density(small(), X, X), ShapeError, "no context"),
    "context-size": (lambda: pf.fit_density(small(1), X, X), ShapeError, r"\(N, 1\)"),
    "context-rows": (lambda: pf.fit_density(small(1), X, X[:7, :1]), ShapeError, "7"),
    "context-integers": (lambda: pf.fit_density(small(1), X, torch.arange(20)[:, None]), DtypeError, "one-hot"),
    "validation": (lambda: pf.fit_density(small(), X, validation=1.0), OptionError, "validation"),
    "validation-few": (lambda: pf.fit_density(small(), X, validation=0.01), DataError, "at least 2"),
    "steps": (lambda: pf.fit_density(small(), X, max_steps=0), OptionError, "max_steps"),
    "batch-size": (lambda: pf.fit_density(small(), X, batch_size=0), OptionError, "batch_size"),
    "lr": (lambda: pf.fit_density(small(), X, lr=0.0), OptionError, "lr"),
    "decay": (lambda: pf.fit_density(small(), X, weight_decay=-1.0), OptionError, "weight_decay"),
    "frozen": (lambda: pf.fit_density(small().requires_grad_(False), X), OptionError, "nothing to train"),
    "labels-base": (lambda: pf.fit_density(small(), X, labels=torch.zeros(20).long()), OptionError, "GaussianMixture"),
    "labels-range": (lambda: pf.fit_density(pf.flows.flow_gmm(2, 2), X, labels=torch.full((20,), 2)), OptionError, r"0\.\.1"),
    "labels-real": (lambda: pf.fit_density(pf.flows.flow_gmm(2, 2), X, labels=torch.zeros(20)), ShapeError, "integers"),
    "folder": (lambda: pf.fit_density(small(), X, checkpoint="/nowhere/at/all.pt"), CheckpointError, "folder"),
    "off-sphere": (lambda: pf.fit_density(pf.flows.sphere(3), DIRECTIONS), SupportError, r"^x: 1 of 20 points.*\(17,\), is 1.6 away.*project"),
    "off-sphere-matched": (lambda: matched(Sphere(3))(DIRECTIONS), SupportError, r"^x: 1 of 20 points.*\(17,\), is 1.6 away.*project"),
    "off-torus": (lambda: pf.fit_density(pf.flows.torus(2), TURNS), SupportError, r"^x: 1 of 20 points.*\(17,\), is 0.858 away.*wraps them"),
    "off-torus-matched": (lambda: matched(Torus(2))(TURNS), SupportError, r"^x: 1 of 20 points.*\(17,\), is 0.858 away.*wraps them"),
    "zeros": (lambda: pf.fit_density(pf.flows.simplex(3), SHARES), SupportError, r"^x: 1 of 20 points.*\(17,\).*exactly zero.*clamp_min"),
    "matched-sphere": (
        lambda: pf.fit_density(pf.flows.sphere(3), DIRECTIONS, objective="flow_matching"), OptionError, r"RiemannianContinuousFlow"
    ),
    "outside-base": (lambda: pf.fit_density(pf.Flow(BoxUniform(2, -0.1, 0.1), Affine(2)), X), TrainingError, "before any training"),
    "distill-type": (lambda: pf.distill(TRUE, small()), OptionError, "teacher"),
    "distill-dim": (lambda: pf.distill(pf.flows.maf(3), small()), ShapeError, "dim=3"),
    "distill-context": (lambda: pf.distill(small(1), small(1)), ShapeError, r"\(N, 1\)"),
    "distill-base": (lambda: pf.distill(small(), pf.Flow(Resampled(2), Affine(2))), OptionError, "Resampled"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_bad_input_is_refused(what):
    call, error, says = BROKEN[what]
    with pytest.raises(error, match=says):
        call()


class Brittle(Affine):
    """NaN after so many evaluations in training mode, for some time or for good."""

    def __init__(self, first: int, last: float) -> None:
        super().__init__(2)
        self.first, self.last, self.count = first, last, 0

    def inverse_and_ladj(self, y, context=None):
        x, ladj = super().inverse_and_ladj(y)
        self.count += self.training
        return x, ladj + (math.nan if self.training and self.first < self.count <= self.last else 0.0)


def test_a_loss_that_is_not_finite():
    x = TRUE.sample((300,))
    flow = pf.Flow(2, Compose([Brittle(30, math.inf)]))
    with pytest.raises(TrainingError, match="40 of them.*half the learning rate, 3 times.*step 20"):
        pf.fit_density(flow, x, **QUICK | {"max_steps": 1000})
    assert -flow().log_prob(x).mean() < -pf.Flow(2, Affine(2))().log_prob(x).mean() - 0.1, "the last good state is lost"
    for last, halved in ((34, 0), (44, 1)):
        fit = pf.fit_density(pf.Flow(2, Compose([Brittle(30, last)])), x, **QUICK | {"max_steps": 200})
        assert any(f"{last - 30} steps without a finite loss" in w and f"halved {halved} times" in w for w in fit.warnings)
        assert fit.validation_loss < fit.history[0]["validation"] - 0.5


def test_descent_leaves_frozen_parameters():
    flow = small()
    frozen = flow.transform[0].net[0].weight.requires_grad_(False)
    before = frozen.clone()
    pf.fit_density(flow, TRUE.sample((100,)), **QUICK)
    assert torch.equal(frozen, before) and not frozen.requires_grad


def test_the_schedule():
    schedule = Cosine(max_steps=1000, max_lr=0.1, every=10, patience=10)
    rates = [schedule.lr(step) for step in (0, 9, 19, 500, 1000)]
    assert rates[0] == pytest.approx(0.005) and rates[1] == pytest.approx(0.05, rel=1e-3) and rates[2] == pytest.approx(0.1, rel=1e-2)
    assert rates[3] == pytest.approx(0.05) and rates[4] == 0


# --- objectives that are objects


class Tempered(pf.density.Objective):
    """A part of the likelihood, and a note."""

    name, in_nats = "tempered loss", False

    def __init__(self, power: float) -> None:
        self.power = power

    def validate(self, flow):
        if not flow.exact:
            raise OptionError("tempered: needs an exact density")

    def loss(self, flow, rows):
        return -self.power * flow(rows.context).log_prob(rows.x)

    def notes(self, flow, rows):
        return [f"{len(rows.x)} rows at power {self.power}"]


def test_an_objective_may_be_an_object(tmp_path):
    options = {"max_steps": 20, "progress": False}
    torch.manual_seed(0)
    flow = small()
    twin = copy.deepcopy(flow)
    fit = pf.fit_density(flow, X, objective=Tempered(0.5), checkpoint=tmp_path / "c", **options)
    plain = pf.fit_density(twin, X, **options)
    assert fit.loss_name == "tempered loss" and not fit.in_nats and " nats" not in repr(fit)
    assert fit.history[0]["validation"] == pytest.approx(0.5 * plain.history[0]["validation"])
    assert f"{len(X)} rows at power 0.5" in fit.warnings
    with pytest.raises(CheckpointError, match="belongs to another"):
        pf.fit_density(flow, X, objective=Tempered(0.25), checkpoint=tmp_path / "c", **options)
    for objective, more, says in (
        (Tempered(1.0), {"kinetic": 0.1}, "does not go with"),
        (Tempered(1.0), {"labels": torch.zeros(len(X)).long()}, "of no use"),
        (3, {}, "pf.density.Objective"),
    ):
        with pytest.raises(OptionError, match=says):
            pf.fit_density(flow, X, objective=objective, **more, **options)
    with pytest.raises(OptionError, match="exact density"):
        pf.fit_density(pf.flows.cif(2), X, objective=Tempered(1.0), **options)


def test_draws_come_with_their_log_density():
    flow = small()
    x, log_prob = flow().sample_and_log_prob((7,))
    assert not log_prob.requires_grad
    torch.testing.assert_close(log_prob, flow().log_prob(x).detach())
