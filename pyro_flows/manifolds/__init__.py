"""Flows on spheres, simplices and tori: every density states its measure, and integrates to one under it.

Points are vectors in coordinates: ``n`` numbers for a direction of ``R^n`` or a composition of ``n`` parts, ``d`` angles for a torus. Densities refer
to surface measure on spheres, to Lebesgue measure of the first ``n - 1`` parts on simplices (as torch's ``Dirichlet``), and of the angles on tori.
"""

from .bases import Dirichlet, Uniform, UniformTorus
from .charts import ALR, ILR, StickBreaking
from .continuous import RiemannianContinuousFlow
from .cylinder import CylinderAutoregressive
from .distribution import ManifoldDistribution
from .exponential import ExponentialMap
from .geometry import Simplex, Sphere, Torus
from .manifold import Manifold
from .product import Product
from .ratio import log_volume_ratio, volume_ratio
from .reparam import CircleReparam, ManifoldReparam, SphereReparam
from .simplex import Calibration, GeneralizedCalibration, SimplexFlow
from .simplex_distributions import GeneralizedDirichlet, LogisticNormal, SimplicialGeneralizedBeta
from .sphere import AxisFlow, NormalizedAffine, NormalizedLinear, NormalizedTranslation, Rotation, SphereMobius
from .sphere_distributions import PowerSpherical, UniformSphere, VonMisesFisher
from .sphere_shapes import AffineUniform, AngularCentralGaussian, Kent
from .supports import contains, manifold_of
from .torus import TorusAutoregressive, TorusCoupling, TorusElementwise
from .transform import ManifoldTransform

__all__ = [
    "Manifold",
    "Sphere",
    "Simplex",
    "Torus",
    "Product",
    "volume_ratio",
    "log_volume_ratio",
    "ManifoldTransform",
    "Rotation",
    "NormalizedTranslation",
    "NormalizedLinear",
    "NormalizedAffine",
    "SphereMobius",
    "AxisFlow",
    "ExponentialMap",
    "CylinderAutoregressive",
    "ILR",
    "ALR",
    "StickBreaking",
    "Calibration",
    "GeneralizedCalibration",
    "SimplexFlow",
    "TorusElementwise",
    "TorusCoupling",
    "TorusAutoregressive",
    "RiemannianContinuousFlow",
    "ManifoldDistribution",
    "Uniform",
    "Dirichlet",
    "UniformSphere",
    "VonMisesFisher",
    "PowerSpherical",
    "AngularCentralGaussian",
    "AffineUniform",
    "Kent",
    "SimplicialGeneralizedBeta",
    "LogisticNormal",
    "GeneralizedDirichlet",
    "UniformTorus",
    "contains",
    "manifold_of",
    "SphereReparam",
    "CircleReparam",
    "ManifoldReparam",
]
