"""What a Pyro model is to inference: its latent sites, its log joint density, its observations, and simulation from it."""

from .log_joint import LogJoint
from .sites import LatentSite, init_to_typical

__all__ = ["LatentSite", "LogJoint", "init_to_typical"]
