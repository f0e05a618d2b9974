"""Milliseconds of log_prob, of a training step and of sampling, for the same four flows in five libraries.

    python benchmarks/speed.py --out docs/benchmarks/speed.md

All libraries run in one process and take turns, so that a busy machine slows all of them; medians are shown, and how many times
longer than pyro_flows the others take. On one thread the clock is the process's own time, to which other processes do not add; on two it
is the wall's. Flows are freshly made: five transforms, two hidden layers of 128 units, eight bins. Couplings of zuko evaluate all splines,
the kept ones included; Pyro's autoregressive spline is of linear rational order.

``compiled`` is pyro_flows by ``flow.compiled()``, made for the splines at D=32 and batch 1024. flowjax, jitted, takes its turns in a process
of its own, with ``--jax-python`` the interpreter that has it, and is left out without one. What compiles does so before the first turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

from benchmarks.peers import FLOWS, PEERS, Peer, ours

JOBS = ("log_prob", "training step", "sample")
Run = Callable[[], float]  # does the job once and gives milliseconds


def torch_run(peer: Peer, job: str, dim: int, batch: int, clock: Callable[[], float]) -> Run:
    x = torch.randn(batch, dim)
    if job == "training step":
        optimizer = torch.optim.Adam(peer.parameters(), 1e-4)

    def work() -> None:
        if job == "training step":
            optimizer.zero_grad()
            (-peer.log_prob(x).mean()).backward()
            optimizer.step()
        else:
            with torch.no_grad():
                peer.log_prob(x) if job == "log_prob" else peer.sample(batch)

    def run() -> float:
        start = clock()
        work()
        return 1e3 * (clock() - start)

    return run


class FlowJax:
    """flowjax in a subprocess, confined to as many cores as there are threads."""

    def __init__(self, python: str, threads: int, clock: str) -> None:
        cores = sorted(os.sched_getaffinity(0))[-threads:]
        script = str(Path(__file__).with_name("flowjax_baseline.py"))
        code = f"import os, runpy, sys; os.sched_setaffinity(0, {cores}); sys.argv = ['', {clock!r}]; runpy.run_path({script!r}, None, '__main__')"
        self.process = subprocess.Popen([python, "-W", "ignore", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, request: object) -> float:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("flowjax's process ended")
        return json.loads(answer)

    def build(self, flow: str, dim: int, batch: int, job: str) -> Run:
        self.ask({"flow": flow, "dim": dim, "batch": batch, "job": job})
        return lambda: self.ask("run")


def in_turns(runs: dict[str, Run], rounds: int, seconds: float) -> dict[str, float]:
    """Median milliseconds of each; those that take long have fewer turns, and one that takes longer than ``seconds`` only one."""
    times = {name: [run()] for name, run in runs.items()}  # warms up
    for first in times.values():
        if first[0] < 1e3 * seconds:
            first.clear()
    names = list(runs)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:  # nobody always follows the same one, with the caches that it leaves
            if sum(times[name]) < 1e3 * seconds:
                times[name].append(runs[name]())
    return {name: median(values) for name, values in times.items()}


def measure(options: argparse.Namespace, threads: int) -> Iterator[tuple[str, int, int, str, dict[str, float]]]:
    torch.set_num_threads(threads)
    clock = "process_time" if threads == 1 else "perf_counter"
    jax = FlowJax(options.jax_python, threads, clock) if options.jax_python else None
    for dim in options.dims:
        for flow in options.flows:
            torch.manual_seed(0)
            peers = {name: make(flow, dim) for name, make in PEERS.items() if name in options.peers}
            for batch in options.batches:
                if flow.startswith("NSF") and (dim, batch) == (32, 1024) and not options.no_compile:
                    peers = {"pyro_flows": peers["pyro_flows"], "compiled": ours(flow, dim, compiled=True), **peers}
                for job in options.jobs:
                    runs = {name: torch_run(peer, job, dim, batch, getattr(time, clock)) for name, peer in peers.items()}
                    if job == "sample" and flow == "NSF autoregressive":
                        runs.pop("compiled", None)  # steps are not compiled
                    if "compiled" in runs:
                        runs["compiled"]()
                    if jax:
                        runs["flowjax"] = jax.build(flow, dim, batch, job)
                    yield flow, dim, batch, job, in_turns(runs, options.rounds, options.seconds)
                    gc.collect()
                peers.pop("compiled", None)


def table(options: argparse.Namespace, threads: int) -> Iterator[str]:
    """The lines of one table, in Markdown: milliseconds, and in brackets how many times pyro_flows is faster."""
    names = [name for name in ("pyro_flows", "compiled", *PEERS, "flowjax") if name in {*options.peers, "compiled", "flowjax"}]
    names = list(dict.fromkeys(names))
    yield f"| flow | D | batch | job | {' | '.join(names)} |"
    yield "| --- " * (len(names) + 4) + "|"
    for flow, dim, batch, job, times in measure(options, threads):
        cells = [_cell(name, times) for name in names]
        yield f"| {flow} | {dim} | {batch} | {job} | {' | '.join(cells)} |"


def _cell(name: str, times: dict[str, float]) -> str:
    if name not in times:
        return ""
    ratio = "" if name == "pyro_flows" else f" ({times[name] / times['pyro_flows']:.2g}×)"
    return f"{times[name]:.3g}{ratio}"


def main() -> None:
    """Time every library on every flow; print the tables and write them where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--flows", nargs="+", default=FLOWS)
    parser.add_argument("--jobs", nargs="+", default=JOBS)
    parser.add_argument("--peers", nargs="+", default=list(PEERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for one library in one cell")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--jax-python", help="an interpreter that has flowjax; without one flowjax is skipped")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    text = f"# Speed\n\n{__doc__.split(chr(10))[0]}\n\n" + "".join(f"{p}\n\n" for p in __doc__.split("\n\n")[2:])
    for threads in options.threads:
        text += f"## {threads} thread{'s' if threads > 1 else ''}\n\n"
        for line in table(options, threads):
            print(line, flush=True)
            text += line + "\n"
        text += "\n"
        if options.out:
            options.out.write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    main()
