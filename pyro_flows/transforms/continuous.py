"""Continuous flows: points that move with a velocity that a net gives, for one unit of time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CaptureError, OptionError, ShapeError
from ..nets import VelocityMLP
from ..nets.velocity import Time
from ..numerics import Divergence, Solver, draw_probe, estimated_divergence, exact_divergence, integrate, reverse_products
from ..numerics.introspection import tensors_of
from ..numerics.random import seeded
from ..numerics.trace import NOISES
from .base import FlowTransform

__all__ = ["ContinuousFlow", "Solution"]

EXACT_PRODUCTS = 128  # that an exact trace may cost an evaluation, which then takes some hundred times as long as the net alone


class Solution(NamedTuple):
    """What one solve gives: the other end of each path, the log-det of the map, and the integrals that make paths simple.

    Attributes:
        value: the points ``(*batch, D)`` where the paths end.
        ladj: log absolute determinant of the map that was applied, ``(*batch,)``.
        kinetic: :math:`\\int \\|f\\|^2 dt` along each path, ``(*batch,)``; zeros where it was not asked for.
        jacobian: :math:`\\int \\|\\partial f / \\partial z\\|_F^2 dt`, likewise.
        evaluations: how often the net was evaluated.
    """

    value: Tensor
    ladj: Tensor
    kinetic: Tensor
    jacobian: Tensor
    evaluations: int


class ContinuousFlow(FlowTransform):
    r"""Moves points with a velocity that a net gives: :math:`y = z(1)`, where :math:`\dot z = f(t, z, c)` and :math:`z(0) = x` (FFJORD).

    .. math:: \log\left|\det \frac{\partial y}{\partial x}\right| = \int_0^1 \operatorname{tr} \frac{\partial f}{\partial z}\,dt

    The inverse runs the time from 1 to 0. Both directions and the log-det are differentiable in points, parameters and context.

    Args:
        dim: number of coordinates :math:`D`.
        net: the velocity, a module with ``net(t, x)``, or ``net(t, x, context)`` for a conditional flow, where ``t`` is a number or a tensor that
            broadcasts to ``(*batch, 1)``. By default a :class:`~pyro_flows.nets.VelocityMLP`. A net may know its own trace
            (``velocity_and_trace``, and ``trace_products`` where that is not free) or its own Jacobian products (``products``), as those of
            :mod:`pyro_flows.nets` do; else they are found by vjps.
        context_dim: size of the context :math:`c`; 0 for none.
        trace: ``"exact"``, at the cost of ``D`` products of the Jacobian an evaluation where the net does not know it (a
            :class:`~pyro_flows.nets.PotentialNet` takes no more than its width), or ``"hutchinson"``: one
            product, with noise. The log-det is then an unbiased estimate, and a density is random.
        noise: of Hutchinson's estimate, see :func:`~pyro_flows.numerics.draw_probe`: one direction a point, the same along the whole path, drawn
            anew in each call from torch's generator.
        solver, steps, rtol, atol, adjoint, checkpoint: see :class:`~pyro_flows.numerics.Solver`. An adaptive solver chooses the steps for the whole
            batch at once, so a result depends on the rest of its batch within the tolerance.

    Adaptive solvers look at values, so ``torch.func``, graph capture and ``torch.compile`` refuse them; ``"rk4"`` and the others of fixed steps are
    plain sequences of operations. The log-det is that of the equation, which the map of a solver has up to the solver's error:
    :func:`~pyro_flows.diagnostics.check_ode` measures it. Under ``vmap`` Hutchinson's noise needs ``randomness="different"``.

    Cost: an evaluation of net and trace a stage: four a step of ``"rk4"``, six of ``"dopri5"``. Starts at the identity where the net starts at zero.

    Raises:
        OptionError: options that are not known, or an exact trace, or with it a Jacobian penalty, that would take more than 128 products an
            evaluation.
        ShapeError: a net that gives another size.
        IntegrationError: the solver did not arrive: at which time, and where.

    References: FFJORD: free-form continuous dynamics for scalable reversible generative models (Grathwohl et al., 2018),
    https://arxiv.org/abs/1810.01367; Neural ordinary differential equations (Chen et al., 2018), https://arxiv.org/abs/1806.07366

    Example:
        >>> import torch
        >>> flow = ContinuousFlow(2, solver="rk4", steps=4)
        >>> y, ladj = flow.forward_and_ladj(torch.ones(3, 2))
        >>> y.shape, ladj.shape, flow.solve(torch.ones(3, 2)).evaluations
        (torch.Size([3, 2]), torch.Size([3]), 16)
    """

    def __init__(
        self,
        dim: int,
        net: nn.Module | None = None,
        context_dim: int = 0,
        trace: Literal["exact", "hutchinson"] = "exact",
        noise: Literal["rademacher", "gaussian", "sphere"] = "rademacher",
        solver: str = "dopri5",
        steps: int = 20,
        rtol: float = 1e-5,
        atol: float = 1e-5,
        adjoint: bool = False,
        checkpoint: int = 0,
    ) -> None:
        super().__init__(dim, context_dim)
        if trace not in ("exact", "hutchinson"):
            raise OptionError(f'ContinuousFlow: trace must be "exact" or "hutchinson", got {trace!r}')
        if noise not in NOISES:
            raise OptionError(f"ContinuousFlow: noise={noise!r} is not known: choose one of {', '.join(NOISES)}")
        self.solver = Solver(solver, steps, rtol, atol, adjoint, checkpoint)
        self.net = VelocityMLP(dim, context_dim) if net is None else net
        self.trace, self.noise = trace, noise
        products = getattr(self.net, "trace_products", 0 if hasattr(self.net, "velocity_and_trace") else dim)
        if trace == "exact" and products > EXACT_PRODUCTS:
            raise OptionError(
                f"ContinuousFlow: an exact trace of {type(self.net).__name__} in {dim} dimensions takes {products} products an evaluation, more than "
                f'{EXACT_PRODUCTS}: use trace="hutchinson", or a net that knows its trace: a VelocityMLP of two hidden layers, an '
                f"AutoregressiveVelocity, or a PotentialNet of width {EXACT_PRODUCTS} or less"
            )
        self._check_net()

    def _check_net(self) -> None:
        if not isinstance(self.net, nn.Module):
            raise OptionError(f"ContinuousFlow: net must be a module, got {type(self.net).__name__}")
        like = next((p for p in self.net.parameters() if p.is_floating_point()), torch.zeros(()))
        x, context = like.new_zeros(2, self.dim), like.new_zeros(2, self.context_dim) if self.context_dim else None
        call = "net(t, x, context)" if self.context_dim else "net(t, x)"
        try:
            with torch.no_grad(), seeded():
                out = self.velocity(0.5, x, context)
        except Exception as error:
            text = " ".join(str(error).split())[:200]
            raise ShapeError(f"ContinuousFlow: {call} failed at x of shape (2, {self.dim}): {type(error).__name__}: {text}") from error
        if not isinstance(out, Tensor) or out.shape != x.shape:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ShapeError(f"ContinuousFlow: {call} must give the shape of x, (*batch, {self.dim}); for x of shape (2, {self.dim}) it gave {got}")

    def extra_repr(self) -> str:
        s = self.solver
        how = f"steps={s.steps}" if s.is_fixed else f"rtol={s.rtol:g}, atol={s.atol:g}"
        return f"{super().extra_repr()}, trace={self.trace!r}, solver={s.method!r}, {how}"

    @property
    def ode(self) -> tuple[Any, bool] | None:
        return self, False

    def check_compilable(self) -> None:
        if not self.solver.is_fixed:
            raise OptionError(
                f'compiled() needs fixed steps, such as solver="rk4": solver={self.solver.method!r} chooses its own by the values it meets'
            )

    def velocity(self, t: Time, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The velocity ``(*batch, D)`` at time ``t`` in ``[0, 1]``, a number or a tensor that broadcasts to ``(*batch, 1)``."""
        return self.net(t, x) if context is None else self.net(t, x, context)

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        solution = self._solve(x, context, 0.0, 1.0)
        return solution.value, solution.ladj

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        solution = self._solve(y, context, 1.0, 0.0)
        return solution.value, solution.ladj

    def solve(
        self, value: Tensor, context: Tensor | None = None, inverse: bool = False, regularize: bool = False, probe: Tensor | None = None
    ) -> Solution:
        """Map points, and say what that took: the map of ``forward_and_ladj``, or of ``inverse_and_ladj``.

        Args:
            value: points ``(*batch, D)``.
            context: ``(*batch, C)`` for a conditional flow.
            inverse: whether to run from 1 to 0.
            regularize: whether to integrate :attr:`Solution.kinetic` and :attr:`Solution.jacobian` as well.
            probe: the random directions of Hutchinson's estimate, ``(*batch, D)``, in place of fresh ones.

        Raises:
            OptionError: a ``probe`` where the trace is exact.
        """
        if probe is not None and self.trace == "exact":
            raise OptionError('ContinuousFlow: probe= is the noise of trace="hutchinson", and this trace is exact')
        value, context = self._check(value, context)
        start, end = (1.0, 0.0) if inverse else (0.0, 1.0)
        return self._solve(value, context, start, end, regularize, probe)

    def regularization(self, y: Tensor, context: Tensor | None = None) -> Solution:
        r"""The inverse map with the two penalties of RNODE, in one solve: kinetic energy, and the Jacobian's squared Frobenius norm.

        With Hutchinson's trace the norm is estimated by :math:`\|Jv\|^2`, with the noise of the trace. Straight paths at even speed, which have the
        least kinetic energy, take fewer steps to integrate; :func:`~pyro_flows.density.fit_density` has weights for both.

        Reference: How to train your neural ODE: the world of Jacobian and kinetic regularization (Finlay et al., 2020),
        https://arxiv.org/abs/2002.02798
        """
        return self.solve(y, context, inverse=True, regularize=True)

    def between(self, start: Tensor, end: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Where the straight path from ``start`` to ``end`` is at time ``t`` in ``[0, 1]``, and its velocity: what flow matching learns from."""
        return (1 - t) * start + t * end, end - start

    @torch.no_grad()
    def path(self, x: Tensor, context: Tensor | None = None, points: int = 50) -> Tensor:
        """The way of each point from time 0 to 1, at evenly spaced times: ``(points, *batch, D)``."""
        x, context = self._check(x, context)
        times = torch.linspace(0, 1, points).tolist()
        states = [x]
        solver = replace(self.solver, adjoint=False, checkpoint=0, steps=max(1, -(-self.solver.steps // max(1, points - 1))))
        for a, b in zip(times, times[1:], strict=False):
            states.append(integrate(lambda t, z: self.velocity(t, z, context), states[-1], a, b, solver)[0])
        return torch.stack(states)

    def forward_with_score(self, x: Tensor, score: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""The forward map, its log-det, and the score of the mapped points' density, from that of ``x``, in one solve of :math:`(z, s)`.

        .. math:: \dot s = -\left(\frac{\partial f}{\partial z}\right)^{\!\top} s - \nabla_z \operatorname{tr} \frac{\partial f}{\partial z}

        Reference: Path-gradient estimators for continuous normalizing flows (Vaitl et al., 2022), https://arxiv.org/abs/2206.09016
        """
        x, _ = self._check(x, None)
        dim, divergence = self.dim, self._divergence(None, self._probe(x))

        def field(t: Time, state: Tensor) -> Tensor:
            z, s = state[..., :dim], state[..., dim + 1 :]
            (velocity, trace), pull = torch.func.vjp(lambda z: divergence(t, z)[:2], z)  # type: ignore[misc]
            return torch.cat([velocity, trace.unsqueeze(-1), -pull((s, torch.ones_like(trace)))[0]], -1)

        state = torch.cat([x, torch.zeros_like(x[..., :1]), score], -1)
        state = integrate(self._with_same_parameters(field), state, 0.0, 1.0, self.solver, tuple(self.net.parameters()))[0]
        return state[..., :dim], state[..., dim], state[..., dim + 1 :]

    def _with_same_parameters(self, field: Callable[[Time, Tensor], Tensor]) -> Callable[[Time, Tensor], Tensor]:
        """A field that the backward pass evaluates again, if it does, which then must have the parameters of the forward one."""
        if not (self.solver.adjoint or self.solver.checkpoint):
            return field
        own = tensors_of(self.net)

        def checked(t: Time, state: Tensor) -> Tensor:
            if any(a is not b for a, b in zip(own, tensors_of(self.net), strict=True)):
                raise CaptureError(
                    "the net's parameters were replaced since the forward solve, as by torch.func.functional_call, so the adjoint or a checkpoint "
                    "would differentiate another net: use adjoint=False and checkpoint=0"
                )
            return field(t, state)

        return checked

    def _probe(self, x: Tensor) -> Tensor | None:
        return draw_probe(self.noise, x) if self.trace == "hutchinson" else None

    def _divergence(self, context: Tensor | None, probe: Tensor | None, norm: bool = False) -> Callable[[Time, Tensor], Divergence]:
        """Velocity and trace, and with ``norm`` the Jacobian's squared norm, as a function of time and point."""
        net: Any = self.net

        def divergence(t: Time, z: Tensor) -> Divergence:
            if probe is None and not norm and hasattr(net, "velocity_and_trace"):
                velocity, trace = net.velocity_and_trace(t, z, context)
                return Divergence(velocity, trace, trace)
            if hasattr(net, "products"):
                products = lambda x, directions: net.products(t, x, directions, context)  # noqa: E731
            else:
                products = reverse_products(lambda x: self.velocity(t, x, context))
            return exact_divergence(products, z) if probe is None else estimated_divergence(products, z, probe)

        return divergence

    def _solve(
        self, value: Tensor, context: Tensor | None, start: float, end: float, regularize: bool = False, probe: Tensor | None = None
    ) -> Solution:
        if regularize and self.trace == "exact" and self.dim > EXACT_PRODUCTS:
            raise OptionError(
                f"ContinuousFlow: the exact norm of a Jacobian in {self.dim} dimensions takes {self.dim} products an evaluation, more than "
                f'{EXACT_PRODUCTS}: use trace="hutchinson"'
            )
        probe = self._probe(value) if probe is None else probe
        dim, divergence = self.dim, self._divergence(context, probe, regularize)

        def field(t: Time, state: Tensor) -> Tensor:
            velocity, trace, norm = divergence(t, state[..., :dim])
            parts = [velocity, trace.unsqueeze(-1)]
            if regularize:
                parts += [(velocity**2).sum(-1, keepdim=True), norm.unsqueeze(-1)]
            return torch.cat(parts, -1)

        state = torch.cat([value, value.new_zeros(value.shape[:-1] + (3 if regularize else 1,))], -1)
        learned = [*self.net.parameters()] + ([] if context is None else [context])
        state, evaluations = integrate(self._with_same_parameters(field), state, start, end, self.solver, learned)
        value, ladj = state[..., :dim].contiguous(), state[..., dim].contiguous()
        zero = torch.zeros_like(ladj)
        kinetic, jacobian = ((end - start) * state[..., dim + 1], (end - start) * state[..., dim + 2]) if regularize else (zero, zero)
        return Solution(value, ladj, kinetic, jacobian, evaluations)
