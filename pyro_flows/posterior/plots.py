"""One figure of a posterior: how the fit went, how far to trust it, and what it says."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..diagnostics import khat_limit, psis
from ..diagnostics.style import AMBER, BLUE, GRID, MUTED, STYLE, VERDICTS
from .core import PosteriorCore
from .draws import indices

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


__all__ = ["plot"]

_STAGES = ("#9fb3c8", "#627d98", "#2f6f9f", "#1f4e79")
_MARGINALS, _PAIRS, _POINTS, _CANDIDATES, _CONTOURS_FROM = 8, 4, 1500, 60, 50


@torch.no_grad()
def plot(posterior: PosteriorCore, path: str | Path | None = None, num_samples: int = 4000) -> Figure:
    """Draw the figure; see :meth:`Posterior.plot`."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    guide = posterior.guide
    z, log_q = guide.sample_and_log_prob(num_samples)
    log_w = posterior.log_joint(z) - log_q
    kept = torch.isfinite(log_w)
    z, log_w = z[kept], log_w[kept]
    smoothed = psis(log_w)[0] if len(log_w) else log_w
    weights = smoothed.exp().cpu().numpy()
    constrained, labels = _scalars(posterior, z)
    marginals = _most_different(constrained, weights)[:_MARGINALS]
    pairs = _telling_pairs(z, constrained, labels, weights)
    rows = -(-len(marginals) // 4)
    heights = [1.25] + [0.95] * rows + ([1.25] if pairs else [])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10.0, 1.1 + 1.95 * sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        layout: Any = figure.get_layout_engine()
        layout.set(h_pad=0.09, w_pad=0.07, hspace=0.03, wspace=0.02)
        grid = figure.add_gridspec(len(heights), 12, height_ratios=heights)
        _title(figure, posterior)
        _trace(figure.add_subplot(grid[0, :6]), posterior)
        _tail(figure.add_subplot(grid[0, 6:]), posterior.khat, log_w.cpu().numpy())
        share = max(3, 12 // max(len(marginals), 2))
        for i, column in enumerate(marginals):
            axes = figure.add_subplot(grid[1 + i // 4, share * (i % 4) : share * (i % 4 + 1)])
            _marginal(axes, constrained[:, column], weights, labels[column], legend=i == 0)
        for i, (a, b) in enumerate(pairs):
            width = 12 // max(len(pairs), 3)
            axes = figure.add_subplot(grid[-1, width * i : width * (i + 1)])
            _pair(axes, *_readable(constrained[:, a], labels[a]), *_readable(constrained[:, b], labels[b]), weights)
            if i == 0:
                axes.set_title("Pairs, with 50 % and 90 % contours of the weighted draws")
        if path is not None:
            figure.savefig(path, dpi=150)
    return figure


def _scalars(posterior: PosteriorCore, z: torch.Tensor) -> tuple[np.ndarray, list[str]]:
    """Latent values in the constrained space as columns ``(N, K)``, angles counted from their mean direction, and their names."""
    values = posterior.guide.unpack(z)
    values |= {site.name: site.unwrap(values[site.name]) for site in posterior.guide.sites}
    names = [name + index for name, value in values.items() for index in indices(value.shape[1:])]
    flat = torch.cat([value.reshape(len(z), -1) for value in values.values()], -1).double().cpu().numpy()
    varies = np.flatnonzero(np.ptp(flat, axis=0) > 0)  # a Cholesky factor has entries that are the same in every draw
    return flat[:, varies], [names[i] for i in varies]


def _most_different(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Columns in the order of how much weighting moves their mean or spread; in the model's order if they are few."""
    if x.shape[1] <= _MARGINALS:
        return np.arange(x.shape[1])
    mean, sd = x.mean(0), x.std(0) + 1e-300
    moved = np.abs(weights @ x - mean) / sd + np.abs(np.sqrt(weights @ (x - weights @ x) ** 2) / sd - 1)
    return np.sort(np.argsort(-np.nan_to_num(moved))[:_MARGINALS])


def _telling_pairs(
    z: torch.Tensor, constrained: np.ndarray, labels: list[str], weights: np.ndarray
) -> list[tuple[int, int]]:
    """The pairs most dependent on each other, or whose dependence the weights change most."""
    count = constrained.shape[1]
    if count < 2 or len(weights) < 3:
        return []
    chosen = np.arange(count)
    if count > _CANDIDATES:
        spread = constrained.std(0) + 1e-300
        chosen = np.sort(np.argsort(-np.abs(weights @ constrained - constrained.mean(0)) / spread)[:_CANDIDATES])
    low, high = np.quantile(constrained[:, chosen], [0.005, 0.995], axis=0)
    x = np.clip(constrained[:, chosen], low, high)  # a heavy tail must not decide
    x = (x - x.mean(0)) / (x.std(0) + 1e-300)
    both = np.concatenate([x, (x**2 - 1) / (np.std(x**2, axis=0) + 1e-300)], 1)  # squares see funnels and bananas
    raw, weighted = both.T @ both / len(both), (both * weights[:, None]).T @ both
    k = len(chosen)

    def strongest(matrix: np.ndarray) -> np.ndarray:
        return np.maximum.reduce([np.abs(matrix[:k, :k]), np.abs(matrix[:k, k:]), np.abs(matrix[k:, :k])])

    score = np.nan_to_num(strongest(raw) + 2 * strongest(weighted - raw))
    first, second = np.triu_indices(k, 1)
    pairs: list[tuple[int, int]] = []
    uses = dict.fromkeys(range(k), 0)
    for at in np.argsort(-score[first, second]):
        a, b = int(first[at]), int(second[at])
        if max(uses[a], uses[b]) < 2:  # four views of one parameter tell less than of two
            pairs.append((int(chosen[a]), int(chosen[b])))
            uses[a] += 1
            uses[b] += 1
        if len(pairs) == _PAIRS:
            break
    return pairs


def _title(figure: Figure, posterior: PosteriorCore) -> None:
    evaluation = posterior.evaluation
    numbers = f"ELBO {evaluation.elbo}    log evidence {evaluation.log_evidence}    ESS {evaluation.ess:.1%}    k-hat {evaluation.khat:.2f}"
    reason = textwrap.shorten(evaluation.reasons[0], 150, placeholder=" ...") if evaluation.reasons else ""
    title = f"{evaluation.verdict.upper()}    {numbers}\n"
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, color=VERDICTS[evaluation.verdict])
    figure.text(0.012, 1 - 0.42 / figure.get_figheight(), reason, ha="left", va="top", fontsize=8.5, color=MUTED)


def _trace(axes: Axes, posterior: PosteriorCore) -> None:
    axes.set_title("ELBO during training")
    records = [r for r in posterior.history if "elbo" in r and np.isfinite(r["elbo"])]
    stages = list(dict.fromkeys(r.get("stage", "") for r in records))
    if not records:
        axes.text(0.5, 0.5, "no training history", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        axes.set_xticks([]), axes.set_yticks([])
        return
    at = _total_steps(records)
    for i, stage in enumerate(stages):
        chosen = [j for j, r in enumerate(records) if r.get("stage", "") == stage]
        own, steps = [records[j] for j in chosen], at[chosen]
        marker = "o" if len(own) == 1 else None
        colour = _STAGES[max(len(_STAGES) - len(stages) + i, i % len(_STAGES))]
        axes.plot(steps, [r["elbo"] for r in own], color=colour, marker=marker, markersize=4, lw=1.5, label=stage)
    elbos = np.array([r["elbo"] for r in records])
    top = max(elbos.max(), posterior.log_evidence.mean)
    bottom = max(elbos.min(), top - 4 * max(top - np.median(elbos), 0.25))  # the first steps may be far below
    axes.axhline(posterior.log_evidence.mean, color=AMBER, lw=1.2, ls=(0, (4, 2)), label="log evidence")
    axes.set_ylim(bottom - 0.06 * (top - bottom), top + 0.08 * (top - bottom))
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_xlabel("step"), axes.set_ylabel("nats")
    axes.legend(loc="lower right")


def _total_steps(records: list[dict[str, Any]]) -> np.ndarray:
    """Steps from the first of the run, where each stage, and each round of the affine stage, counts from its own."""
    total: list[int] = []
    before = 0
    for j, record in enumerate(records):
        step, last = record.get("step", j), records[j - 1] if j else {"step": 0, "stage": record.get("stage")}
        if record.get("stage") != last.get("stage") or step <= last.get("step", j - 1):
            before = total[-1] if total else 0
        total.append(before + step)
    return np.array(total)


def _tail(axes: Axes, khat: float, log_w: np.ndarray) -> None:
    """Share of the draws above each weight, on log scales, with the Pareto tail of slope -1/k for the k-hat of the evaluation."""
    axes.set_title("Tail of the importance weights")
    if len(log_w) < 25:
        axes.text(0.5, 0.5, "too few draws", ha="center", va="center", color=MUTED, transform=axes.transAxes)
        return
    w = np.exp(np.sort(log_w)[::-1] - (np.logaddexp.reduce(log_w) - np.log(len(log_w))))  # mean one, largest first
    share = (np.arange(len(w)) + 0.5) / len(w)
    tail = int(min(0.2 * len(w), 3 * len(w) ** 0.5))
    body = slice(None, max(tail * 4, 10))
    limit = khat_limit(len(w))
    axes.plot(w[body], share[body], color=MUTED, lw=1.2)
    largest = f"largest {tail} of {len(w):,}"
    axes.plot(w[:tail], share[:tail], ls="", marker="o", ms=3, color=BLUE, mec="none", label=largest)
    threshold = w[tail]
    if 0 < khat < np.inf and w[0] > threshold:
        # mean excess of a generalised Pareto law: scale / (1 - k); matched at the tail's median to stay finite
        excess = np.median(w[:tail] - threshold)
        scale = excess * khat / (2**khat - 1)
        at = np.geomspace(threshold * (1 + 1e-9), w[0], 100)
        fitted = share[tail] * (1 + khat * (at - threshold) / scale) ** (-1 / khat)
        axes.plot(at, fitted, color=AMBER, lw=1.5, label=f"Pareto tail, k-hat {khat:.2f}")
    axes.set_xscale("linear" if w[0] < 8 * w[body][-1] else "log")  # nearly equal weights: plain numbers read better
    axes.set_yscale("log")
    axes.set_xlabel("weight (1 = average)"), axes.set_ylabel("share of draws above")
    axes.grid(color=GRID, lw=0.8)
    axes.legend(loc="upper right" if khat < limit else "lower left")


def _marginal(axes: Axes, x: np.ndarray, weights: np.ndarray, label: str, legend: bool) -> None:
    low, high = np.quantile(x, [0.002, 0.998])
    if not np.isfinite(low + high) or high <= low:
        low, high = np.nanmin(x) - 0.5, np.nanmax(x) + 0.5
    edges: Any = np.linspace(low, high, 41)
    axes.hist(x, edges, density=True, color=BLUE, alpha=0.35, label="draws")
    axes.hist(x, edges, density=True, weights=weights, histtype="step", color=AMBER, lw=1.3, label="weighted")
    axes.set_title(label)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.01)
    if legend:
        above: dict[str, Any] = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "ncols": 2, "borderaxespad": 0.1}
        axes.legend(**above, handlelength=1.2, columnspacing=1.0)


def _readable(x: np.ndarray, label: str) -> tuple[np.ndarray, str]:
    """Logarithms of a positive quantity that ranges over orders of magnitude: a funnel shows only there."""
    low, high = np.quantile(x, [0.01, 0.99])
    return (np.log(x), f"log {label}") if x.min() > 0 and high > 30 * low else (x, label)


def _pair(axes: Axes, x: np.ndarray, x_label: str, y: np.ndarray, y_label: str, weights: np.ndarray) -> None:
    axes.plot(x[:_POINTS], y[:_POINTS], ls="", marker="o", ms=2.2, mec="none", color=BLUE, alpha=0.3, rasterized=True)
    axes.set_xlabel(x_label), axes.set_ylabel(y_label)
    limits: list[Any] = [np.quantile(v, [0.002, 0.998]) for v in (x, y)]
    bins = [np.linspace(low, high, 25) for low, high in limits]
    setters: list[Any] = [axes.set_xlim, axes.set_ylim]
    for (low, high), setter in zip(limits, setters, strict=True):
        pad = 0.04 * (high - low) or 0.5
        setter(low - pad, high + pad)
    if 1 / (weights**2).sum() < _CONTOURS_FROM:
        return  # contours of a handful of draws would be circles around them
    density = np.histogram2d(x, y, bins, weights=weights)[0]
    kernel = np.array([0.25, 0.5, 0.25])
    for axis in (0, 1, 0, 1):  # a little smoothing
        density = np.apply_along_axis(np.convolve, axis, density, kernel, "same")
    ordered = np.sort(density.ravel())[::-1]
    inside = np.cumsum(ordered) / ordered.sum()
    levels = sorted({float(ordered[np.searchsorted(inside, p)]) for p in (0.5, 0.9)})
    centres = [(b[1:] + b[:-1]) / 2 for b in bins]
    axes.contour(*centres, density.T, levels=levels, colors=AMBER, linewidths=1.1)
