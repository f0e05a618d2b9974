"""Recipes: one short function for each published architecture, returning a :class:`~pyro_flows.distributions.Flow`, or a
:class:`~pyro_flows.stochastic.StochasticFlow`.

Options that mean the same carry the same name everywhere. Stacks alternate complementary masks, or an order and its reverse, so every coordinate is
transformed. Each starts at the identity: the flow is its base until it is trained. All take

- ``dim``: number of coordinates; ``context_dim``: size of the context, 0 for none;
- ``transforms``: number of layers; ``hidden_features``: widths of each conditioner, where there is one;
- ``base``: base module, standard normal by default.

``flow.compiled()`` runs a flow through ``torch.compile``, see :meth:`~pyro_flows.distributions.Flow.compiled`.
"""

from .classic import cinn, flow_gmm, iaf, maf, nice, nsf, nsf_ar, realnvp
from .continuous import cnf
from .manifold import simplex, sphere, torus
from .mixing import bnaf, planar, radial, residual, sylvester
from .monotone import bernstein, flowpp, gaussianization, naf, sos, umnn
from .stochastic import ar_lwta, cif, lwta, snf

__all__ = ["nice", "realnvp", "maf", "iaf", "nsf", "nsf_ar", "cinn", "naf", "umnn", "flowpp", "gaussianization", "sos", "bernstein"]
__all__ += ["planar", "radial", "sylvester", "bnaf", "residual", "cnf", "flow_gmm", "lwta", "ar_lwta", "cif", "snf", "sphere", "simplex", "torus"]
