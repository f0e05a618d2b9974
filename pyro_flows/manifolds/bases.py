"""The uniform distributions of tori and of every manifold, as what flows start from."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..errors import OptionError
from .distribution import UniformOn
from .geometry import Simplex, Torus
from .manifold import Manifold

__all__ = ["UniformTorus", "Uniform", "Dirichlet"]


class UniformTorus(UniformOn):
    r"""The uniform distribution of :math:`d` angles: log density :math:`-d\log 2\pi` under :math:`d\theta_1\cdots d\theta_d`.

    Args:
        d: number of angles.
        dtype, device: of the draws and densities.
    """

    def __init__(self, d: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None, validate_args: bool | None = None) -> None:
        super().__init__(Torus(d), dtype, device, validate_args)


class Uniform(nn.Module):
    """The uniform distribution on a manifold, as a base of flows; calling it gives the Pyro distribution.

    Args:
        manifold: a sphere, a simplex or a torus.

    Raises:
        OptionError: something else.

    Example:
        >>> from pyro_flows.manifolds import Sphere
        >>> Uniform(Sphere(3))().event_shape
        torch.Size([3])
    """

    zero: Tensor

    def __init__(self, manifold: Manifold) -> None:
        super().__init__()
        if not isinstance(manifold, Manifold):
            raise OptionError(f"Uniform: give a Sphere, a Simplex or a Torus, got {manifold!r}")
        manifold.uniform()  # an error now, where there is none
        self.manifold, self.dim = manifold, manifold.size
        self.register_buffer("zero", torch.zeros(manifold.size), persistent=False)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return self.manifold.uniform(self.zero.dtype, self.zero.device)

    def extra_repr(self) -> str:
        return repr(self.manifold)


class Dirichlet(nn.Module):
    """Dirichlet's distribution as a base of flows, with free concentrations; calling it gives the Pyro distribution.

    Args:
        n: number of parts.
        concentration: where all concentrations start, positive.
        trainable: whether they are learned.

    Raises:
        OptionError: a concentration that is not positive.

    Example:
        >>> Dirichlet(3)().event_shape
        torch.Size([3])
    """

    log_concentration: Tensor

    def __init__(self, n: int, concentration: float = 1.0, trainable: bool = True) -> None:
        super().__init__()
        if not isinstance(concentration, int | float) or not 0 < concentration < float("inf"):
            raise OptionError(f"Dirichlet: concentration must be a positive number, got {concentration!r}")
        self.manifold, self.dim = Simplex(n), n
        start = torch.full((n,), float(concentration)).log()
        if trainable:
            self.log_concentration = nn.Parameter(start)
        else:
            self.register_buffer("log_concentration", start)

    def forward(self, context: Tensor | None = None) -> dist.TorchDistribution:
        return dist.Dirichlet(self.log_concentration.exp(), validate_args=False)

    def extra_repr(self) -> str:
        return repr(self.manifold)
