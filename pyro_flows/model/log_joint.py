"""The log joint density of a Pyro model as one batched, differentiable function of the unconstrained latent vector."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from ..errors import ModelError, OptionError, ShapeError
from ..numerics.random import seeded
from .context import running, without_init
from .enumeration import EnumeratedDensity, TraceableEnum
from .failures import in_a_line
from .particles import ByAutograd, gather, plainly, same
from .sites import is_deterministic
from .traceable import Traceable, traceable

__all__ = ["LogJoint"]

Tensors = dict[str, Tensor]
_ROUNDING = 1e-5  # relative, of values in float64 that a model computes in float32 in between


class LogJoint:
    r"""The log joint density of a model and its data, over the flat unconstrained vector of a guide.

    For each particle :math:`z \in R^d` the model is conditioned on ``guide.unpack(z)`` and traced, and

    .. math:: \log p(z) = \sum_s \log p(x_s \mid \text{parents}) + \log |\det \partial x / \partial z|,
        \quad x = \text{unpack}(z)

    Discrete latent sites marked ``infer={"enumerate": "parallel"}`` are summed out exactly. The particles go through
    ``torch.func.vmap`` in one pass, so the model needs no plate of its own for them; models that ``vmap`` refuses
    (control flow that depends on a latent value, ``.item()``, draws that nothing conditions) are looped over. Which of
    the two is decided once, at construction, by evaluating three points both ways: two traces and a comparison.

    Args:
        model: a Pyro model, callable as ``model(*args, **kwargs)``, with its observations in place.
        guide: an :class:`~pyro_flows.guides.AutoFlow` of this model after its set-up, or anything with ``latent_dim``,
            ``unpack(z)`` (constrained values by site) and ``unpack_ladj(z)``.
        args, kwargs: the model's arguments.
        mode: ``"auto"``, or ``"vmap"`` or ``"loop"`` to insist.
        max_elements: how many numbers the traces of one chunk of particles may hold; bounds memory for large data.

    Attributes:
        mode: ``"vmap"`` or ``"loop"``.
        reason: why it is ``"loop"``; empty otherwise.
        stochastic: whether the value changes from call to call at the same ``z`` (a subsampled plate, a draw that
            nothing conditions): it is then an unbiased estimate of the log joint at best, and no density.
        size: how many numbers a trace of one particle holds.
        trace: the trace of the model at one point, for names, shapes and plates.
        enumerated: names of the discrete sites that are summed out.
        labels: those behind codes in the arguments, for tables and plots.

    Cost: one run of the model for each chunk of particles under ``vmap``; one for each particle in a loop.

    Raises:
        ModelError: the model itself fails, or draws latent sites that the guide does not have.
        OptionError: an unknown ``mode``.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> class Guide:
        ...     latent_dim = 1
        ...     unpack = staticmethod(lambda z: {"x": z[..., 0]})
        ...     unpack_ladj = staticmethod(lambda z: torch.zeros(z.shape[:-1]))
        >>> def model(y):
        ...     x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> log_joint = LogJoint(model, Guide(), args=(torch.tensor(0.0),))
        >>> log_joint.mode, log_joint(torch.zeros(4, 1)).shape
        ('vmap', torch.Size([4]))
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        mode: str = "auto",
        max_elements: int = 2**22,
    ) -> None:
        if mode not in ("auto", "vmap", "loop"):
            raise OptionError(f'LogJoint: mode must be "auto", "vmap" or "loop", got {mode!r}')
        self.model, self.guide, self.args, self.kwargs = without_init(model), guide, tuple(args), dict(kwargs or {})
        self.latent_dim: int = guide.latent_dim
        self.reason, self.stochastic = "", False
        self.enumerated: tuple[str, ...] = ()
        self._evaluator: EnumeratedDensity | None = None
        self.labels: list[list[str]] = []
        self._fills = False  # whether the model fills tensors in place
        self._enum_model: Callable[..., Any] = self.model
        with seeded(0):
            points = self._probe_points()
            self._read_model(points[0])
            self.size = self._trace_size()
            self._chunk = max(1, max_elements // max(1, self.size))
            self.mode = self._choose_mode(points, mode)
            self._by_autograd = self.mode == "loop" and not self._has_functional_slopes(points)

    def __call__(self, z: Tensor) -> Tensor:
        """Log joint density, Jacobian of the supports' bijections included.

        Args:
            z: unconstrained points, ``(*batch, d)``.

        Returns:
            A tensor of shape ``batch``: nats; ``-inf`` where the model's density is zero. Differentiable.
        """
        self._check(z)
        with running(z.dtype):
            if z.dim() == 1:
                return self._density(z)
            points = z.reshape(-1, self.latent_dim)
            flat = ByAutograd.apply(points, self._densities)[0] if self._by_autograd else self._densities(points)
        return flat.reshape(z.shape[:-1])

    @torch.no_grad()
    def deterministics(self, z: Tensor) -> Tensors:
        """Values of the model's deterministic sites.

        Args:
            z: unconstrained points, ``(N, d)``.

        Returns:
            name -> ``(N, *site_shape)``. Sites that depend on a discrete latent that is summed out are left out.
        """
        return self._by_site(z, self._deterministics, self.deterministic_sites)

    @torch.no_grad()
    def log_likelihood(self, z: Tensor) -> Tensors:
        """Log likelihood of every observation, unscaled, in nats.

        Args:
            z: unconstrained points, ``(N, d)``.

        Returns:
            observed site -> ``(N, *batch_shape)``. ``pyro.factor`` terms and sites whose likelihood depends on a
            discrete latent that is summed out (it is no longer a product over observations) are left out.
        """
        return self._by_site(z, self._log_likelihood, self.likelihood_sites)

    # The model, read once -----------------------------------------------------------------------------------------

    def _probe_points(self) -> Tensor:
        """Three draws of the guide as it stands, or three points around 0."""
        if hasattr(self.guide, "get_posterior"):
            return self.guide.get_posterior().sample((3,)).detach()
        return 0.1 * torch.randn(3, self.latent_dim)

    def _run(self, model: Callable[..., Any], z: Tensor) -> Trace:
        """Trace the model at one particle, hidden from any handler around the call."""
        with poutine.block(), traceable(z, self._fills):
            conditioned = poutine.condition(Traceable()(model), data=self.guide.unpack(z))
            return poutine.trace(conditioned).get_trace(*self.args, **self.kwargs)

    def trace_at(self, z: Tensor) -> Trace:
        """The trace of the model at one unconstrained point ``(d,)``, discrete sites drawn."""
        with torch.no_grad(), running(z.dtype):
            return self._run(self.model, z)

    def _read_model(self, z: Tensor) -> None:
        try:
            with torch.no_grad(), running(z.dtype):
                self.trace = self._run(self.model, z)
                self.trace.compute_log_prob()
        except Exception as error:
            remedy = "Check the data against the likelihoods"
            raise ModelError(f"the model failed while its log density was evaluated: {in_a_line(error, 600)}. {remedy}") from error
        sites = {k: v for k, v in self.trace.nodes.items() if v["type"] == "sample"}
        self.frozen = [k for k, v in self.trace.nodes.items() if v["type"] == "param"]
        subsampled = self._drawn_rows(z, sites)
        drawn = {k: v for k, v in sites.items() if not v["is_observed"] and not isinstance(v["fn"], _Subsample)}
        summed = {k for k, v in drawn.items() if v["infer"].get("enumerate") == "parallel"}
        free = [k for k in drawn if k not in summed]
        if subsampled:
            self.stochastic = True
            self.reason = f"the value depends on which rows the subsampled plate {subsampled[0]!r} draws"
        elif free:
            self.stochastic = True
            self.reason = f"the guide has no value for the latent site {free[0]!r}, which is drawn anew in every run"
        self.deterministic_sites = [k for k, v in sites.items() if is_deterministic(v)]
        self.likelihood_sites = [
            k
            for k, v in sites.items()
            if v["is_observed"] and k not in self.guide.unpack(z) and not is_deterministic(v)
            and not isinstance(v["fn"], (Unit, _Subsample))
        ]
        if summed:
            self._enumerate(z, summed)

    def _drawn_rows(self, z: Tensor, sites: Mapping[str, Any]) -> list[str]:
        """Subsampled plates that draw their rows; one whose rows are given has the same ones in every run."""
        plates = [k for k, v in sites.items() if isinstance(v["fn"], _Subsample) and len(v["value"]) < v["fn"].size]
        if not plates:
            return plates
        again = self.trace_at(z).nodes
        return [k for k in plates if not torch.equal(torch.as_tensor(again[k]["value"]), torch.as_tensor(sites[k]["value"]))]

    def _enumerate(self, z: Tensor, names: set[str]) -> None:
        """Prepare to sum out discrete sites, as Pyro's own HMC does."""
        sites = [v for v in self.trace.nodes.values() if v["type"] == "sample"]
        dims = [frame.dim for v in sites for frame in v["cond_indep_stack"] if frame.vectorized]
        nesting = -min(dims, default=0)
        self._enum_model = TraceableEnum(first_available_dim=-1 - nesting)(self.model)
        with torch.no_grad(), running(z.dtype):
            trace = self._run(self._enum_model, z)
            self._evaluator = EnumeratedDensity(trace, nesting)
            trace.compute_log_prob()
        self.enumerated = tuple(k for k in self.trace.nodes if k in names)
        same = lambda k, what: trace.nodes[k][what].shape == self.trace.nodes[k][what].shape  # noqa: E731
        self.deterministic_sites = [k for k in self.deterministic_sites if same(k, "value")]
        self.likelihood_sites = [k for k in self.likelihood_sites if same(k, "log_prob")]

    def _trace_size(self) -> int:
        tensors = [v.get(k) for v in self.trace.nodes.values() for k in ("value", "log_prob")]
        return sum(t.numel() for t in tensors if isinstance(t, Tensor))

    # One particle -------------------------------------------------------------------------------------------------

    def _density(self, z: Tensor) -> Tensor:
        trace = self._run(self._enum_model, z)
        total = trace.log_prob_sum() if self._evaluator is None else self._evaluator.log_prob(trace)
        return total + self.guide.unpack_ladj(z)

    def _deterministics(self, z: Tensor) -> Tensors:
        nodes = self._run(self._enum_model, z).nodes
        return {k: nodes[k]["value"] for k in self.deterministic_sites}

    def _log_likelihood(self, z: Tensor) -> Tensors:
        trace = self._run(self._enum_model, z)
        trace.compute_log_prob(lambda name, site: name in self.likelihood_sites)
        nodes = [(k, trace.nodes[k]) for k in self.likelihood_sites]
        return {k: scale_and_mask(node["unscaled_log_prob"], mask=node["mask"]) for k, node in nodes}

    def _densities(self, points: Tensor) -> Tensor:
        return self._map(self._density, points)

    # Many particles -----------------------------------------------------------------------------------------------

    def _choose_mode(self, points: Tensor, wanted: str) -> str:
        """Compare one vmapped call with a loop: some models pass vmap and still compute another value."""
        if wanted == "loop" or self.stochastic:
            self.reason = self.reason or "asked for"
            return "loop"

        def batched(z: Tensor) -> Tensor:
            return torch.func.vmap(self._density)(z)

        with running(points.dtype):
            looped = torch.stack([self._density(z) for z in points]).detach()
            if not same(self._density(points[0]).detach(), looped[0]):
                self.stochastic = True
                self.reason = "the value changes from run to run at the same point: the model draws random numbers"
                return "loop"
            if wanted == "vmap":
                return "vmap"
            values = self._try(batched, points)
        if values is None:
            return "loop"
        if not same(values, looped, _ROUNDING):
            self.reason = "under vmap the model computes another value than for one particle at a time"
            return "loop"
        return "vmap"

    def _try(self, batched: Callable[[Tensor], Tensor], points: Tensor) -> Tensor | None:
        """Values of the vmapped density if it can be differentiated; where it fails, once more with tensors that can be filled in place."""
        for self._fills in (False, True):
            try:
                values, pull = torch.func.vjp(batched, points)[:2]
                pull(torch.ones_like(values))
                self.reason = ""
                return values.detach()
            except Exception as error:
                self.reason = self.reason or f"vmap refused the model: {plainly(error)}"
        self._fills = False
        return None

    def _has_functional_slopes(self, points: Tensor) -> bool:
        """Whether ``torch.func`` can differentiate the model, which some of Pyro's own autograd functions do not allow."""
        try:
            with running(points.dtype):
                torch.func.grad(self._density)(points[0])
        except RuntimeError:
            return False
        return True

    def _map(self, function: Callable[[Tensor], Any], z: Tensor) -> Any:
        """Apply a function of one particle to (N, d): outputs (tensors, or dicts of them) stacked along the front."""
        if self.mode == "loop":
            return gather([function(point) for point in z], torch.stack)
        chunks = z.split(self._chunk) if len(z) > self._chunk else (z,)
        results = [torch.func.vmap(function)(chunk) for chunk in chunks]
        return results[0] if len(results) == 1 else gather(results, torch.cat)

    def _by_site(self, z: Tensor, function: Callable[[Tensor], Tensors], names: list[str]) -> Tensors:
        self._check(z)
        if not names or not len(z):
            return {}
        with running(z.dtype):
            return self._map(function, z)

    def _check(self, z: Tensor) -> None:
        if z.dim() == 0 or z.shape[-1] != self.latent_dim:
            raise ShapeError(f"LogJoint: expected z of shape (*batch, {self.latent_dim}), got {tuple(z.shape)}")

    def __repr__(self) -> str:
        why = f", reason={self.reason!r}" if self.reason else ""
        summed = f", enumerated={self.enumerated}" if self.enumerated else ""
        return f"LogJoint(latent_dim={self.latent_dim}, mode={self.mode!r}{why}{summed})"
