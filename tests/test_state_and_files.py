"""What a process and a file hold: threads, guides that are used again, checksums, other models, full disks."""

import random
import resource
import signal
import threading
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_flows as pf
from pyro_flows.errors import CheckpointError, CheckpointWarning, ConcurrencyError, ConvergenceWarning, ModelError

Y = torch.tensor([1.0, 2.0, 3.0])
QUICK = {"progress": False, "engine": "eager", "num_particles": 8, "num_eval": 100, "flow": None, "max_steps": 10, "warm_start": False}


def model(y, loc=0.0):
    mu = pyro.sample("mu", dist.Normal(loc, 10.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu, 1.0), obs=y)


def fit(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return pf.FlowVI(model, **{**QUICK, **options}).run(*args)


def draws(posterior):
    torch.manual_seed(0)
    return posterior.get_samples(5)["mu"]


def test_a_second_thread_is_refused_and_nothing_is_left_behind():
    """Of two fits at once one is right and the other is told; afterwards dtype and handlers are as before."""
    alone, flow, x = draws(fit(Y)), pf.flows.realnvp(2, transforms=2), torch.randn(50, 2)
    started, done, results = threading.Event(), threading.Event(), []

    def first():
        def hold(record):
            started.set()
            done.wait(20)

        results.append(draws(fit(Y, callbacks=[hold])))

    thread = threading.Thread(target=first)
    thread.start()
    started.wait(20)
    try:
        with pytest.raises(ConcurrencyError, match="processes"):
            fit(Y)
        with pytest.raises(ConcurrencyError):
            pf.fit_density(flow, x, max_steps=1, progress=False)
    finally:
        done.set()
        thread.join()
    assert torch.equal(results[0], alone)
    assert torch.get_default_dtype() == torch.float32 and not pyro.poutine.runtime._PYRO_STACK


def test_a_guide_that_is_trained_again_leaves_an_earlier_posterior_alone():
    guide = pf.AutoFlow(model, flow=None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        first = pf.FlowVI(model, guide, **{k: v for k, v in QUICK.items() if k != "flow"}).run(Y)
        before = draws(first)
        second = pf.FlowVI(model, guide, **{k: v for k, v in QUICK.items() if k != "flow"}).run(Y + 20)
    assert torch.equal(draws(first), before) and not torch.equal(draws(second), before)


@pytest.mark.parametrize("extra", ["z", "scale"])
def test_a_guide_with_a_site_that_the_model_lacks(extra):
    def bigger(y):
        pyro.sample(extra, dist.LogNormal(0.0, 1.0))
        model(y)

    with pytest.raises(ModelError, match=f"{extra}.*lacks"):
        pf.FlowVI(model, pf.AutoFlow(bigger, flow=None), progress=False).run(Y)


def test_engines_are_those_of_all_stages_after_a_resume(tmp_path):
    options = {"checkpoint": tmp_path / "run.pt", "engine": "auto"}
    first = fit(Y, **options)
    assert first.engines and fit(Y, **options).engines == first.engines


def saved_posterior(path):
    fit(Y).save(path)
    return lambda: pf.Posterior.load(path, model, Y)


def saved_run(path):
    fit(Y, checkpoint=path)
    return lambda: fit(Y, checkpoint=path)


def saved_density(path):
    flow, x = pf.flows.realnvp(2, transforms=2, hidden_features=(4,)), torch.randn(50, 2)
    options = {"max_steps": 20, "progress": False, "checkpoint": path}
    pf.fit_density(flow, x, **options)
    return lambda: pf.fit_density(pf.flows.realnvp(2, transforms=2, hidden_features=(4,)), x, **options)


@pytest.mark.parametrize("make", [saved_posterior, saved_run, saved_density])
def test_a_flipped_bit_is_seen(make, tmp_path):
    """Of twenty files with one bit changed each loads as it was, or is refused."""
    path = tmp_path / "file.pt"
    load = make(path)
    whole, wanted = path.read_bytes(), load()
    state = (wanted.guide if hasattr(wanted, "guide") else wanted.flow).state_dict()
    numbers, refused = random.Random(0), 0
    for _ in range(20):
        damaged = bytearray(whole)
        damaged[numbers.randrange(len(whole))] ^= 1 << numbers.randrange(8)
        path.write_bytes(bytes(damaged))
        try:
            back = load()
        except CheckpointError:
            refused += 1
            continue
        own = (back.guide if hasattr(back, "guide") else back.flow).state_dict()
        assert all(torch.equal(a, b) for a, b in zip(own.values(), state.values(), strict=True))
    assert refused > 3


def test_a_file_of_another_model_with_the_same_sites(tmp_path):
    """An edited prior: neither a posterior nor a run may be taken for that of the model as it is now."""

    def edited(y, loc=0.0):
        return model(y, loc + 100.0)

    path, run = tmp_path / "posterior.pt", tmp_path / "run.pt"
    fit(Y, checkpoint=run).save(path)
    with pytest.raises(CheckpointError, match="another version of the model"):
        pf.Posterior.load(path, edited, Y)
    with pytest.raises(CheckpointError, match="belongs to another model"):
        pf.FlowVI(edited, checkpoint=run, **QUICK).run(Y)


def test_a_file_with_weights_that_are_no_numbers(tmp_path):
    posterior = fit(Y)
    posterior.guide.standardize.loc.fill_(torch.nan)
    posterior.save(tmp_path / "posterior.pt")
    with pytest.raises(CheckpointError, match="NaN"):
        pf.Posterior.load(tmp_path / "posterior.pt", model, Y)


@pytest.mark.parametrize("make", [saved_run, saved_density])
def test_a_full_disk_ends_no_fit(make, tmp_path):
    """The old file stays, no half one is left beside it, and one warning says so."""
    path = tmp_path / "run.pt"
    make(path)
    before = path.read_bytes()
    path.unlink()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 4, limit[1]))
        with pytest.warns(CheckpointWarning, match="cannot be written") as caught:
            make(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert sum(w.category is CheckpointWarning for w in caught) == 1
    assert not list(tmp_path.iterdir())
