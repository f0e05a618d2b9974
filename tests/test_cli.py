"""The command line, from its arguments to its files, exit codes and words."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_flows import __version__, cli
from pyro_flows.model.tables import arguments_from_file
from pyro_flows.posterior.export import arviz
from pyro_flows.posterior.posterior import Posterior

MODEL = """
import helper
import pyro
import pyro.distributions as dist
import torch

def model(y, scale=1.0, group=None):
    assert group is None or not torch.is_floating_point(group)
    with pyro.plate("parts", 2):
        b = pyro.sample("b", dist.Normal(0.0, helper.WIDTH))
    with pyro.plate("rows", len(y)):
        loc = b[group] if group is not None else b[0]
        pyro.sample("y", dist.Normal(loc, scale), obs=y)

def broken(y):
    raise ValueError("out of order")

def nothing(y):
    pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)

def counts(y):
    rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
    pyro.sample("y", dist.Normal(rate.log(), 1.0).expand([2]).to_event(1), obs=y)

NOT_A_MODEL = 3
"""
DATA = {"y": [1.0, 3.0, -2.0, 0.0], "group": [0, 0, 1, 1], "scale": 2}


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "helper", raising=False)
    (tmp_path / "schools.py").write_text(MODEL)
    (tmp_path / "helper.py").write_text("WIDTH = 2.0\n")
    (tmp_path / "data.json").write_text(json.dumps(DATA))
    return tmp_path


def run(*argv):
    return cli.main(list(argv))


def test_fit_writes_what_was_asked_for(files, capsys):
    code = run(
        *("fit", "schools.py:model", "--data", "data.json", "--flow", "none", "--quiet", "--samples", "1000", "--predictive"),
        *("--out", "posterior.nc", "--plot", "posterior.png", "--save", "posterior.pt"),
    )
    out = capsys.readouterr().out
    assert code == 0
    for part in ("ELBO", "Verdict: good", "b[0]", "b[1]", "Written: posterior.nc, posterior.png, posterior.pt"):
        assert part in out
    data = arviz().from_netcdf("posterior.nc")
    b = data["posterior"]["b"]
    assert b.dims == ("chain", "draw", "parts") and b.shape == (1, 1000, 2)
    # two observations of variance 4 each, prior variance 4: mean sum/3, variance 4/3
    np.testing.assert_allclose(b.mean(("chain", "draw")), [4 / 3, -2 / 3], atol=0.2)
    np.testing.assert_allclose(b.std(("chain", "draw")), (4 / 3) ** 0.5, rtol=0.12)
    assert data["posterior_predictive"]["y"].shape == (1, 1000, 4)
    assert (files / "posterior.png").read_bytes()[:4] == b"\x89PNG"
    y, group = torch.tensor(DATA["y"]), torch.tensor(DATA["group"])
    loaded = Posterior.load("posterior.pt", cli._model("schools.py:model"), y=y, group=group, scale=2)
    assert loaded.verdict == "good"


def test_a_poor_fit_has_a_code_of_its_own(files, capsys, monkeypatch):
    class Untrained:
        def __init__(self, model, **options):
            self.model = model

        def run(self, **data):
            from pyro_flows import AutoFlow

            return Posterior.from_guide(AutoFlow(self.model, flow=None).setup(**data), **data)

    monkeypatch.setattr("pyro_flows.vi.flow_vi.FlowVI", Untrained)
    assert run("fit", "schools.py:model", "--data", "data.json", "--out", "posterior.nc") == 3
    assert "Do not use these draws" in capsys.readouterr().out and (files / "posterior.nc").exists()


def test_options_reach_the_fit(files, monkeypatch):
    seen = {}

    class Recorder:
        def __init__(self, model, **options):
            seen.update(options)

        def run(self, **data):
            seen["data"] = data
            raise KeyboardInterrupt

    monkeypatch.setattr("pyro_flows.vi.flow_vi.FlowVI", Recorder)
    argv = ("fit", "schools.py:model", "--data", "data.json", "--flow", "nsf", "--seed", "3", "--max-steps", "7", "--quiet")
    assert run(*argv, "--as-float", "scale", "--checkpoint", "run.pt") == 130
    data = seen.pop("data")
    assert seen == {"flow": "nsf", "seed": 3, "max_steps": 7, "progress": False, "checkpoint": Path("run.pt")}
    assert data["y"].tolist() == DATA["y"] and str(data["y"].dtype) == "torch.float64"
    assert str(data["group"].dtype) == "torch.int64" and data["scale"] == 2.0 and isinstance(data["scale"], float)
    seen.clear()
    assert run("fit", "schools.py:model", "--data", "data.json", "--flow", "none") == 130
    assert seen["flow"] is None and seen["checkpoint"] is None and "max_steps" not in seen and seen["progress"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (("nowhere.py:model",), "no file 'nowhere.py'"),
        (("schools.py",), "FILE.py:MODEL"),
        (("schools.py:modle",), "no model 'modle'; it defines model, broken, nothing, counts"),
        (("schools.py:NOT_A_MODEL",), "no model 'NOT_A_MODEL'"),
        (("data.json:model",), "not a Python file"),
        (("bad.py:model",), "cannot be imported: SyntaxError"),
        (("schools.py:model",), "takes (y, scale=1.0, group=None), the data have no keys: missing a required argument: 'y'"),
        (("schools.py:broken", "--data", "data.json"), "unexpected keyword argument 'group'"),
        (("schools.py:model", "--data", "missing.json"), "'missing.json' cannot be read: No such file"),
        (("schools.py:model", "--data", "schools.py"), "is not JSON"),
        (("schools.py:model", "--data", "list.json"), "must hold an object"),
        (("schools.py:model", "--data", "ragged.json"), "'y' are ragged"),
        (("schools.py:model", "--data", "words.json"), "'y' has 1 missing label(s)"),
        (("schools.py:model", "--data", "uneven.csv"), "row 3 has 1 cells, the header 2"),
        (("schools.py:model", "--data", "empty.csv"), "has no rows"),
        (("schools.py:model", "--data", "twice.csv"), "names a column twice"),
        (("schools.py:model", "--data", "data.json", "--seed", "-1"), "--seed must be"),
        (("schools.py:model", "--data", "data.json", "--out", "."), "'.' cannot be written"),
        (("schools.py:model", "--data", "null.json"), "'scale' is null"),
        (("schools.py:model", "--data", "data.json", "--as-float", "z"), "--as-float z: no such key"),
        (("schools.py:model", "--data", "data.json", "--out", "no/where.nc"), "folder of 'no/where.nc' does not exist"),
        (("schools.py:model", "--data", "data.json", "--samples", "0"), "--samples must be positive"),
        (("schools.py:model", "--data", "data.json", "--predictive"), "--predictive needs --out"),
    ],
)
def test_bad_arguments_and_files(files, capsys, argv, words):
    (files / "bad.py").write_text("def model(:\n")
    (files / "list.json").write_text("[1, 2]")
    (files / "ragged.json").write_text('{"y": [[1, 2], [3]]}')
    (files / "words.json").write_text('{"y": ["a", "b", null]}')
    (files / "uneven.csv").write_text("y,x\n1,2\n3\n")
    (files / "empty.csv").write_text("y,x\n")
    (files / "twice.csv").write_text("y,y\n1,2\n")
    (files / "null.json").write_text('{"y": [1], "scale": null}')
    assert run("fit", *argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.startswith("pyro-flows: ") and captured.out == ""
    assert "Traceback" not in captured.err and len(captured.err.splitlines()) == 1


TABLE = """who,when,y,group,seen
ann,1,1.5,b,1
bob,2,NA,a,0
eve,3,-0.5,b,1
dan,4,,a,0
"""


@pytest.mark.parametrize("kind", ["csv", "tsv", "records", "columns"])
def test_tables_by_every_door(files, kind):
    """Numbers, whole numbers, missing cells and words arrive the same way; columns that the model does not take stay outside a table."""
    rows = [line.split(",") for line in TABLE.splitlines()]
    records = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    for record in records:
        record["y"] = float(record["y"]) if record["y"] not in ("NA", "") else None
        record["seen"] = int(record["seen"])
    path = files / f"table.{kind if kind in ('csv', 'tsv') else 'json'}"
    columns = {name: [record[name] for record in records] for name in ("y", "group", "seen")}
    content = {"csv": TABLE, "tsv": TABLE.replace(",", "\t"), "records": json.dumps(records), "columns": json.dumps(columns)}
    path.write_text(content[kind])
    data = arguments_from_file(path, lambda y, group, seen=None: None)
    assert list(data) == ["y", "group", "seen"] and data["group"] == ["b", "a", "b", "a"]
    assert data["y"].dtype == torch.float64 and data["y"].isnan().tolist() == [False, True, False, True]
    assert data["seen"].dtype == torch.int64 and data["seen"].tolist() == [1, 0, 1, 0]


def test_a_table_of_groups_from_the_command_line(files, capsys):
    """Words become codes, and come back as the names of a plate's members."""
    (files / "table.csv").write_text("y,group\n1.0,tall\n3.0,tall\n-2.0,short\n0.0,short\n")
    assert run("fit", "schools.py:model", "--data", "table.csv", "--flow", "none", "--quiet", "--samples", "500") == 0
    out = capsys.readouterr().out
    assert "b[short]" in out and "b[tall]" in out


