"""What every test starts from: one thread, a fixed seed, an empty parameter store; and what it may not leave behind."""

import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")  # no windows
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers beside each worker

import hypothesis
import pyro
import pytest
import torch

torch.set_num_threads(1)

# Examples follow from the test's own code, so a failure in CI is one everywhere; no deadlines: machines differ.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.load_profile("suite")


class Isolation:
    """A plugin, since a fixture of this file would reach its own folder only, and the doctests live in another."""

    @pytest.fixture(autouse=True)
    def _isolated(self):
        dtype, settings = torch.get_default_dtype(), pyro.settings.get()
        pyro.set_rng_seed(0)
        pyro.clear_param_store()
        yield
        pyro.settings.set(**settings)  # the validation flags of pyro and of torch.distributions among them
        torch.set_default_dtype(dtype)


def pytest_configure(config):
    config.pluginmanager.register(Isolation(), "isolation")


def pytest_collection_modifyitems(config, items):
    if not torch.cuda.is_available():
        needs = [item for item in items if item.get_closest_marker("cuda")]
        if needs:
            config.hook.pytest_deselected(items=needs)
            items[:] = [item for item in items if not item.get_closest_marker("cuda")]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets and reference posteriors, which is not part of the repository."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("PYRO_FLOWS_DATA", default))
    if not path.is_dir():
        pytest.skip(f"no data at {path}: set PYRO_FLOWS_DATA to the folder that holds it")
    return path
