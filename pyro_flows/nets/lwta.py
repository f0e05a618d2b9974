"""The activation of local competitions: one unit of each block passes its value on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import OptionError, ShapeError

__all__ = ["LWTA"]


class LWTA(nn.Module):
    r"""Local winner takes all: units come in blocks, and only a block's winner :math:`\xi` keeps its value, :math:`y_u = [u = \xi]\, a_u`.

    Args:
        units: units of a block.
        winners: who wins. ``"max"``: the largest. ``"expected"``: all, in proportion to their chances, :math:`y = \mathrm{softmax}(a) \odot a`.
            ``"sample"``: a draw, :math:`\xi \sim \mathrm{softmax}(a)`; in training a relaxed one (Concrete), which has a gradient.
        temperature: of the relaxed draw.

    Use it as ``activation=lambda: LWTA(4)`` of an ``MLP``; hidden widths must be multiples of ``units``. A masked net cannot have it: a block
    would mix units that may see different inputs.

    **In the conditioner of a flow this makes no stochastic flow.** With ``"max"`` the flow stays a bijection almost everywhere, which tears
    space where winners change and trains badly. With ``"sample"`` forward and inverse draw different winners, so they are no inverses; a density
    is then a bound from noise that does not look at the moved coordinates. That bound is linear in the winners' probabilities, so its best value is
    reached by a deterministic gate: the noise buys nothing. Random winners that do are those of
    :class:`~pyro_flows.stochastic.LWTACoupling`, whose posterior sees the point.

    Shape: ``(*batch, H) -> (*batch, H)``.

    Raises:
        ShapeError: ``H`` is no multiple of ``units``.
        OptionError: fewer than two units, unknown ``winners``, or a temperature that is not positive.

    References: Compete to compute (Srivastava et al., 2013), NeurIPS 26; Nonparametric Bayesian deep networks with local competition (Panousis et
    al., 2019), https://arxiv.org/abs/1805.07624

    Example:
        >>> LWTA(2)(torch.tensor([1.0, 3.0, -1.0, -2.0])).tolist()
        [0.0, 3.0, -1.0, 0.0]
    """

    elementwise = False

    def __init__(self, units: int = 2, winners: Literal["max", "expected", "sample"] = "max", temperature: float = 0.67) -> None:
        super().__init__()
        if not isinstance(units, int) or units < 2:
            raise OptionError(f"LWTA: units must be an integer of at least 2, got {units!r}")
        if winners not in ("max", "expected", "sample"):
            raise OptionError(f'LWTA: winners must be "max", "expected" or "sample", got {winners!r}')
        if not temperature > 0:
            raise OptionError(f"LWTA: temperature must be positive, got {temperature}")
        self.units, self.winners, self.temperature = units, winners, temperature

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % self.units:
            raise ShapeError(f"LWTA: {x.shape[-1]} features do not fall into blocks of {self.units}: make the width a multiple of units")
        blocks = x.unflatten(-1, (-1, self.units))
        if self.winners == "expected":
            share = blocks.softmax(-1)
        elif self.winners == "max":
            share = nn.functional.one_hot(blocks.argmax(-1), self.units).to(x)
        else:
            gumbel = blocks.log_softmax(-1) - torch.empty_like(blocks).exponential_().log()
            relaxed = (gumbel / self.temperature).softmax(-1)
            share = relaxed if self.training else nn.functional.one_hot(gumbel.argmax(-1), self.units).to(x)
        return (share * blocks).flatten(-2)

    def extra_repr(self) -> str:
        """Options."""
        return f"units={self.units}, winners={self.winners!r}"
