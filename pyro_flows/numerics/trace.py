"""The trace of a vector field's Jacobian, and its Frobenius norm, with the field itself: exactly, or estimated from one random direction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import vjp, vmap

from ..errors import OptionError
from .log_det import Map

__all__ = ["NOISES", "Divergence", "draw_probe", "estimated_divergence", "exact_divergence", "reverse_products"]

# (x, directions (K, *batch, D)) -> the field at x (*batch, D), and J v or v J for each direction (K, *batch, D)
Products = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Divergence(NamedTuple):
    """A field at points ``(*batch, D)``, and of its Jacobian the trace and the squared Frobenius norm, ``(*batch,)``."""

    value: Tensor
    trace: Tensor
    norm: Tensor


def reverse_products(f: Map) -> Products:
    """The products ``v J`` of any map whose rows do not influence each other, by reverse-mode differentiation. Cost: one vjp a direction."""

    def products(x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        value, pull = vjp(f, x)  # type: ignore[misc]
        return value, vmap(lambda v: pull(v.expand_as(value))[0])(directions)

    return products


def exact_divergence(products: Products, x: Tensor) -> Divergence:
    """Trace and norm from all ``D`` products with the unit vectors."""
    units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    value, jacobian = products(x, units.view(-1, *[1] * (x.dim() - 1), x.shape[-1]))
    return Divergence(value, jacobian.diagonal(dim1=0, dim2=-1).sum(-1), (jacobian**2).sum((0, -1)))


def estimated_divergence(products: Products, x: Tensor, probe: Tensor) -> Divergence:
    r"""Hutchinson's estimates :math:`v^\top J v` and :math:`\|Jv\|^2`, unbiased for probes :math:`v` with :math:`E vv^\top = I`.

    Shape: ``x, probe (*batch, D)``. Cost: one product.

    References: A stochastic estimator of the trace of the influence matrix (Hutchinson, 1990), https://doi.org/10.1080/03610919008812866;
    FFJORD (Grathwohl et al., 2018), https://arxiv.org/abs/1810.01367
    """
    value, (product,) = products(x, probe.unsqueeze(0))
    return Divergence(value, (product * probe).sum(-1), (product**2).sum(-1))


def _gaussian(x: Tensor) -> Tensor:
    return torch.randn_like(x)


def _rademacher(x: Tensor) -> Tensor:
    return torch.where(torch.rand_like(x) < 0.5, -1.0, 1.0).to(x)


def _sphere(x: Tensor) -> Tensor:
    noise = torch.randn_like(x)
    return noise * (x.shape[-1] ** 0.5 / noise.norm(dim=-1, keepdim=True))


NOISES: dict[str, Callable[[Tensor], Tensor]] = {"rademacher": _rademacher, "gaussian": _gaussian, "sphere": _sphere}


def draw_probe(noise: str, x: Tensor) -> Tensor:
    r"""Random directions of the shape of ``x`` with :math:`E vv^\top = I`, from torch's generator.

    For a symmetric Jacobian :math:`S` the estimate :math:`v^\top S v` has variance :math:`2\|S\|_F^2` with ``"gaussian"`` noise,
    :math:`2\sum_{i \ne j} S_{ij}^2`, the least of all independent noises, with ``"rademacher"``, and with ``"sphere"`` (uniform on the sphere of
    radius :math:`\sqrt D`) :math:`2 (\|S\|_F^2 - (\operatorname{tr} S)^2 / D)\, D / (D + 2)`. A Jacobian that is not symmetric counts by its
    symmetric part.

    Raises:
        OptionError: an unknown noise.
    """
    if noise not in NOISES:
        raise OptionError(f"noise={noise!r} is not known: choose one of {', '.join(NOISES)}")
    return NOISES[noise](x)
