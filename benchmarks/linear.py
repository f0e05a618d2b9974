"""What the linear layers cost, and what their float32 round trips lose.

    python benchmarks/linear.py --out docs/benchmarks/linear.md

CPU time of one thread, float32, no gradients, a batch of B = 1024 points; the median of calls that take turns, so that a busy machine slows
all layers alike. A call recomputes everything, as it must while the parameters train. ``dense`` is the reference: a free matrix, with
``torch.linalg``'s ``slogdet`` and ``solve``. K counts reflections or is the rank, c is the size of the blocks.

The round trip is the inverse of the forward map, its error the largest absolute one over 1024 standard normal points, for parameters set so that the
matrix has the condition number asked for, entries off the diagonal included. Where coordinates are mixed, the large ones drown the small
ones in rounding, and the error grows with the condition number whatever the algorithm. Diagonal and triangular layers scale whole
coordinates, and each keeps its own relative precision.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not an installed package

from pyro_flows import transforms as T

DIMS, BATCH = (8, 32, 128, 512), 1024
CONDITIONS = (1.0, 1e2, 1e4, 1e6)
OPERATIONS = ("weight", "forward", "inverse", "logabsdet")


class Dense(T.Linear):
    """A free matrix, without factors."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, matrix=torch.eye(dim), shift=torch.zeros(dim))

    def _matrix(self, at: Any) -> Tensor:
        return self.matrix

    def _log_det(self, at: Any) -> Tensor:
        return torch.linalg.slogdet(self.matrix)[1]

    def _multiply(self, at: Any, x: Tensor) -> Tensor:
        return x @ self.matrix.mT

    def _solve(self, at: Any, y: Tensor) -> Tensor:
        return torch.linalg.solve(self.matrix, y.mT).mT


# Layer, and the costs of the literature: of the matrix, of B points each way, and of the log-determinant.
LAYERS: dict[str, tuple[Callable[[int], T.Linear], tuple[str, str, str, str]]] = {
    "dense (torch.linalg)": (Dense, ("1", "BD²", "D³ + BD²", "D³")),
    "Affine": (T.Affine, ("D²", "BD", "BD", "D")),
    "TriangularLinear": (T.TriangularLinear, ("D²", "BD²", "BD²", "D")),
    "LULinear": (T.LULinear, ("D³", "D³ + BD²", "BD²", "D")),
    "QRLinear, K = D": (T.QRLinear, ("D³", "D³ + BD²", "D³ + BD²", "D")),
    "OrthogonalLinear, K = D": (T.OrthogonalLinear, ("D³", "D³ + BD²", "D³ + BD²", "1")),
    "OrthogonalLinear, K = 4": (partial(T.OrthogonalLinear, reflections=4), ("KD²", "K²D + BKD", "K²D + BKD", "1")),
    "BlockDiagonalLinear, c = 8": (partial(T.BlockDiagonalLinear, block_size=8), ("Dc² + D²", "Dc² + BDc", "Dc² + BDc", "D")),
    "LowRankLinear, K = 4": (T.LowRankLinear, ("KD²", "K²D + BKD", "K²D + BKD", "D + K")),
    "CirculantLinear": (T.CirculantLinear, ("D² log D", "BD log D", "BD log D", "D")),
    "Permutation": (T.Permutation.random, ("D²", "BD", "BD", "1")),
}
HEADINGS = {"weight": "the matrix, weight()", "forward": "forward, with log-det", "inverse": "inverse, with log-det", "logabsdet": "logabsdet()"}


@torch.no_grad()
def microseconds(dim: int, rounds: int) -> dict[tuple[str, str], float]:
    """The median time of a call, by layer and operation."""
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    x = torch.randn(BATCH, dim)
    for name, (make, _) in LAYERS.items():
        layer = make(dim)
        for p in layer.parameters():
            p.add_(0.1 * torch.randn_like(p) / dim**0.5)
        both = partial(layer.forward_and_ladj, x), partial(layer.inverse_and_ladj, x)
        calls |= {(name, o): call for o, call in zip(OPERATIONS, (layer.weight, *both, layer.logabsdet), strict=True)}
    times: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for i in range(rounds + 2):
        for key, call in calls.items():
            start = time.thread_time()
            call()
            if i > 1:  # the first rounds warm up
                times[key].append(1e6 * (time.thread_time() - start))
    return {key: median(values) for key, values in times.items()}


