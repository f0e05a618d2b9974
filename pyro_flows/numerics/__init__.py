"""Numerical methods that know nothing of flows: roots, fixed points, traces, log determinants, ODEs, quadrature, special functions."""

from .bessel import log_bessel
from .factors import triangle
from .fixed_points import FixedPoint, fixed_point
from .free_form import free_form_log_det
from .log_det import Roulette, batch_jacobian, estimate_log_det, hutchinson_trace, log_det
from .normal import log_ndtr, mills, ndtri_exp
from .ode import Solver, integrate
from .quadrature import clenshaw_curtis, integrate_from_zero
from .roots import invert_monotone
from .trace import Divergence, draw_probe, estimated_divergence, exact_divergence, reverse_products

__all__ = [
    "invert_monotone",
    "FixedPoint",
    "fixed_point",
    "batch_jacobian",
    "log_det",
    "estimate_log_det",
    "Roulette",
    "hutchinson_trace",
    "Divergence",
    "draw_probe",
    "estimated_divergence",
    "exact_divergence",
    "reverse_products",
    "Solver",
    "integrate",
    "free_form_log_det",
    "clenshaw_curtis",
    "integrate_from_zero",
    "triangle",
    "log_bessel",
    "log_ndtr",
    "mills",
    "ndtri_exp",
]
