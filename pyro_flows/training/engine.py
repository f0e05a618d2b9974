"""Three ways to run the same step: Python as it is, a captured graph, a compiled graph."""

from __future__ import annotations

import logging
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CaptureError, OptionError

__all__ = ["ENGINES", "Engine", "capture", "prepare"]

logger = logging.getLogger("pyro_flows")
ENGINES = ("auto", "compiled", "captured", "eager")
Step = Callable[..., tuple[Any, ...]]

# What compilation costs, in seconds, and the share of a captured step that it saves (measured by benchmarks/step.py).
_COMPILE_BASE, _COMPILE_PER_NODE, _COMPILE_SAVES = 5.0, 0.015, 0.5
_COMPILE_MARGIN = 8.0  # most runs end well before their last step, and a busy machine compiles slowly


@dataclass
class Engine:
    """A step ready to run.

    Attributes:
        name: ``"compiled"``, ``"captured"`` or ``"eager"``.
        run: the step.
        seconds: what capture and compilation took.
        reason: why this engine and not a faster one; empty when there is nothing to say.
    """

    name: str
    run: Step
    seconds: float
    reason: str = ""

    def __call__(self, *tensors: Tensor) -> tuple[Any, ...]:
        return self.run(*tensors)


def _has_compiler() -> bool:
    return any(shutil.which(name) for name in ("g++", "c++", "clang++"))


def capture(step: Step, example: tuple[Tensor, ...]) -> torch.fx.GraphModule:
    """The step as a graph of tensor operations, recorded at an example of its inputs.

    Raises:
        CaptureError: it branches on values, or does what cannot be recorded.
    """
    try:
        # make_fx describes every value of the graph by a fake tensor: with one mode at hand for all of them a capture takes a third of the time
        with warnings.catch_warnings(), tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            warnings.simplefilter("ignore")
            graph = make_fx(step)(*example)
    except Exception as error:
        raise CaptureError(f"the step cannot be captured: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if not any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in graph.graph.nodes):
        graph.graph.eliminate_dead_code()  # what is written in place would count as dead in older versions
    graph.recompile()
    return graph


def _scripted(graph: torch.fx.GraphModule, example: tuple[Tensor, ...]) -> Step:
    """The graph run by TorchScript's interpreter instead of Python's: the same kernels in the same order, at less than half the cost a node.

    ``torch.jit.trace`` would do the same, but registers every function for good, with the data that the graph holds: a leak of megabytes a fit.
    """
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # deprecated since torch 2.5, and without a replacement that is as quick to build
            traced, _ = torch.jit._get_trace_graph(graph, example)
            function = torch._C._create_function_from_graph("step", traced)
            constants = tuple(torch.jit._unique_state_dict(graph, keep_vars=True).values())  # become inputs of its own
            function(*example, *constants)
    except Exception as error:
        logger.debug("the graph runs in Python: %s", error)
        return graph
    return lambda *tensors: function(*tensors, *constants)


def _compile(graph: torch.fx.GraphModule, example: tuple[Tensor, ...]) -> Step:
    try:
        compiled = torch.compile(graph, dynamic=False)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # inductor's own deprecations
            compiled(*example)
    except Exception as error:
        raise CaptureError(f"the step cannot be compiled: {type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    return compiled


def _worth_compiling(run: Step, nodes: int, example: tuple[Tensor, ...], expected_steps: int) -> bool:
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.process_time()  # a busy machine must not make a step look slow
            run(*example)
            times.append(time.process_time() - start)
    cost = _COMPILE_BASE + _COMPILE_PER_NODE * nodes
    return expected_steps * min(times) * _COMPILE_SAVES > _COMPILE_MARGIN * cost


def prepare(step: Step, example: tuple[Tensor, ...], engine: str, expected_steps: int, obstacle: str = "") -> Engine:
    """Make an engine for a step.

    Args:
        step: a function of tensors, random-free: all randomness comes in as arguments.
        example: tensors of the shapes that it will see.
        engine: ``"auto"``, ``"compiled"``, ``"captured"`` or ``"eager"``. ``"auto"`` captures where it can and compiles where ``expected_steps`` pay
            for it.
        expected_steps: how often the step will run.
        obstacle: why the step cannot be captured, if that is known beforehand.

    Raises:
        CaptureError: ``"captured"`` or ``"compiled"`` was asked for and is not possible; ``"auto"`` falls back and says why in the log.
        OptionError: an unknown engine.
    """
    if engine not in ENGINES:
        raise OptionError(f"engine={engine!r} is not known: choose one of {', '.join(ENGINES)}")
    if engine == "eager":
        return Engine("eager", step, 0.0, "asked for")
    start = time.perf_counter()
    try:
        if obstacle:
            raise CaptureError(f"the step cannot be captured: {obstacle}")
        graph = capture(step, example)
    except CaptureError as error:
        if engine != "auto":
            raise
        logger.warning("engine='auto' runs eagerly, which is slower: %s", error)
        return Engine("eager", step, time.perf_counter() - start, str(error))
    reason, script = "", _scripted(graph, example)
    if engine == "compiled" or (engine == "auto" and _worth_compiling(script, len(graph.graph.nodes), example, expected_steps)):
        if engine == "auto" and not _has_compiler():
            reason = "no C++ compiler was found, so the captured graph is not compiled"
            logger.info("engine='auto': %s", reason)
        else:
            try:
                return Engine("compiled", _compile(graph, example), time.perf_counter() - start)
            except CaptureError as error:
                if engine == "compiled":
                    raise
                reason = str(error)
                logger.warning("engine='auto' stays with the captured graph: %s", reason)
    return Engine("captured", script, time.perf_counter() - start, reason)
