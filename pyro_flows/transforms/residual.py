"""Contractive residual layers: the identity plus a net whose Lipschitz constant is below one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import OptionError
from ..nets import LipschitzMLP
from ..nets.lipschitz import Norm
from ..numerics import FixedPoint, estimate_log_det, fixed_point, log_det
from .base import FlowTransform

__all__ = ["ContractiveResidual"]

EXACT_DIM = 8  # up to here the exact log-det costs no more than the estimate


class ContractiveResidual(FlowTransform):
    r"""Adds to the identity a net that contracts: :math:`v = u + g(u, c)` with :math:`\operatorname{Lip}_u(g) \le L < 1` (i-ResNet, Residual Flow).

    With ``direction="density"`` :math:`u = y` is the target side: the inverse, and so a density, takes one pass. With ``direction="sampling"``
    :math:`u = x`: the forward map takes one pass. The other direction is a fixed point, :math:`u = v - g(u, c)`, found by Anderson's acceleration to
    rounding and differentiated implicitly; :meth:`solve` reports its iterations and residual.

    The log-det is exact up to ``D = 8``. Beyond, it is the unbiased estimate of :func:`~pyro_flows.numerics.estimate_log_det`, from one random probe
    a point and a series cut at random, both drawn anew in each call from torch's generator: after 2 terms while training and 20 in evaluation mode,
    and then where a :class:`~pyro_flows.numerics.Roulette` says, which looks at how fast the terms shrink. Value and gradient are unbiased
    and have finite variance in both modes; the more a layer contracts, the more terms it takes.

    Args:
        dim: number of coordinates :math:`D`.
        context_dim: size of the context :math:`c`, which is added to the biases; 0 for none.
        direction: ``"density"`` or ``"sampling"``: which direction takes one pass.
        hidden_features: widths of the net's hidden layers.
        lipschitz: the bound :math:`L` in ``(0, 1)``. The log-det of a layer lies between :math:`D \log(1 - L)` and :math:`D \log(1 + L)`.
        norm: the :math:`p` of the norm in which the net contracts, from 1 to infinity; ``"learned"``; or one for the input of each of the net's
            layers (mixed norms, of which the first is that of the whole).
        log_det: ``"exact"``, ``"estimate"``, or ``"auto"``: exact up to ``D = 8``. It may be set later: ``flow.transform[0].log_det = "exact"``.

    Cost: one pass of the net and ``D`` vjps (exact), about 3 (estimated, training) or 21 (estimated, evaluation) in the named direction,
    more where the net's Jacobian comes near the bound, up to :math:`1 / (1 - L)` more; 10 to 40 passes more in the other. Starts at the identity.

    Under ``vmap`` an estimate needs ``randomness="different"``. There, and in captured and compiled graphs, an estimate has 20 terms, since their
    number must be fixed, and a fixed point has 10 iterations and 8 Newton steps, with NaN where they are not enough.

    Raises:
        InversionError: the fixed point did not converge: how far it got, and where.

    References: Invertible residual networks (Behrmann et al., 2018), https://arxiv.org/abs/1811.00995;
    Residual flows for invertible generative modeling (Chen et al., 2019), https://arxiv.org/abs/1906.02735
    """

    implicit = True

    def __init__(
        self,
        dim: int,
        context_dim: int = 0,
        direction: Literal["density", "sampling"] = "density",
        hidden_features: Sequence[int] = (64, 64),
        lipschitz: float = 0.97,
        norm: Norm = 2.0,
        log_det: Literal["auto", "exact", "estimate"] = "auto",
    ) -> None:
        super().__init__(dim, context_dim)
        if direction not in ("density", "sampling"):
            raise OptionError(f'ContractiveResidual: direction must be "density" or "sampling", got {direction!r}')
        if not 0 < lipschitz < 1:
            raise OptionError(f"ContractiveResidual: lipschitz must lie between 0 and 1, got {lipschitz}")
        if log_det not in ("auto", "exact", "estimate"):
            raise OptionError(f'ContractiveResidual: log_det must be "auto", "exact" or "estimate", got {log_det!r}')
        self.direction: Literal["density", "sampling"] = direction
        self.log_det: Literal["auto", "exact", "estimate"] = log_det
        self.one_pass = "inverse" if direction == "density" else "forward"
        self.net = LipschitzMLP(dim, dim, hidden_features, context_dim, lipschitz, norm)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, direction={self.direction!r}, log_det={self.log_det!r}"

    def _prefer_exact(self) -> None:
        if self.log_det == "auto":
            self.log_det = "exact"

    def forward_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._add(x, context) if self.direction == "sampling" else self._subtract(x, context)

    def inverse_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._add(y, context) if self.direction == "density" else self._subtract(y, context)

    def solve(self, v: Tensor, context: Tensor | None = None) -> FixedPoint:
        """The point ``u`` with ``u + g(u, context) = v``, with the iterations and the residual of each row."""
        v, context = self._check(v, context)
        return self._solve(v, self.net.tensors(context))

    def _solve(self, v: Tensor, tensors: tuple[Tensor, ...]) -> FixedPoint:
        return fixed_point(lambda u, v, *tensors: v - self.net.evaluate(u, *tensors), v.detach(), (v, *tensors))

    def _add(self, u: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = self.net.tensors(context)
        return u + self.net.evaluate(u, *tensors), self._ladj(u, tensors)

    def _subtract(self, v: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        tensors = self.net.tensors(context)
        u = self._solve(v, tensors).value
        return u, -self._ladj(u, tensors)

    def _ladj(self, u: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        if self.log_det == "exact" or (self.log_det == "auto" and self.dim <= EXACT_DIM):
            return log_det(lambda u: self.net.evaluate(u, *tensors), u)
        probe = torch.randn_like(u).sign()
        return estimate_log_det(self.net.evaluate, u, tensors, probe, 2 if self.training else 20)