def _with_spread(layer: T.Linear, spread: float) -> T.Linear:
    """Scales from 1 to ``exp(spread)``, in random order, wherever the layer keeps them."""
    generator = torch.Generator().manual_seed(1)
    for name, p in layer.named_parameters():
        if name in ("log_diag", "log_gain", "log_stretch"):
            p.copy_(torch.linspace(0, spread, p.numel())[torch.randperm(p.numel(), generator=generator)].view_as(p))
    if isinstance(layer, T.Affine):
        layer.log_scale.copy_(torch.linspace(0, spread, layer.dim))
    if isinstance(layer, Dense):  # random singular vectors on both sides
        left, right = (torch.linalg.qr(torch.randn(layer.dim, layer.dim, generator=generator, dtype=torch.float64)).Q for _ in range(2))
        layer.matrix.copy_(left * torch.linspace(0, spread, layer.dim, dtype=torch.float64).exp() @ right)
    return layer


def _cond(layer: T.Linear) -> float:
    wide = layer.double().weight().double()
    layer.float()
    return float(torch.linalg.cond(wide))


@torch.no_grad()
def round_trip(make: Callable[[int], T.Linear], dim: int, target: float) -> tuple[float, float] | None:
    """The condition number reached, and the error; ``None`` where no parameters of this layer give that number."""
    torch.manual_seed(0)
    layer = make(dim)
    if target > 1:  # entries off the diagonal, too
        for name, p in layer.named_parameters():
            if name in ("lower", "upper", "phase", "vectors", "factor"):
                p.copy_(torch.randn_like(p) * (1.0 if name in ("vectors", "factor", "phase") else 0.3 / dim**0.5))
    low, high = 0.0, 2 * torch.tensor(target).log().item()
    if _cond(_with_spread(layer, high)) < 0.9 * target:
        return None
    for _ in range(30 if target > 1 else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if _cond(_with_spread(layer, middle)) < target else (low, middle)
    reached, x = _cond(_with_spread(layer, low)), torch.randn(BATCH, dim)
    return reached, float((layer.inverse_and_ladj(layer.forward_and_ladj(x)[0])[0] - x).abs().max())


def report(rounds: int) -> str:
    """The page, in Markdown."""
    lines = ["# Linear layers", ""]
    lines += (__doc__ or "").split("\n\n", 2)[2].strip().replace("``", "`").splitlines()
    times = {dim: microseconds(dim, rounds * 8 // max(8, dim // 16)) for dim in DIMS}
    for o, operation in enumerate(OPERATIONS):
        lines += ["", f"## Microseconds: {HEADINGS[operation]}", ""]
        lines += ["| layer | O() | " + " | ".join(f"D = {dim}" for dim in DIMS) + " |", "| --- | --- |" + " --: |" * len(DIMS)]
        for name, (_, costs) in LAYERS.items():
            lines.append(f"| {name} | {costs[o]} | " + " | ".join(f"{times[dim][name, operation]:.0f}" for dim in DIMS) + " |")
    for dim in (32, 128):
        lines += ["", f"## float32 round trip by condition number, D = {dim}", ""]
        lines += ["| layer | " + " | ".join(f"{c:.0e}".replace("e+0", "e") for c in CONDITIONS) + " |", "| --- |" + " --: |" * len(CONDITIONS)]
        for name, (make, _) in LAYERS.items():
            found = [round_trip(make, dim, c) for c in CONDITIONS]
            for c, f in zip(CONDITIONS, found, strict=True):
                assert f is None or 0.8 < f[0] / c < 1.25, (name, c, f)
            lines.append(f"| {name} | " + " | ".join("–" if f is None else f"{f[1]:.1e}" for f in found) + " |")
    lines += [
        "",
        "A dash: the layer has condition number 1 whatever its parameters. The rounding unit of float32 is 1.2e-7.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, print the page, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = report(options.rounds)
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
