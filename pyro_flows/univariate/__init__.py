"""Increasing maps of the line, of the circle and of an interval, as pure functions of a point and its parameters."""

from .affine import Affine, Shift, soft_clamp
from .base import InvertedByRoot, Univariate
from .circle import CircularGather, CircularShift, MobiusMixture
from .circular import CircularSpline
from .deep_sigmoid import DeepSigmoid
from .gaussianization import Gaussianization
from .interval import IntervalSpline
from .mixture import MixtureCDF
from .polynomial import BernsteinPolynomial, SumOfSquares
from .sinh_arcsinh import SinhArcsinh
from .spline import RationalQuadraticSpline
from .unconstrained import UnconstrainedMonotone

__all__ = [
    "Univariate",
    "InvertedByRoot",
    "Shift",
    "Affine",
    "RationalQuadraticSpline",
    "CircularSpline",
    "CircularGather",
    "CircularShift",
    "MobiusMixture",
    "IntervalSpline",
    "SinhArcsinh",
    "MixtureCDF",
    "DeepSigmoid",
    "Gaussianization",
    "UnconstrainedMonotone",
    "BernsteinPolynomial",
    "SumOfSquares",
    "soft_clamp",
]
