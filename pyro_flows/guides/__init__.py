"""Guides: flows over the latent sites of a Pyro model."""

from .auto_flow import AutoFlow
from .auto_manifold_flow import AutoManifoldFlow, auto_guide
from .auto_stochastic_flow import AutoStochasticFlow
from .sites import LatentSite, init_to_typical, unwrapped

__all__ = ["AutoFlow", "AutoManifoldFlow", "AutoStochasticFlow", "LatentSite", "auto_guide", "init_to_typical", "unwrapped"]
