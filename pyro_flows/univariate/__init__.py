"""Increasing maps of the line, as pure functions of a point and its parameters."""

from .affine import Affine, Shift, soft_clamp
from .base import Univariate
from .sinh_arcsinh import SinhArcsinh
from .spline import RationalQuadraticSpline

__all__ = ["Univariate", "Shift", "Affine", "RationalQuadraticSpline", "SinhArcsinh", "soft_clamp"]
