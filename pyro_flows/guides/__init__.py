"""Guides: flows over the latent sites of a Pyro model."""

from ..model import init_to_typical
from .auto_flow import AutoFlow
from .auto_manifold_flow import AutoManifoldFlow, auto_guide
from .auto_stochastic_flow import AutoStochasticFlow

__all__ = ["AutoFlow", "AutoManifoldFlow", "AutoStochasticFlow", "auto_guide", "init_to_typical"]

GUIDES: dict[str, type[AutoFlow]] = {guide.__name__: guide for guide in (AutoFlow, AutoManifoldFlow, AutoStochasticFlow)}  # that a file can name
