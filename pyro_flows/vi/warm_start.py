"""A Gaussian to start from: modes by L-BFGS and Newton, Laplace's approximation there, and the ELBO as the judge."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import triangle

__all__ = ["NAIVE", "Start", "find_start", "laplace"]

LogDensity = Callable[[Tensor], Tensor]
NAIVE = "naive start"  # the source of a Gaussian that no descent has found
_SAME = 0.3  # standard deviations within which two modes count as one
_NEWTON = 8  # steps, at most


@dataclass(frozen=True)
class Start:
    """A Gaussian ``N(loc, scale_tril scale_tril^T)`` in unconstrained space, its ELBO in nats, and where it comes from."""

    loc: Tensor
    scale_tril: Tensor
    elbo: float
    source: str


def _minimise(value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, steps: int) -> list[Tensor]:
    """The path of L-BFGS downhill from ``start``: every fifth point, and the last."""
    z = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([z], lr=1.0, max_iter=5, max_eval=12, history_size=20, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        value, gradient = value_and_grad(z.detach())
        sound = torch.isfinite(value) & torch.isfinite(gradient).all()
        z.grad = torch.where(sound, gradient, torch.zeros_like(gradient))
        return torch.where(sound, value, torch.full_like(value, 1e30))

    path = [start]
    for _ in range(steps // 5):
        try:
            optimizer.step(closure)
        except (RuntimeError, ZeroDivisionError, IndexError):  # a line search that met infinities
            break
        point = z.detach().clone()
        if not bool(torch.isfinite(point).all()):
            break
        path.append(point)
        if float((path[-1] - path[-2]).abs().max()) < 1e-9 * (1 + float(point.abs().max())):
            break
    return path


def _hessian(log_joint: LogDensity, z: Tensor) -> Tensor:
    """The Hessian of ``-log p`` at one point, ``(d, d)``."""

    def value(point: Tensor) -> Tensor:
        return -log_joint(point.unsqueeze(0))[0]

    try:
        hessian = torch.func.jacrev(torch.func.grad(value))(z)
    except Exception:  # a model that vmap refuses
        hessian = torch.autograd.functional.hessian(value, z)
    return (hessian + hessian.mT).detach() / 2


def laplace(log_joint: LogDensity, z: Tensor) -> tuple[Tensor, Tensor] | None:
    r"""Laplace's approximation at ``z``: the step to the local quadratic's top, and a scale, ``None`` where the Hessian is not finite.

    The Hessian is scaled by its diagonal before its eigenvalues are floored: coordinates may differ by many orders of magnitude, and collinear
    directions, which clamping would throw away, keep their small but honest curvature.

    Returns:
        ``(step, scale_tril)`` with ``scale_tril`` the Cholesky factor of the inverse Hessian.
    """
    hessian = _hessian(log_joint, z)
    gradient = _gradient(log_joint, z)
    if not bool(torch.isfinite(hessian).all() and torch.isfinite(gradient).all()):
        return None
    diagonal = hessian.diagonal().abs()
    scale = diagonal.clamp(min=1e-12 * float(diagonal.max()) + 1e-30).rsqrt()
    eigenvalues, vectors = torch.linalg.eigh(scale.unsqueeze(-1) * hessian * scale)
    curvature = torch.where(eigenvalues > 1e-10, eigenvalues, eigenvalues.abs().clamp(min=1e-1))
    half = scale.unsqueeze(-1) * vectors * curvature.rsqrt()
    step = -half @ (half.mT @ gradient)
    return step, triangle(half)


def _gradient(log_joint: LogDensity, z: Tensor) -> Tensor:
    point = z.detach().requires_grad_()
    return torch.autograd.grad(-log_joint(point.unsqueeze(0))[0], point)[0]


class _Search:
    """What the search for a start has spent and met so far.

    Args:
        log_joint, value_and_grad, noise, log_lengths: see :func:`find_start`.
    """

    def __init__(
        self, log_joint: LogDensity, value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]], noise: Tensor, log_lengths: Tensor | None
    ) -> None:
        self.log_joint, self.value_and_grad, self.noise, self.log_lengths = log_joint, value_and_grad, noise, log_lengths
        self.count = 0  # log density evaluations
        self.modes: list[tuple[Tensor, Tensor]] = []

    def judge(self, loc: Tensor, tril: Tensor, source: str) -> Start:
        """A Gaussian with its ELBO."""
        with torch.no_grad():
            values = self.log_joint(loc + self.noise @ tril.mT)
        self.count += len(self.noise)
        entropies = tril.diagonal().log() + 0.5 * (1 + math.log(2 * math.pi))
        elbo = float(values.mean() + (entropies if self.log_lengths is None else entropies.minimum(self.log_lengths)).sum())
        return Start(loc, tril, elbo if math.isfinite(elbo) else -math.inf, source)

    def minus_log_p(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Value and gradient of ``-log p``, counted."""
        self.count += 1
        value, gradient = self.value_and_grad(z)
        return value.detach(), gradient.detach()

    def laplace(self, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Laplace's approximation, counted."""
        self.count += len(z)
        return laplace(self.log_joint, z)

    def is_known(self, top: Tensor) -> bool:
        """Whether a point is one of the modes that were met."""
        return any(float(((top - mode) / root.norm(dim=-1)).abs().max()) < _SAME for mode, root in self.modes)

    def polish(self, top: Tensor, best: Start, source: str) -> Start:
        """Finish by Newton's steps what a badly scaled descent leaves; the best Gaussian on the way, or ``best``."""
        for _ in range(_NEWTON):
            approximation = self.laplace(top)
            if approximation is None:
                break
            step, tril = approximation
            best = max(best, self.judge(top, tril, source), key=lambda s: s.elbo)
            value = float(self.minus_log_p(top)[0])
            length = next((t for t in (1.0, 0.3, 0.03) if float(self.minus_log_p(top + t * step)[0]) < value), 0.0)
            top = top + length * step
            if length * float((step / tril.norm(dim=-1)).abs().max()) < 1e-2:
                self.modes.append((top, tril))
                break
        return best

    def look_along(self, path: list[Tensor], best: Start, source: str) -> Start:
        """How far down a path is a Gaussian still good? The best of some, or ``best``."""
        for point in _spread_out(path, 5):
            approximation = self.laplace(point)
            if approximation is not None:
                best = max(best, self.judge(point, approximation[1], source), key=lambda s: s.elbo)
        return best


def find_start(
    log_joint: LogDensity,
    value_and_grad: Callable[[Tensor], tuple[Tensor, Tensor]],
    points: Tensor,
    naive_scale: float,
    noise: Tensor,
    log_lengths: Tensor | None = None,
    steps: int = 150,
) -> tuple[Start, int, list[tuple[Tensor, Tensor]]]:
    """The Gaussian with the best ELBO among Laplace approximations along several descents and the naive one.

    Args:
        log_joint: ``(N, d) -> (N,)``.
        value_and_grad: ``(d,) -> (-log p, gradient)``, the fast way.
        points: starting points ``(K, d)``, of the descents and of the naive Gaussians.
        naive_scale: standard deviation of the narrow naive Gaussians; wide ones have 1.
        noise: standard normal draws ``(N, d)``, the same for all candidates.
        log_lengths: the logarithm of the length of the interval that each coordinate lives on, ``(d,)``, infinite for numbers: no entropy is
            larger. Without it a Gaussian of a periodic density would be the better the wider it is.
        steps: L-BFGS iterations from each point.

    Returns:
        The best start, the number of log density evaluations spent, and all modes that were met, each with the Cholesky factor of its curvature's
        inverse.

    A Laplace approximation can be catastrophic (a funnel has no mode at all), so nothing is taken on trust: the path's earlier points stand as
    candidates too, and the naive Gaussian wins when all of them are worse.
    """
    search = _Search(log_joint, value_and_grad, noise, log_lengths)
    eye = torch.eye(points.shape[-1], dtype=points.dtype, device=points.device)
    plain = (search.judge(point, eye * s, NAIVE) for point in points for s in (naive_scale, 1.0))
    best = naive = max(plain, key=lambda s: s.elbo)
    for k, point in enumerate(points):
        path = _minimise(search.minus_log_p, point, steps)
        if search.is_known(path[-1]):
            continue
        polished = search.polish(path[-1], best, f"Laplace from start {k}")
        if polished is best or polished.elbo < naive.elbo:  # no usable mode
            polished = search.look_along(path, polished, f"the descent from start {k}")
        best = max(best, polished, key=lambda s: s.elbo)
    return best, search.count, search.modes


def _spread_out(path: list[Tensor], count: int) -> list[Tensor]:
    indices = sorted({round(i * (len(path) - 1) / count) for i in range(count)})
    return [path[i] for i in indices]