def test_version_and_module(capsys):
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0 and __version__ in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-m", "pyro_flows", "--version"], capture_output=True, text=True, check=True)
    assert __version__ in done.stdout


@pytest.mark.parametrize(
    "name, data, flow, words",
    [
        ("broken", {"y": [1.0]}, "none", "ModelError: .*out of order"),
        ("nothing", {"y": [1.0]}, "none", "ModelError: .*no .*latent"),
        ("counts", {"y": [1.0, float("nan")]}, "none", "ModelError: .*'y'.*NaN"),
        ("counts", {"y": [1.0, 2.0]}, "no_such_flow", "OptionError: .*no_such_flow.*nsf"),
    ],
)
def test_a_fit_that_fails_says_why(files, capsys, name, data, flow, words):
    (files / "own.json").write_text(json.dumps(data))
    assert run("fit", f"schools.py:{name}", "--data", "own.json", "--flow", flow, "--quiet") == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert re.search(words, error, re.DOTALL)


def test_usage_errors_leave_with_two(capsys):
    for argv in ((), ("fit",), ("dance",), ("fit", "m.py:model", "--seed", "x")):
        with pytest.raises(SystemExit) as stop:
            run(*argv)
        assert stop.value.code == 2
    with pytest.raises(SystemExit) as stop:
        run("--help")
    assert stop.value.code == 0 and "Exit codes" in capsys.readouterr().out


@pytest.mark.thorough
def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("demo", "--quiet", "--max-steps", "100") in (0, 3)
    out = capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["eight_schools.nc", "eight_schools.png"]
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if line.startswith(("mu ", "tau ", "theta["))}
    assert list(rows) == list(cli._REFERENCE) and len(rows) == 10
    for name, (mean, reference, sd, _, off) in rows.items():
        assert float(reference) == cli._REFERENCE[name][0]
        assert float(off) == pytest.approx((float(mean) - float(reference)) / cli._REFERENCE[name][1], abs=0.01)
        assert abs(float(off)) < 3 and float(sd) > 0  # a few steps are no fit
    assert "log evidence" in out and "known value -31.311" in out


def test_the_demo_s_reference_is_the_reference(data_dir):
    """The numbers typed into the program are those of the reference draws."""
    reference = np.load(data_dir / "posteriors" / "eight_schools-eight_schools_centered" / "ref.npz")
    for name, mean, sd in zip(reference["names"], reference["mean"], reference["sd"], strict=True):
        own = f"theta[{int(name[6]) - 1}]" if name.startswith("theta") else str(name)
        assert cli._REFERENCE[own] == pytest.approx((mean, sd), abs=0.0051)
