"""Bijections of R^D as Pyro transform modules, one family a file; :mod:`~pyro_flows.transforms.base` holds the contract."""

from .affine import Affine
from .autoregressive import Autoregressive
from .base import Conditioned, FlowTransform, Inverse
from .block_autoregressive import BlockAutoregressive
from .circulant import CirculantLinear
from .compose import Compose
from .continuous import ContinuousFlow
from .coupling import Coupling
from .elementwise import Elementwise
from .embedded import Embedded
from .linear import Linear
from .low_rank import LowRankLinear
from .lu import BlockDiagonalLinear, LULinear
from .normalization import ActNorm, BatchNorm
from .orthogonal import OrthogonalLinear, QRLinear
from .permutation import Permutation
from .planar import Planar
from .radial import Radial
from .residual import ContractiveResidual
from .sylvester import Sylvester
from .triangular import Standardize, TriangularLinear

__all__ = [
    "FlowTransform",
    "Conditioned",
    "Inverse",
    "Affine",
    "Elementwise",
    "Coupling",
    "Autoregressive",
    "Linear",
    "TriangularLinear",
    "Standardize",
    "LULinear",
    "BlockDiagonalLinear",
    "OrthogonalLinear",
    "QRLinear",
    "LowRankLinear",
    "CirculantLinear",
    "ActNorm",
    "BatchNorm",
    "Permutation",
    "Planar",
    "Radial",
    "Sylvester",
    "BlockAutoregressive",
    "ContractiveResidual",
    "ContinuousFlow",
    "Embedded",
    "Compose",
]
