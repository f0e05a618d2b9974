"""Variational inference: :class:`FlowVI` fits a guide to a model and returns a :class:`~pyro_flows.posterior.Posterior`."""

from .flow_vi import FlowVI, fit

__all__ = ["FlowVI", "fit"]
