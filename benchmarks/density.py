"""Densities: two-dimensional targets of known entropy, and UCI tables by ten folds.

    taskset -c 0 python benchmarks/density.py --out docs/benchmarks/density.md

Seconds are the process's CPU time on one thread. The tables come from ``$PYRO_FLOWS_DATA/density/uci_small.npz``; without that file they are skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

import pyro_flows as pf
from benchmarks.toys import TOYS

BUDGET = 30.0  # CPU-seconds
TARGETS = {"8gaussians": 0.02, "checkerboard": 0.08}
# Ten-fold log likelihoods, nats, of "RNADE: the real-valued neural autoregressive density-estimator" (Uria, Murray & Larochelle, 2013),
# https://arxiv.org/abs/1306.0186: a Gaussian, a mixture of factor analysers, and RNADE with mixtures of Gaussians.
PUBLISHED = {"red wine": (-13.18, -10.19, -9.36), "white wine": (-13.20, -10.73, -10.23), "ionosphere": (-41.24, -17.55, -2.50)}
FOLDS = 10


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows]) + "\n"


# --- two dimensions


def toy(name: str, seed: int, steps: int) -> dict[str, Any]:
    """KL divergence from a target to an NSF trained on fresh draws, and the CPU-seconds that took."""
    torch.manual_seed(seed)
    target = TOYS[name]
    x, test = target.sample(200_000), target.sample(100_000)
    flow = pf.flows.nsf(2, bins=16)
    start = time.process_time()
    fit = pf.fit_density(flow, x, max_steps=steps, batch_size=512, lr=LR, validation=0.02, seed=seed, progress=False)
    seconds = time.process_time() - start
    with torch.no_grad():
        log_prob = torch.cat([fit.flow().log_prob(part) for part in test.split(5000)])
    # against the same points' exact density where it is known, which removes most of the sampling error
    return {"target": name, "seed": seed, "kl": -float(log_prob.mean()) - target.entropy, "se": float(log_prob.std()) / len(test) ** 0.5, "seconds": seconds}


LR = 5e-3


def toys(names: list[str], seeds: int, steps: int) -> Iterator[dict[str, Any]]:
    """All targets, all seeds."""
    for name in names:
        for seed in range(seeds):
            yield toy(name, seed, steps)


def toy_table(records: list[dict[str, Any]]) -> str:
    """One row a target: median and worst of the seeds."""
    rows = []
    for name in dict.fromkeys(r["target"] for r in records):
        fits = [r for r in records if r["target"] == name]
        kls = [r["kl"] for r in fits]
        wanted = f"{TARGETS[name]:.2f}" if name in TARGETS else ""
        seconds = f"{statistics.median(r['seconds'] for r in fits):.0f} ({max(r['seconds'] for r in fits):.0f})"
        rows.append([name, f"{TOYS[name].entropy:.3f}", f"{statistics.median(kls):.3f} ({max(kls):.3f})", wanted, f"{fits[0]['se']:.3f}", seconds])
    return table(["target", "entropy", "KL, median (worst)", "wanted", "sampling error", "CPU-seconds, median (worst)"], rows)
