"""Guides: flows over the latent sites of a Pyro model."""

from .auto_flow import AutoFlow
from .sites import LatentSite, init_to_typical

__all__ = ["AutoFlow", "LatentSite", "init_to_typical"]
