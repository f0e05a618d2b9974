"""One run of :class:`~pyro_flows.vi.FlowVI`: the stages in order, and what they leave behind."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributions import Flow
from ..guides import AutoFlow, AutoManifoldFlow
from ..model.log_joint import LogJoint
from ..numerics.random import random_state, restore_random_state
from ..stochastic import StochasticFlow
from ..training.engine import Engine, prepare
from ..training.progress import Progress
from ..training.trainer import Schedule, Trainer
from ..transforms import TriangularLinear
from .objectives import AUTO, FlatFlow, build_step
from .scores import has_fixed_points
from .stochastic_objectives import build_stochastic_step
from .warm_start import find_start

if TYPE_CHECKING:
    from .flow_vi import FlowVI

__all__ = ["AFFINE_PARTICLES", "Run"]

logger = logging.getLogger("pyro_flows")
_LEAST_POWER = 0.03  # of the posterior, which a stochastic flow meets first
_AFFINE_LR = 2e-2
_AFFINE_ROUNDS = 4  # below the default flow, whose first couplings go on along a funnel where the rounds end
_MORE_ROUNDS = 16  # below any other, and alone: a layer that is left half-way can hold a flow there; a round costs a fraction of the flow's
AFFINE_PARTICLES = 64  # at most
_KEPT = ("history", "notes", "timings", "finished", "evaluations", "dropped", "converged", "rounds", "affine_state", "modes")  # in a checkpoint
_LAST = ("trainer", "stage", "engine", "spent", "random", "cuda")  # in a checkpoint, of the last stage that was trained
_PARALLEL = 2**21  # numbers in a step's trace from which more than one thread pays
_MATCHED = 2e-3  # variance of the log weights below which a flow has nothing to add
_COMPARE = 4096  # common draws that decide between the affine stage and the flow
_FEW = 20  # numbers beside directions and angles, with which the noise of scores grows
_STRAY = 10.0  # nats below the median log weight, at most, that one of them counts: a single stray draw must not decide


@contextmanager
def _threads(elements: int) -> Iterator[None]:
    """One thread while a step is small: starting threads for it costs more than they do, and much more on a busy machine."""
    before = torch.get_num_threads()
    if elements < _PARALLEL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Run:
    """The state of a run: what is trained so far, its history, timings and the number of log density evaluations.

    Args:
        options: the :class:`FlowVI` with its options.
        guide: the guide, set up.
        log_joint: the model's log joint density over the guide's vector.
    """

    def __init__(self, options: FlowVI, guide: AutoFlow, log_joint: LogJoint) -> None:
        self.options, self.guide, self.log_joint = options, guide, log_joint
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.timings: dict[str, float] = {}
        self.engines: dict[str, Engine] = {}
        self.evaluations = 0
        self.dropped = 0
        self.converged = True
        self.finished: list[str] = []  # stages
        self.rounds = 0  # of the affine stage
        self.affine_state: dict[str, Tensor] | None = None
        self.modes: list[tuple[Tensor, Tensor]] = []  # that the warm start met, places and scales
        self.resumed: dict[str, Any] = {}
        self.last: dict[str, Any] = {}  # the state of the last stage that was trained, in a checkpoint

    def train(self, bar: Progress) -> None:
        """Run the stages that are not finished yet."""
        self._load()
        with _threads(self.log_joint.size * self.options.num_particles):
            self._run_stages(bar)

    def _run_stages(self, bar: Progress) -> None:
        first = [("tempered", self._tempered)] if self.torn else [("warm start", self._warm_start), ("affine", self._affine)]
        for name, stage in (*first, ("cover", self._cover), ("flow", self._flow)):
            if name not in self.finished:
                bar.stage(name)
                start = time.perf_counter()
                stage(bar)
                self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start
                self.finished.append(name)
                self.resumed = {}
                self._save(**self.last)

    def warnings(self) -> list[str]:
        """What a user should know about the run, in words."""
        found = list(self.notes)
        if self.dropped:
            found.append(f"{self.dropped} particles with a non-finite density or gradient were dropped during training")
        if self.log_joint.frozen:
            names = ", ".join(map(repr, self.log_joint.frozen))
            found.append(f"pyro.param {names} was held fixed: make it a pyro.sample site, or train it with stock SVI")
        if self.log_joint.mode == "loop":
            found.append(f"the model ran once for each particle, which is slow: {self.log_joint.reason}")
        return found

    # Stages

    def _warm_start(self, bar: Progress) -> None:
        guide, log_joint = self.guide, self.log_joint
        if not self.options.warm_start or not self._foldable:
            return
        centre = guide.loc
        points = centre + torch.cat([torch.zeros_like(centre)[None], torch.randn(2, len(centre)).to(centre)])

        def density(points: Tensor) -> Tensor:
            z, extra = guide.lift(points)
            return log_joint(z) + extra

        def counted(points: Tensor) -> Tensor:
            self.evaluations += len(points)
            return density(points)

        def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
            gradient, value = torch.func.grad_and_value(lambda point: -density(point.unsqueeze(0))[0])(z)
            return value, gradient

        engine = prepare(value_and_grad, (centre,), "eager" if self._obstacle else "auto", 0)
        noise = torch.randn(256, len(centre)).to(centre)
        start, count, self.modes = find_start(density, engine, points, float(guide.config["init_scale"]), noise, guide.room())  # type: ignore[arg-type]
        self.evaluations += count
        scattered = guide.place(start.loc, start.scale_tril, counted)
        logger.info("warm start: %s, ELBO %.3f", start.source, start.elbo)
        self.history.append({"stage": "warm start", "step": 0, "elbo": start.elbo, "source": start.source, "scattered": scattered})

    def _affine(self, bar: Progress) -> None:
        """Train the affine layer alone, in rounds. Each round is folded into the fixed layer, so that the next works on whitened coordinates.

        A guide of directions or angles goes without where there is a start: places alone would settle on one mode of several.
        """
        placed = any(h["stage"] == "warm start" and h["source"] != "naive start" for h in self.history)
        if isinstance(self.guide, AutoManifoldFlow) and (placed or self.guide.affine is None) and self.guide.inner:
            return
        flow = self.guide.affine_flow()
        particles = min(AFFINE_PARTICLES, self.options.num_particles)
        schedule = Schedule(max_steps=min(1000, self.options.max_steps), lr=_AFFINE_LR)
        if self._foldable:
            steps = min(300, self.options.max_steps)
            schedule = Schedule(steps, _AFFINE_LR, patience=2, progress=0.1, fall=0.3, cycles=1)
        rounds = _AFFINE_ROUNDS if self.options.auto_flow else _MORE_ROUNDS
        for i in range(self.rounds, rounds if self._foldable else 1):
            trainer = self._train("affine", flow, particles, schedule, bar)
            self.converged, self.rounds, self.resumed = trainer.converged, i + 1, {}
            if self._foldable:
                self.guide.fold()
            if trainer.converged:
                break
            self._save()

    def _flow(self, bar: Progress) -> None:
        """Train the flow and the affine layer together; keep what is better, the result or the affine stage's."""
        guide, options = self.guide, self.options
        if not guide.inner or (options.auto_flow and self._is_matched()):
            return
        if self.torn:
            self.converged = self._train("flow", guide.flow, options.num_particles, Schedule(options.max_steps, options.lr), bar).converged
            return
        if self.affine_state is None:
            self.affine_state = {k: v.clone() for k, v in guide.state_dict().items()}
        schedule = Schedule(max_steps=options.max_steps, lr=options.lr)
        try:
            trainer = self._train("flow", guide.flow, options.num_particles, schedule, bar)
            self.converged = trainer.converged
        finally:  # when it is interrupted too
            self._keep_better()

    def _cover(self, bar: Progress) -> None:
        """Where the guide starts evenly, bring the flow to all modes that there are by the inclusive divergence."""
        if any(h.get("scattered") for h in self.history) and self.guide.inner and self.objective == "score":
            schedule = Schedule(max(1, self.options.max_steps // 3), self.options.lr, cycles=1)
            self._train("cover", self.guide.flow, self.options.num_particles, schedule, bar)

    def _tempered(self, bar: Progress) -> None:
        """Train a stochastic flow on rising powers of the posterior: at first its modes are not apart, and the flow finds all of them."""
        steps = max(1, self.options.max_steps // 3)
        schedule = Schedule(steps, self.options.lr, target=0.0, patience=steps, fall=0.01, cycles=1)
        self._train("tempered", self.guide.flow, self.options.num_particles, schedule, bar)

    @property
    def objective(self) -> str:
        """What is optimised, where that is left open."""
        if self.options.objective != AUTO:
            return self.options.objective
        numbers = sum(s.size for s in self.guide.sites if s.manifold is None)
        few = isinstance(self.guide, AutoManifoldFlow) and numbers <= _FEW
        return "score" if few and not has_fixed_points(self.guide.flow.transform) else "path"

    @property
    def torn(self) -> bool:
        """Whether the guide is a stochastic flow."""
        return isinstance(self.guide.flow, StochasticFlow)

    @property
    def _foldable(self) -> bool:
        return self.guide.affine is None or isinstance(self.guide.affine, TriangularLinear)

    @property
    def _obstacle(self) -> str:
        if self.torn and not self.guide.discrete:  # type: ignore[attr-defined]
            return "it draws random indices on its way"
        return self.log_joint.reason if self.log_joint.mode == "loop" else ""

    def _is_matched(self) -> bool:
        last = [h for h in self.history if h["stage"] == "affine"]
        return bool(last) and last[-1]["spread"] < _MATCHED

    @torch.no_grad()
    def _keep_better(self) -> None:
        noise = self.guide.flow.base().sample((_COMPARE,))
        trained = {k: v.clone() for k, v in self.guide.state_dict().items()}
        elbos = []
        for state in (self.affine_state, trained):
            self.guide.load_state_dict(state)
            x, ladj = self.guide.flow.transform.forward_and_ladj(noise)
            gap = self.log_joint(x) - self.guide.flow.base().log_prob(noise) + ladj
            gap = gap.nan_to_num(-torch.inf, -torch.inf, -torch.inf)
            elbos.append(torch.where(gap.isinf(), gap, gap.clamp(min=float(gap.median()) - _STRAY)).mean())
        self.evaluations += 2 * _COMPARE
        if not elbos[1] >= elbos[0]:
            self.guide.load_state_dict(self.affine_state)
            pair = f"ELBO {float(elbos[1]):.3f} against {float(elbos[0]):.3f}"
            kept = "its affine layer" if any(h["stage"] == "affine" for h in self.history) else "what it started with"
            self.notes.append(f"the flow did not improve on {kept} ({pair}), which is kept")

    def _train(self, name: str, flow: Flow | StochasticFlow, particles: int, schedule: Schedule, bar: Progress) -> Trainer:
        base = flow.base()
        if isinstance(flow, StochasticFlow):
            flat_flow, step = build_stochastic_step(flow, self.log_joint, self.objective)
        else:
            flat_flow = FlatFlow(flow)
            step = build_step(flat_flow, self.log_joint, "forward_kl" if name == "cover" else self.objective, particles)
        start = flat_flow.read()
        if name not in self.engines:
            wanted = self.resumed.get("engine", self.options.engine)
            if wanted == "auto" and has_fixed_points(flow.layers if isinstance(flow, StochasticFlow) else flow.transform):
                wanted = "eager"  # in a graph a fixed point takes the same many iterations whatever the values, which is far slower
            example = torch.zeros(particles, flow.dim + self.torn).to(start)  # not drawn: a resumed run would then see other numbers
            self.engines[name] = prepare(step, (start, example), wanted, schedule.max_steps, self._obstacle)
        engine = self.engines[name]

        def draw_noise() -> Tensor:
            noise = base.sample((particles,))
            if not self.torn:
                return noise
            power = _LEAST_POWER ** max(0.0, 1 - 1.1 * trainer.step / schedule.max_steps) if name == "tempered" else 1.0
            return torch.cat([noise, torch.full_like(noise[:, :1], power)], 1)

        trainer = Trainer(engine, draw_noise, start, schedule)
        if "trainer" in self.resumed:
            trainer.restore(self.resumed["trainer"])
            restore_random_state(self.resumed)

        def report(trainer: Trainer, elbo: float, spread: float) -> None:
            record = {"stage": name, "step": trainer.step, "elbo": elbo, "spread": spread, "lr": trainer.adam.param_groups[0]["lr"]}
            self.history.append(record)
            bar.step(trainer.step, trainer.last_step, f"ELBO {elbo:.3f}, spread {spread**0.5:.3f}")
            if self.options.checkpoint is not None:
                spent = [trainer.step * particles, trainer.dropped]
                self.last = {"trainer": trainer.state(), "stage": name, "engine": engine.name, "spent": spent, **random_state()}
                self._save(**self.last)
            for callback in self.options.callbacks:
                callback(record)

        try:
            trainer.run(report)
        finally:
            self.evaluations += trainer.step * particles  # those before a checkpoint too, which has not counted them
            flat_flow.write(trainer.flat.detach() if name == "tempered" else trainer.best_flat)  # there, the target was another one
            self.dropped += trainer.dropped
        return trainer

    # Checkpoints

    def _save(self, **stage: Any) -> None:
        if self.options.checkpoint is not None:
            run = {name: getattr(self, name) for name in _KEPT}
            self.options.checkpoint.save(self.guide, {"run": run, "max_steps": self.options.max_steps, **stage})

    def _load(self) -> None:
        content = self.options.checkpoint.load(self.guide) if self.options.checkpoint is not None else None
        if content is not None:
            for key, value in content["run"].items():
                setattr(self, key, value)
            stage = content.get("stage")  # that the trainer belongs to
            self.last = {key: content[key] for key in _LAST} if "trainer" in content else {}  # to be saved again if no step follows
            if stage not in self.finished:
                self.resumed = content
            elif "flow" in self.finished and self.options.max_steps > content["max_steps"]:  # the whole run had ended
                self._reopen(stage, content)

    def _reopen(self, stage: str, content: dict[str, Any]) -> None:
        """Let a finished stage go on where it ended, within a larger ``max_steps``."""
        if stage == "flow" or not self._foldable:
            self.resumed = content
            self.evaluations -= content["spent"][0]  # the trainer goes on counting from its first step
            self.dropped -= content["spent"][1]
        elif not self.converged:
            self.rounds = 0
        else:
            return
        self.finished = [name for name in self.finished if name not in (stage, "flow")]
        self.notes = []
