"""The state of one run of :class:`~pyro_flows.vi.FlowVI`: how a stage is trained, and how a run is saved and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..distributions import Flow
from ..guides import AutoFlow
from ..model.log_joint import LogJoint
from ..numerics.random import random_state, restore_random_state
from ..training.engine import Engine, prepare
from ..training.loop import Loop, Outcome, Window
from ..training.plateau import Plateau
from ..training.progress import Progress
from .objective import Objective
from .objectives import build_step, find_objective
from .options import Options

__all__ = ["Run", "Started", "Trained"]

_KEPT = (  # in a checkpoint
    *("history", "notes", "timings", "finished", "evaluations", "dropped", "converged", "rounds", "before_flow", "modes", "engine_names"),
)
_LAST = ("loop", "stage", "engine", "spent", "random", "cuda")  # in a checkpoint, of the last stage that was trained
_PARALLEL = 2**21  # numbers in a step's trace from which more than one thread pays

Power = Callable[[int], float]  # of the posterior, by step


@dataclass(frozen=True)
class Started:
    """Where the warm start put the guide.

    Attributes:
        elbo: of the Gaussian that was chosen, nats.
        source: where that Gaussian comes from, in words.
        from_descent: whether a descent led to it; otherwise it is the naive start.
        scattered: whether some coordinates start evenly everywhere, and must first find where the posterior is.
    """

    elbo: float
    source: str
    from_descent: bool
    scattered: bool


@dataclass(frozen=True)
class Trained:
    """How a stage ended: whether it converged, and the ELBO and the variance of the log weights over its last window."""

    elbo: float
    spread: float
    converged: bool


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
        options: how to train.
        guide: the guide, set up.
        log_joint: the model's log joint density over the guide's vector.
        default_flow: whether the guide's flow is the one that ``flow="auto"`` makes.

    Attributes:
        stages: the names of the stages, in order.
        objective: what is optimised.
        started, trained: how the warm start and the trained stages ended, by stage.
        modes: points that the warm start met, with Cholesky factors of their covariances.
    """

    def __init__(self, options: Options, guide: AutoFlow, log_joint: LogJoint, default_flow: bool = False) -> None:
        self.options, self.guide, self.log_joint, self.default_flow = options, guide, log_joint, default_flow
        self.stages = guide.stages(options)
        self.objective: Objective = find_objective(guide.objective(options.objective))
        self.started: Started | None = None
        self.trained: dict[str, Trained] = {}
        self.history: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.timings: dict[str, float] = {}
        self.engines: dict[str, Engine] = {}
        self.engine_names: dict[str, str] = {}  # by stage, those before a resume too
        self.evaluations = 0
        self.dropped = 0
        self.converged = True
        self.finished: list[str] = []  # stages
        self.rounds = 0  # of the affine stage
        self.before_flow: dict[str, Tensor] | None = None  # the guide's state
        self.modes: list[tuple[Tensor, Tensor]] = []
        self.resumed: dict[str, Any] = {}
        self.last: dict[str, Any] = {}  # the state of the last stage that was trained, in a checkpoint

    def single_threaded(self) -> Any:
        """A context with one thread, where the model's trace is small."""
        return _threads(self.log_joint.size * self.options.num_particles)

    def warnings(self) -> list[str]:
        """What a user should know about the run, in words."""
        notes = list(self.notes)
        if self.dropped:
            notes.append(f"{self.dropped} particles with a non-finite density or gradient were dropped during training")
        if self.log_joint.frozen:
            names = ", ".join(map(repr, self.log_joint.frozen))
            notes.append(f"pyro.param {names} was held fixed: make it a pyro.sample site, or train it with stock SVI")
        if self.log_joint.mode == "loop":
            notes.append(f"the model ran once for each particle, which is slow: {self.log_joint.reason}")
        return notes

    @property
    def obstacle(self) -> str:
        """Why a step cannot be captured; empty where it can."""
        return self.objective.obstacle or (self.log_joint.reason if self.log_joint.mode == "loop" else "")

    def train(
        self, name: str, flow: Flow, particles: int, schedule: Plateau, bar: Progress, objective: Objective | None = None, power: Power | None = None
    ) -> Trained:
        """Train a flow of the guide as one stage, and put the best state into it, or the last one where ``power`` changes the target on the way.

        Args:
            name: of the stage.
            flow: the flow; the guide shares its parameters.
            particles: draws a step.
            schedule: learning rates and length.
            bar: shows how it goes.
            objective: what is optimised; the run's own when omitted.
            power: of the posterior that the flow is fitted to, by step; 1 when omitted.
        """
        objective = self.objective if objective is None else objective
        base, flat_flow = flow.base(), objective.flat(flow)
        flat = torch.nn.Parameter(flat_flow.read())
        one = torch.ones((), dtype=flat.dtype, device=flat.device)
        engine = self._engine(name, flow, build_step(objective, flat_flow, self.log_joint), (flat.detach(), one), particles, schedule)

        def step() -> Outcome:
            with torch.no_grad():
                at = one if power is None else torch.full_like(one, power(loop.step))
                gradient, elbo, spread, dropped = engine(flat.detach(), base.sample((particles,)), at)
            return Outcome(gradient, float(elbo), float(spread), int(dropped))

        loop = Loop([flat], step, schedule, lambda: flat.detach().clone(), flat.data.copy_)
        if "loop" in self.resumed:
            loop.restore(self.resumed["loop"])
            restore_random_state(self.resumed)

        def report(window: Window) -> None:
            record = {"stage": name, "step": loop.step, "elbo": schedule.elbo, "spread": schedule.spread, "lr": loop.adam.param_groups[0]["lr"]}
            self.history.append(record)
            bar.step(loop.step, schedule.last_step, f"ELBO {schedule.elbo:.3f}, spread {schedule.spread**0.5:.3f}")
            if self.options.checkpoint is not None:
                spent = [loop.step * particles, loop.dropped]
                self.last = {"loop": loop.state(), "stage": name, "engine": engine.name, "spent": spent, **random_state()}
                self.save(**self.last)
            for callback in self.options.callbacks:
                callback(record)

        try:
            loop.run(report)
        finally:
            self.evaluations += loop.step * particles  # those before a checkpoint too, which has not counted them
            flat_flow.write(loop.best if power is None else flat.detach())
            self.dropped += loop.dropped
        self.trained[name] = Trained(schedule.elbo, schedule.spread, schedule.converged)
        return self.trained[name]

    def _engine(self, name: str, flow: Flow, step: Callable[..., Any], inputs: tuple[Tensor, Tensor], particles: int, schedule: Plateau) -> Engine:
        """How the step of a stage runs: prepared once, also where the stage is trained in rounds."""
        if name not in self.engines:
            wanted = self.resumed.get("engine", self.options.engine)
            if wanted == "auto" and flow.has_implicit_layers:
                wanted = "eager"  # in a graph a fixed point takes the same many iterations whatever the values, which is far slower
            flat, one = inputs
            noise = torch.zeros(particles, flow.dim).to(flat)  # not drawn: a resumed run would then see other numbers
            self.engines[name] = prepare(step, (flat, noise, one), wanted, schedule.max_steps, self.obstacle)
            self.engine_names[name] = self.engines[name].name
        return self.engines[name]

    # Checkpoints

    def save(self, **stage: Any) -> None:
        """Write the run to the checkpoint, if there is one."""
        if self.options.checkpoint is not None:
            run = {name: getattr(self, name) for name in _KEPT}
            run["started"] = self.started and asdict(self.started)
            run["trained"] = {name: asdict(result) for name, result in self.trained.items()}
            self.options.checkpoint.save(self.guide, {"run": run, "max_steps": self.options.max_steps, **stage})

    def load(self) -> None:
        """Go on where the checkpoint, if there is one, has left off."""
        content = self.options.checkpoint.load(self.guide) if self.options.checkpoint is not None else None
        if content is None:
            return
        for name in _KEPT:
            setattr(self, name, content["run"][name])
        started = content["run"]["started"]
        self.started = started and Started(**started)
        self.trained = {name: Trained(**result) for name, result in content["run"]["trained"].items()}
        stage = content.get("stage")  # that the loop belongs to
        self.last = {key: content[key] for key in _LAST} if "loop" in content else {}  # to be saved again if no step follows
        if stage not in self.finished:
            self.resumed = content
        elif set(self.stages) <= set(self.finished) and self.options.max_steps > content["max_steps"]:  # the whole run had ended
            self._reopen(stage, content)

    def _reopen(self, stage: str, content: dict[str, Any]) -> None:
        """Let a finished stage go on where it ended, within a larger ``max_steps``."""
        if stage == "flow" or not self.guide.foldable:
            self.resumed = content
            self.evaluations -= content["spent"][0]  # the loop goes on counting from its first step
            self.dropped -= content["spent"][1]
        elif not self.converged:
            self.rounds = 0
        else:
            return
        self.finished = [name for name in self.finished if name not in (stage, "flow")]
        self.notes = []
