"""The tutorials run from top to bottom, in their smoke setting; the docs build executes them in full."""

import re
import warnings
from pathlib import Path

import pyro
import pytest
import torch

from pyro_flows.errors import ConvergenceWarning

TUTORIALS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code(path: Path) -> str:
    """The code of a MyST notebook, on the lines where it stands there, so that a traceback points into the file."""
    text = path.read_text("utf-8")
    lines = [""] * (text.count("\n") + 1)
    for cell in CELL.finditer(text):
        first = text.count("\n", 0, cell.start(1))
        for i, line in enumerate(cell.group(1).splitlines()):
            lines[first + i] = "" if line.startswith(":tags:") else line
    return "\n".join(lines)


def test_there_are_tutorials():
    assert len(TUTORIALS) >= 2 and all(code(path).strip() for path in TUTORIALS)


@pytest.mark.thorough
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_tutorial_runs(path, monkeypatch, tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setenv("PYRO_FLOWS_SMOKE", "1")
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    pyro.clear_param_store()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore", ConvergenceWarning)  # twenty steps do not converge
            warnings.filterwarnings("ignore", message=".*Agg is non-interactive")
            exec(compile(code(path), str(path), "exec"), {"__name__": "tutorial"})
    finally:
        plt.close("all")
        pyro.clear_param_store()
        torch.set_num_threads(threads)
