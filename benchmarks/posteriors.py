"""Fit the reference posteriors with FlowVI and with the stock guides, and score the draws against the reference.

    python benchmarks/posteriors.py --tasks all --methods flowvi,autonormal,automvn,autoiaf,autonf --seeds 3
    python benchmarks/posteriors.py --table

Every fit is appended to the JSON file as it ends; a run that is started again skips what is there, unless ``--fresh``.
``numpyro`` is a further method where NumPyro is installed.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks/ is not an installed package

from benchmarks import baselines  # noqa: E402
from benchmarks.metrics import NUM_DRAWS, FitFailed, score  # noqa: E402
from benchmarks.models import NAMES, Task, load  # noqa: E402
from benchmarks.report import render  # noqa: E402

Record = dict[str, Any]
METHODS = ("flowvi", *baselines.GUIDES, "numpyro")
OUT = ROOT / "docs" / "benchmarks" / "posteriors.json"


def evaluated(fit: baselines.Fit) -> Record:
    """The columns that come from the log weights of a baseline, judged by the library's own diagnostics."""
    from pyro_flows.diagnostics import evaluate

    result = evaluate(fit.log_p, fit.log_q, torch.cat([fit.unconstrained, fit.draws], -1))
    return {
        "elbo": result.elbo.mean,
        "log_evidence": result.log_evidence.mean,
        "ess": result.ess,
        "khat": result.khat,
        "verdict": result.verdict,
        "reasons": list(result.reasons),
    }


def fit_flowvi(task: Task, seed: int) -> Record:
    """FlowVI with its default options."""
    import arviz  # noqa: F401 - imports are not counted, nor are NumPyro's
    import torch._dynamo  # noqa: F401

    import pyro_flows as pf

    start, cpu_start = time.perf_counter(), time.process_time()
    posterior = pf.FlowVI(task.model, seed=seed, progress=False).run(*task.args, **task.kwargs)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    return {
        **score(task, task.flatten(posterior.get_samples(NUM_DRAWS))),
        "elbo": posterior.elbo.mean,
        "log_evidence": posterior.log_evidence.mean,
        "ess": posterior.ess,
        "khat": posterior.khat,
        "verdict": posterior.verdict,
        "reasons": list(posterior.reasons),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "evaluations": posterior.num_log_density_evaluations,
        "settings": {},
    }


def fit_baseline(task: Task, method: str, seed: int, budget: baselines.Budget, lr: float | None, weights: Path | None) -> Record:
    """A stock guide; without ``lr``, at the best of its grid, whose cost is not counted."""
    if method == "numpyro":
        from benchmarks import numpyro_baseline

        fit = numpyro_baseline.best_fit(task, seed, lr)
    else:
        fit = baselines.best_fit(task, method, seed, budget, lr)
    if weights is not None:
        weights.mkdir(parents=True, exist_ok=True)
        columns = torch.cat([fit.unconstrained, fit.draws], -1)
        torch.save({"log_p": fit.log_p, "log_q": fit.log_q, "draws": columns}, weights / f"{task.name}-{method}-{seed}.pt")
    cost = {"seconds": fit.seconds, "cpu_seconds": fit.cpu_seconds, "evaluations": fit.evaluations, "settings": fit.settings}
    return {**score(task, fit.draws), **evaluated(fit), **cost}


def run_one(task: Task, method: str, seed: int, budget: baselines.Budget, lr: float | None, weights: Path | None = None) -> Record:
    """One fit as a record; whatever goes wrong in it is its result."""
    record: Record = {"task": task.name, "method": method, "seed": seed, "failed": None}
    start = time.perf_counter()
    try:
        record |= fit_flowvi(task, seed) if method == "flowvi" else fit_baseline(task, method, seed, budget, lr, weights)
    except FitFailed as error:
        record |= {"failed": str(error), "seconds": time.perf_counter() - start}
    except Exception as error:  # a crash of one method must not end the comparison
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        record |= {"failed": f"{type(error).__name__}: {reason}", "seconds": time.perf_counter() - start}
    return record


