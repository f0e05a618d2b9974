"""Maximum likelihood: a flow fitted to rows of data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..distributions import Flow
from ..errors import DataError, OptionError
from .descent import Plan
from .flow_fit import FlowFit
from .flow_training import Training
from .inputs import fingerprint
from .processes import Processes
from .rows import Batches, Rows, read_rows

__all__ = ["fit_density"]

_CHUNK = 4096  # rows scored at once in a validation


def fit_density(
    flow: Flow,
    x: Any,
    context: Any = None,
    *,
    labels: Any = None,
    validation: float = 0.1,
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
    r"""Fit a flow to data by maximum likelihood: minimise :math:`-\frac1N\sum_n \log q(x_n \mid c_n)`, in place.

    Mini-batches, Adam with a cosine schedule and clipped gradients. A validation set decides which state is kept and when to stop. The flow is left
    in evaluation mode.

    Args:
        flow: the flow, which is trained in place. Splines bend a bounded interval only: ``flow.standardized(x)`` brings data of any units there.
        x: the data, shape ``(N, dim)``: a tensor, or what NumPy makes an array of. It is converted to the flow's dtype.
        context: the context of each row, shape ``(N, context_dim)``, for a conditional flow.
        labels: the class of each row, integers of shape ``(N,)``, -1 where unknown, for a flow on a
            :class:`~pyro_flows.distributions.GaussianMixture`: the likelihood is then that of row and class.
        validation: fraction of the rows held out, chosen at random; 0 trains on all, to the end of the schedule.
        max_steps: length of the schedule, in steps.
        batch_size: rows a step, over all processes.
        lr: Adam's learning rate, from which the schedule falls.
        weight_decay: decoupled weight decay, against overfitting.
        patience: steps without a better validation loss after which training stops; half of ``max_steps`` by default, since much of the gain
            comes when the rate has fallen.
        seed: every random number follows from it; the global random state is left alone.
        progress: whether to show a progress bar.
        callbacks: called with a dict of ``step, loss, validation, lr`` after every validation.
        checkpoint: a file to save to, and to resume from where it exists: a resumed run ends with the same numbers as an uninterrupted one.

    Under ``torchrun``, processes that call this with the same arguments share every batch, and end with the same flow as one process would.
    Ctrl-C ends the training and keeps the best state so far.

    Cost: ``max_steps`` gradients of ``batch_size`` densities.

    Raises:
        DtypeError, ShapeError, DataError, OptionError: data or options that cannot be used, before any work.
        TrainingError: the loss is not finite, and going back with a smaller rate does not help; the flow is in its best state.
        CheckpointError: the file belongs to another flow or to other data.

    Example:
        >>> import torch, pyro_flows as pf
        >>> x = torch.randn(1000, 2) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
        >>> fit = pf.fit_density(pf.flows.realnvp(2, transforms=2), x, max_steps=200, progress=False)
        >>> fit.flow().sample((5,)).shape
        torch.Size([5, 2])
    """
    if not isinstance(flow, Flow):
        raise OptionError(f"flow must be a pf.Flow, got {type(flow).__name__}")
    if not 0 <= validation < 1:
        raise OptionError(f"validation must be a fraction in [0, 1), got {validation}")
    rows = read_rows(flow, x, context, labels)
    processes = Processes(rows.x.device)
    training = Training(flow, seed, progress, callbacks, checkpoint, "fit_density", "negative log-likelihood", processes)
    count = round(validation * len(rows.x))
    if validation and not 2 <= count <= len(rows.x) - 2:
        raise DataError(f"validation={validation} of {len(rows.x)} rows leaves {count} to validate: at least 2 are needed, and 2 to train")
    with training.seeded():
        order = torch.randperm(len(rows.x))
    held_out, kept = rows.take(order[:count]), rows.take(order[count:])
    batches = Batches(len(kept.x), batch_size)
    patience = -(-max_steps // 2) if patience is None else patience
    every = min(100, max(20, len(kept.x) // batches.size))
    plan = Plan(max_steps, lr, weight_decay, every, patience)

    def loss() -> Tensor:
        return -log_likelihood(flow, kept.take(processes.share(batches.draw()))).sum() / batches.size

    def validate() -> float:
        parts = processes.share(torch.arange(count)).split(_CHUNK)
        sums = [log_likelihood(flow, held_out.take(index)).sum() for index in parts]
        total = torch.stack(sums).sum() if sums else rows.x.new_zeros(())
        return -float(processes.sum(total)) / count

    same = [fingerprint(tuple(rows), {}), batches.size, max_steps, lr, weight_decay, patience, validation, seed]
    return training.run(loss, validate if count else None, plan, batches, same, held_out if count else None)


def log_likelihood(flow: Flow, rows: Rows) -> Tensor:
    """Log density of each row; of row and class, where the class is known."""
    if rows.labels is None:
        return flow(rows.context).log_prob(rows.x)
    z, ladj = flow.transform.inverse_and_ladj(rows.x, rows.context)
    joint = flow.base.component_log_prob(z)  # type: ignore[operator]
    known = joint.gather(-1, rows.labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(rows.labels >= 0, known, joint.logsumexp(-1)) + ladj
