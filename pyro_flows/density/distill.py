"""Density distillation: a flow with cheap samples learns from one with cheap densities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributions import Flow
from ..errors import OptionError, ShapeError
from ..numerics.random import seeded
from ..training.processes import Processes
from .flow_fit import FlowFit
from .flow_training import Plan, Training
from .rows import Batches, read_matrix

__all__ = ["distill"]

_VALIDATE = 4096  # draws


def distill(
    teacher: Flow,
    student: Flow,
    context: Any = None,
    *,
    max_steps: int = 3000,
    batch_size: int = 256,
    lr: float = 3e-3,
    weight_decay: float = 0.0,
    patience: int | None = None,
    seed: int = 0,
    progress: bool = True,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    checkpoint: str | Path | None = None,
) -> FlowFit:
    r"""Fit a student flow to a teacher without data: minimise :math:`KL(q\|p) = E_q[\log q(x) - \log p(x)]` over the student's own draws.

    Draws of the student and densities of the teacher take one pass each when the student is an IAF and the teacher a MAF; neither is inverted. The
    student is trained in place and left in evaluation mode; the teacher is left alone. This divergence punishes draws where the teacher has none and
    forgives modes that are missed, so compare draws of both.

    Args:
        teacher: a trained flow :math:`p`.
        student: the flow :math:`q`, of the same ``dim``, dtype and ``context_dim``; its base must have ``rsample``.
        context: contexts to distill at, shape ``(N, context_dim)``, for conditional flows.
        batch_size: draws a step, over all processes.
        max_steps, lr, weight_decay, patience, seed, progress, callbacks, checkpoint: see :func:`~pyro_flows.density.fit_density`; the validation
            loss is the divergence over 4096 draws whose noise stays the same.

    Cost: ``max_steps`` gradients of ``batch_size`` draws, scored by both.

    Raises:
        OptionError, ShapeError, DtypeError, DataError: flows or options that do not fit together, before any work.
        TrainingError: as in ``fit_density``.

    Reference: Parallel WaveNet: fast high-fidelity speech synthesis (van den Oord et al., 2017), https://arxiv.org/abs/1711.10433

    Example:
        >>> import pyro_flows as pf
        >>> teacher, student = pf.flows.maf(2), pf.flows.iaf(2)
        >>> fit = pf.distill(teacher, student, max_steps=20, progress=False)
        >>> round(fit.validation_loss, 3)  # both start at their bases
        0.0
    """
    for name, flow in (("teacher", teacher), ("student", student)):
        if not isinstance(flow, Flow):
            raise OptionError(f"{name} must be a pf.Flow, got {type(flow).__name__}")
    if (teacher.dim, teacher.context_dim) != (student.dim, student.context_dim):
        sizes = [f"dim={f.dim}, context_dim={f.context_dim}" for f in (teacher, student)]
        raise ShapeError(f"teacher and student differ in size: {sizes[0]} against {sizes[1]}")
    if (context is None) != (student.context_dim == 0):
        raise ShapeError(f"these flows take {f'a context of shape (N, {student.context_dim})' if student.context_dim else 'no context'}")
    if not student.base().has_rsample:
        raise OptionError(f"the student's base {type(student.base).__name__} has no reparameterised draws: use Gaussian, StudentT or BoxUniform")
    like = next(student.parameters(), torch.zeros(()))
    given = None if context is None else read_matrix("context", context, student.context_dim, like)
    processes = Processes(like.device)
    training = Training(student, seed, progress, callbacks, checkpoint, "distill", "KL(student || teacher)", processes)
    batches = None if given is None else Batches(len(given), batch_size, repeat=True)
    plan = Plan(max_steps, lr, weight_decay, every=50, patience=-(-max_steps // 2) if patience is None else patience)

    def divergence(count: int, index: Tensor | None) -> Tensor:
        at = None if given is None or index is None else given[index]
        x, log_q = student(at).rsample_and_log_prob((count,) if at is None else ())
        return log_q - teacher(at).log_prob(x)

    def loss() -> Tensor:
        index = None if batches is None else batches.draw()
        gaps = divergence(batch_size, index)  # every process draws the whole batch, so that all use the same noise
        return processes.share(gaps).sum() / batch_size

    def validate() -> float:
        with seeded(seed + 2**32):
            return float(divergence(_VALIDATE, None if given is None else torch.randint(len(given), (_VALIDATE,))).mean())

    fingerprint = [batch_size, max_steps, lr, weight_decay, plan.patience, seed]
    return training.run(loss, validate, plan, batches, fingerprint)
