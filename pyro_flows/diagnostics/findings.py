"""From the checks of an inverse to a word, the sentences that explain it, and a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from .conditioning import GIVEN, Check

__all__ = ["Findings", "Soundness", "conclude", "table"]

Soundness = Literal["good", "ill-conditioned", "unstable", "one-way", "wrong"]

_WORDS = {
    "good": "Both round trips and the log-det are as exact as rounding allows.",
    "ill-conditioned": "Digits are lost, as many as the condition number explains: the map is to blame, not its code.",
    "unstable": "The formulas agree, but rounding or overflow costs more than conditioning explains.",
    "one-way": "It cannot be inverted, so only the forward map and its log-det were examined.",
    "wrong": "Rounding does not explain what was found: do not use its densities.",
}
_MARKS = {"fine": "", "conditioning": "~", "not finite": "!", "failed": "✗"}


@dataclass(frozen=True)
class Findings:
    """What an examination of a transform has measured and concluded; :class:`~pyro_flows.diagnostics.Invertibility` says what each field is."""

    name: str
    dim: int
    num_points: int
    verdict: Soundness
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    singular_values: Tensor
    lipschitz: tuple[float, float]
    errors: dict[tuple[str, torch.dtype], tuple[Tensor, Tensor]] = field(repr=False)  # for the plot: by point, and allowed

    @property
    def sigma_min(self) -> float:
        """The smallest singular value of the Jacobian at any point: 1 / σmax(J⁻¹)."""
        return self.singular_values[:, 0].min().item()

    @property
    def sigma_max(self) -> float:
        """The largest singular value of the Jacobian at any point."""
        return self.singular_values[:, 1].max().item()

    @property
    def condition(self) -> float:
        """The largest condition number of the Jacobian at any point."""
        return (self.singular_values[:, 1] / self.singular_values[:, 0]).max().item()


def conclude(checks: Sequence[Check], why_not: str, singular_values: Tensor, folds: bool) -> tuple[Soundness, tuple[str, ...]]:
    """The verdict, and the reasons for it, worst first."""
    failed = [c for c in checks if c.status == "failed"]
    single = {(c.quantity, c.points): c for c in checks if c.dtype == torch.float32}
    rounding = [c for c in failed if c.dtype == torch.float32 or _grows(c, single.get((c.quantity, c.points)))]
    wrong = [_miss(c) for c in _by_quantity(c for c in failed if c not in rounding)]
    if folds:
        wrong.insert(0, "Two points have one image, or the Jacobian's determinant changes its sign: the map is not injective, so it has no inverse.")
    broken = [c for c in checks if c.status == "not finite"]
    unstable = list(dict.fromkeys(f"{c.note} ({_where(c)})." for c in _by_quantity(broken) if c.note))
    if not all(c.note for c in broken):
        unstable.append(_overflow([c for c in broken if not c.note]))
    if not wrong:
        unstable += [_loss(c) for c in _by_quantity(rounding)]
    lossy = [_explained(c, singular_values) for c in _by_quantity(c for c in checks if c.status == "conditioning" and c.points in GIVEN)]
    one_way = [f"There is no inverse ({why_not}): densities of given points cannot be had."] if why_not else []
    reasons = (*wrong, *one_way, *unstable, *lossy)
    verdict: Soundness = "wrong" if wrong else "one-way" if one_way else "unstable" if unstable else "ill-conditioned" if lossy else "good"
    if verdict == "good":
        lost = [c.points for c in checks if c.status == "conditioning"]
        far = "So they are at inputs up to 1e6 times larger."
        if lost:
            far = f"At inputs as large as {lost[0]} digits are lost, as many as conditioning explains."
        reasons = (far,)
    return verdict, reasons


def _grows(double: Check, single: Check | None) -> bool:
    """Whether an error in float64 is one of rounding: in float32 it is far larger, and not explained either.

    A wrong formula is as wrong in both; and where conditioning hides it in float32, rounding cannot be what float64 shows.
    """
    return single is not None and single.status != "fine" and single.error > max(100 * double.error, single.allowed)


def _by_quantity(checks: Iterable[Check]) -> list[Check]:
    """One check for each quantity and precision, the first: the points given come before the stress inputs."""
    first: dict[tuple[str, torch.dtype], Check] = {}
    for check in checks:
        first.setdefault((check.quantity, check.dtype), check)
    return list(first.values())


def _where(check: Check) -> str:
    return f"in {str(check.dtype).removeprefix('torch.')} at {check.points}"


def _miss(check: Check) -> str:
    size = f"{check.error:.1e}, where conditioning explains {check.allowed:.1e}"
    if check.quantity.startswith("log-det"):
        against = "that of the Jacobian" if "both" not in check.quantity else "minus the inverse's"
        return f"The log-det differs from {against} by up to {size} nats ({_where(check)})."
    return f"The round trip {check.quantity} misses by {size}, relative to the point ({_where(check)})."


def _loss(check: Check) -> str:
    remedy = " Use float64." if check.dtype == torch.float32 else " It grows with the rounding unit: digits are lost between layers."
    unit = "nats" if check.quantity.startswith("log-det") else "relative to the point"
    return f"{check.quantity}: {check.error:.1e} {unit}, where conditioning explains {check.allowed:.1e} ({_where(check)}).{remedy}"


def _overflow(broken: Sequence[Check]) -> str:
    """Where values stop being finite, in each precision."""
    first = {dtype: c for dtype in (torch.float64, torch.float32) for c in reversed(broken) if c.dtype == dtype}
    quantities = ", ".join(dict.fromkeys(c.quantity for c in broken))
    return f"Not finite {' and '.join(_where(c) for c in first.values())}: {quantities}."


def _explained(check: Check, singular_values: Tensor) -> str:
    condition = (singular_values[:, 1] / singular_values[:, 0]).max().item()
    unit = "nats" if check.quantity.startswith("log-det") else "relative to the point"
    return f"{check.quantity}: {check.error:.1e} {unit} ({_where(check)}), within what a condition number of {condition:.1e} explains."


def table(findings: Findings) -> str:
    """The report as aligned columns: worst errors by quantity and points, each beside what is allowed."""
    lines = [f"Invertibility of {findings.name} in {findings.dim} dimension{'s' * (findings.dim > 1)}, at {findings.num_points} points"]
    lines += [f"Verdict: {findings.verdict}. {_WORDS[findings.verdict]}", *(f"  {reason}" for reason in findings.reasons), ""]
    low, high = findings.lipschitz
    lines += [
        "                        least      greatest",
        f"singular values of J    {findings.sigma_min:<9.2e}  {findings.sigma_max:.2e}   (condition number at most {findings.condition:.2g})",
        f"|f(a)-f(b)| / |a-b|     {low:<9.2e}  {high:.2e}   (pairs of points)",
        "",
    ]
    quantities = list(dict.fromkeys(c.quantity for c in findings.checks))
    inputs = list(dict.fromkeys(c.points for c in findings.checks))
    for dtype in (torch.float64, torch.float32):
        cells = {(c.quantity, c.points): c for c in findings.checks if c.dtype == dtype}
        if not cells:
            continue
        lines.append(f"{str(dtype).removeprefix('torch.'):<10}" + "".join(f"{quantity:<23}" for quantity in quantities).rstrip())
        for points in inputs:
            row = "".join(f"{_cell(cells.get((quantity, points))):<23}" for quantity in quantities)
            lines.append(f"{points:<10}{row}".rstrip())
        lines.append("")
    lines.append("worst error (allowed): relative for round trips, nats for log-dets;  ~ explained by conditioning,  ✗ not,  ! not finite or raised")
    return "\n".join(lines)


def _cell(check: Check | None) -> str:
    if check is None:
        return ""
    if check.status == "not finite":
        return "!"
    return f"{check.error:.0e} ({check.allowed:.0e}) {_MARKS[check.status]}".rstrip()