def key(record: Record) -> tuple[str, str, int]:
    """What makes a fit the same fit."""
    return record["task"], record["method"], record["seed"]


def read(path: Path) -> list[Record]:
    """All records, or none where there is no file yet."""
    return json.loads(path.read_text()) if path.exists() else []


def append(path: Path, record: Record) -> None:
    """Add a record, in place of an older one of the same fit. Several processes may write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        records = [old for old in read(path) if key(old) != key(record)] + [record]
        records.sort(key=lambda r: (list(NAMES).index(r["task"]), METHODS.index(r["method"]), r["seed"]))
        partial = path.with_suffix(".partial")
        partial.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")
        partial.replace(path)
    finally:
        os.close(folder)  # releases the lock


def line(record: Record) -> str:
    """A finished fit in a line."""
    if record["failed"]:
        return f"FAILED: {record['failed']} ({record['seconds']:.1f} s)"
    errors = f"e_mean {record['e_mean']:.3f} ({record['worst'][0]}) e_sd {record['e_sd']:.3f} ({record['worst'][1]})"
    weights = f"ELBO {record['elbo']:.3f} ESS {record['ess']:.3f} k-hat {record['khat']:.2f} {record['verdict']}"
    return f"{errors} coverage {record['coverage']:.3f} {weights} {record['seconds']:.1f} s"


def chosen(text: str, known: list[str], what: str) -> list[str]:
    """The names in a comma-separated list, or all."""
    names = known if text == "all" else text.split(",")
    if unknown := set(names) - set(known):
        raise SystemExit(f"unknown {what}: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    return names


def run(options: argparse.Namespace) -> None:
    """Everything that was asked for and is not there yet."""
    tasks, methods = chosen(options.tasks, list(NAMES), "tasks"), chosen(options.methods, list(METHODS), "methods")
    if "numpyro" in methods:
        try:
            from benchmarks.numpyro_models import MODELS
        except ImportError as error:
            print(f"leaving out numpyro: {error}")
            methods.remove("numpyro")
    fits = [(t, m, s) for t in tasks for m in methods for s in range(options.seeds) if m != "numpyro" or t in MODELS]
    done = set() if options.fresh else {key(record) for record in read(options.out)}
    budget = baselines.Budget(options.steps, options.particles, options.time_limit)
    rates: dict[tuple[str, str], float] = {}
    for i, (name, method, seed) in enumerate(fits):
        if (name, method, seed) in done:
            continue
        for record in read(options.out):
            if key(record) == (name, method, 0) and record.get("settings") and "lr" in record["settings"]:
                rates[name, method] = record["settings"]["lr"]  # the grid is searched on the first seed only
        lr = rates.get((name, method)) if seed else None
        record = run_one(load(name), method, seed, budget, lr, options.weights)
        append(options.out, record)
        print(f"[{i + 1}/{len(fits)}] {name} {method} seed {seed}: {line(record)}", flush=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="all", help=f"all, or some of {', '.join(NAMES)}")
    parser.add_argument("--methods", default="flowvi", help=f"all, or some of {', '.join(METHODS)}")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0, 1, ...")
    parser.add_argument("--steps", type=int, default=3000, help="optimiser steps of a stock guide")
    parser.add_argument("--particles", type=int, default=32, help="particles a step of a stock guide")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, help="CPU seconds of training after which a stock guide is scored"
    )
    parser.add_argument("--weights", type=Path, help="a folder to keep the draws and densities of the stock guides in")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="run fits again that the file has")
    parser.add_argument("--table", action="store_true", help="only render the table (.md beside the JSON)")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    if not options.table:
        run(options)
    options.out.with_suffix(".md").write_text(render(read(options.out)))


if __name__ == "__main__":
    main()
