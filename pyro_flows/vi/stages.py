"""The stages of a run, each a function of its state: a guide says which of them it needs, in which order."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..training.engine import prepare
from ..training.plateau import Plateau
from ..training.progress import Progress
from .objectives import find_objective
from .options import AFFINE_PARTICLES
from .run import Run, Started
from .warm_start import NAIVE, find_start

__all__ = ["STAGES", "run_stages"]

logger = logging.getLogger("pyro_flows")
_LEAST_POWER = 0.03  # of the posterior, which a stochastic flow meets first
_AFFINE_LR = 2e-2
_AFFINE_STEPS = 300  # a round, at most
_AFFINE_ROUNDS = 4  # below the default flow, whose first couplings go on along a funnel where the rounds end
_MORE_ROUNDS = 16  # below any other, and alone: a layer that is left half-way can hold a flow there; a round costs a fraction of the flow's
_ONE_ROUND = 1000  # steps, at most, of a layer that cannot be folded
_MATCHED = 2e-3  # variance of the log weights below which a flow has nothing to add
_COMPARE = 4096  # common draws that decide between the affine stage and the flow
_STRAY = 10.0  # nats below the median log weight, at most, that one of them counts: a single stray draw must not decide
_JUDGES = 256  # draws that the candidates of the warm start are judged by


def run_stages(run: Run, bar: Progress) -> None:
    """Run the stages that are not finished yet."""
    run.load()
    with run.single_threaded():
        for name in run.stages:
            if name not in run.finished:
                bar.stage(name)
                start = time.perf_counter()
                STAGES[name](run, bar)
                run.timings[name] = run.timings.get(name, 0.0) + time.perf_counter() - start
                run.finished.append(name)
                run.resumed = {}
                run.save(**run.last)


def warm_start(run: Run, bar: Progress) -> None:
    """Put the guide at the best of several Laplace approximations and naive Gaussians."""
    guide, centre = run.guide, run.guide.loc
    points = centre + torch.cat([torch.zeros_like(centre)[None], torch.randn(2, len(centre)).to(centre)])

    def density(points: Tensor) -> Tensor:
        z, extra = guide.lift(points)
        return run.log_joint(z) + extra

    def counted(points: Tensor) -> Tensor:
        run.evaluations += len(points)
        return density(points)

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = torch.func.grad_and_value(lambda point: -density(point.unsqueeze(0))[0])(z)
        return value, gradient

    engine = prepare(value_and_grad, (centre,), "eager" if run.obstacle else "auto", 0)
    noise = torch.randn(_JUDGES, len(centre)).to(centre)
    start, count, run.modes = find_start(density, engine, points, float(guide.config["init_scale"]), noise, guide.log_lengths())
    run.evaluations += count
    scattered = guide.start_at(start.loc, start.scale_tril, counted)
    run.started = Started(start.elbo, start.source, start.source != NAIVE, scattered)
    logger.info("warm start: %s, ELBO %.3f", start.source, start.elbo)
    run.history.append({"stage": "warm start", "step": 0, "elbo": start.elbo, "source": start.source, "scattered": scattered})


def affine(run: Run, bar: Progress) -> None:
    """Train the affine layer alone, in rounds. Each round is folded into the fixed layer, so that the next works on whitened coordinates.

    Left out where the warm start found more than an affine layer can keep.
    """
    guide, options = run.guide, run.options
    if run.started is not None and run.started.from_descent and guide.keeps_start:
        return
    flow, particles = guide.affine_flow(), min(AFFINE_PARTICLES, options.num_particles)
    rounds = (_AFFINE_ROUNDS if run.default_flow else _MORE_ROUNDS) if guide.foldable else 1
    for i in range(run.rounds, rounds):
        if guide.foldable:
            schedule = Plateau(min(_AFFINE_STEPS, options.max_steps), _AFFINE_LR, patience=2, progress=0.1, fall=0.3, cycles=1)
        else:
            schedule = Plateau(min(_ONE_ROUND, options.max_steps), _AFFINE_LR)
        run.converged = run.train("affine", flow, particles, schedule, bar).converged
        run.rounds, run.resumed = i + 1, {}
        if guide.foldable:
            guide.fold()
        if run.converged:
            break
        run.save()


def cover(run: Run, bar: Progress) -> None:
    """Where the guide starts evenly, bring the flow to all modes that there are by the inclusive divergence."""
    if run.started is not None and run.started.scattered:
        schedule = Plateau(max(1, run.options.max_steps // 3), run.options.lr, cycles=1)
        run.train("cover", run.guide.flow, run.options.num_particles, schedule, bar, objective=find_objective("forward_kl"))


def temper(run: Run, bar: Progress) -> None:
    """Train the flow on rising powers of the posterior: at first its modes are not apart, and the flow meets all of them."""
    steps = max(1, run.options.max_steps // 3)
    schedule = Plateau(steps, run.options.lr, target=0.0, patience=steps, fall=0.01, cycles=1)

    def power(step: int) -> float:
        return _LEAST_POWER ** max(0.0, 1 - 1.1 * step / steps)

    run.train("tempered", run.guide.flow, run.options.num_particles, schedule, bar, power=power)


def flow(run: Run, bar: Progress) -> None:
    """Train the flow and the affine layer together; where there was an affine stage, keep what is better, its result or this one's."""
    guide, options = run.guide, run.options
    if run.default_flow and "affine" in run.trained and run.trained["affine"].spread < _MATCHED:
        return
    compared = "affine" in run.stages
    if compared and run.before_flow is None:
        run.before_flow = {k: v.clone() for k, v in guide.state_dict().items()}
    try:
        run.converged = run.train("flow", guide.flow, options.num_particles, Plateau(options.max_steps, options.lr), bar).converged
    finally:  # when it is interrupted too
        if compared:
            _keep_better(run)


@torch.no_grad()
def _keep_better(run: Run) -> None:
    """Go back to the state before the flow's stage if its ELBO, over the same draws, is better."""
    guide, noise = run.guide, run.guide.flow.base().sample((_COMPARE,))
    trained = {k: v.clone() for k, v in guide.state_dict().items()}
    elbos = []
    for state in (run.before_flow, trained):
        guide.load_state_dict(state)
        x, ladj = guide.flow.transform.forward_and_ladj(noise)
        gap = run.log_joint(x) - guide.flow.base().log_prob(noise) + ladj
        gap = gap.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        elbos.append(torch.where(gap.isinf(), gap, gap.clamp(min=float(gap.median()) - _STRAY)).mean())
    run.evaluations += 2 * _COMPARE
    if not elbos[1] >= elbos[0]:
        guide.load_state_dict(run.before_flow)
        kept = "its affine layer" if "affine" in run.trained else "what it started with"
        run.notes.append(f"the flow did not improve on {kept} (ELBO {float(elbos[1]):.3f} against {float(elbos[0]):.3f}), which is kept")


STAGES: dict[str, Callable[[Run, Progress], None]] = {
    "warm start": warm_start,
    "affine": affine,
    "cover": cover,
    "tempered": temper,
    "flow": flow,
}
