"""The same four flows as every library builds them: five transforms, two hidden layers of 128, eight bins on [-5, 5]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import pyro_flows as pf

LAYERS, WIDTH, BINS, BOUND = 5, 128, 8, 5.0
FLOWS = ("RealNVP", "MAF", "NSF coupling", "NSF autoregressive")


class Peer(Protocol):
    """What is timed of a flow."""

    def log_prob(self, x: Tensor) -> Tensor: ...

    def sample(self, count: int) -> Tensor: ...

    def parameters(self) -> list[nn.Parameter]: ...


class _Peer:
    """Three functions make a peer."""

    def __init__(self, log_prob: Callable[[Tensor], Tensor], sample: Callable[[int], Tensor], *modules: nn.Module) -> None:
        self.log_prob, self.sample = log_prob, sample
        self._parameters = [p for module in modules for p in module.parameters()]

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters


def ours(flow: str, dim: int, compiled: bool = False) -> Peer:
    common: dict[str, Any] = {"transforms": LAYERS, "hidden_features": (WIDTH, WIDTH)}
    spline = {"bins": BINS, "bound": BOUND}
    module = {
        "RealNVP": lambda: pf.flows.realnvp(dim, **common),
        "MAF": lambda: pf.flows.maf(dim, **common),
        "NSF coupling": lambda: pf.flows.nsf(dim, **common, **spline),
        "NSF autoregressive": lambda: pf.flows.nsf_ar(dim, **common, **spline),
    }[flow]()
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()  # as random as the others: at the identity sampling could be quicker than it is later
    module = module.compiled() if compiled else module
    return _Peer(lambda x: module().log_prob(x), lambda n: module().sample((n,)), module)


def zuko(flow: str, dim: int) -> Peer:
    import zuko

    common: dict[str, Any] = {"transforms": LAYERS, "hidden_features": (WIDTH, WIDTH)}
    module = {
        "RealNVP": lambda: zuko.flows.RealNVP(dim, **common),
        "MAF": lambda: zuko.flows.MAF(dim, **common),
        "NSF coupling": lambda: zuko.flows.NSF(dim, bins=BINS, passes=2, **common),
        "NSF autoregressive": lambda: zuko.flows.NSF(dim, bins=BINS, **common),
    }[flow]()
    return _Peer(lambda x: module().log_prob(x), lambda n: module().sample((n,)), module)


def nflows(flow: str, dim: int) -> Peer:
    from nflows import transforms as T
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import MLP

    class Net(MLP):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return super().forward(x)

    def net(inputs: int, outputs: int) -> nn.Module:
        return Net((inputs,), (outputs,), [WIDTH, WIDTH])

    def mask(i: int) -> Tensor:
        return (torch.arange(dim) + i) % 2

    spline: dict[str, Any] = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    made: dict[str, Any] = {"num_blocks": 1, "use_residual_blocks": False}
    layer = {
        "RealNVP": lambda i: T.AffineCouplingTransform(mask(i), net),
        "MAF": lambda i: T.MaskedAffineAutoregressiveTransform(dim, WIDTH, **made),
        "NSF coupling": lambda i: T.PiecewiseRationalQuadraticCouplingTransform(mask(i), net, **spline),
        "NSF autoregressive": lambda i: T.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(dim, WIDTH, **made, **spline),
    }[flow]
    layers = []
    for i in range(LAYERS):
        layers += [layer(i)] if "coupling" in flow or flow == "RealNVP" else [layer(i), T.ReversePermutation(dim)]
    module = Flow(T.CompositeTransform(layers), StandardNormal([dim]))
    return _Peer(module.log_prob, module.sample, module)


def normflows(flow: str, dim: int) -> Peer:
    import normflows as nf

    def coupling(i: int) -> nn.Module:
        first = (dim + 1) // 2 if i % 2 == 0 else dim // 2
        net = nf.nets.MLP([first, WIDTH, WIDTH, 2 * (dim - first)], init_zeros=True)
        return nf.flows.AffineCouplingBlock(net, split_mode="channel" if i % 2 == 0 else "channel_inv")

    layer = {
        "RealNVP": coupling,
        "MAF": lambda i: nf.flows.Reverse(nf.flows.MaskedAffineAutoregressive(dim, WIDTH, num_blocks=1, use_residual_blocks=False)),
        "NSF coupling": lambda i: nf.flows.CoupledRationalQuadraticSpline(dim, 1, WIDTH, num_bins=BINS, tail_bound=BOUND, reverse_mask=bool(i % 2)),
        "NSF autoregressive": lambda i: nf.flows.AutoregressiveRationalQuadraticSpline(dim, 1, WIDTH, num_bins=BINS, tail_bound=BOUND),
    }[flow]
    module = nf.NormalizingFlow(nf.distributions.DiagGaussian(dim, trainable=False), [layer(i) for i in range(LAYERS)])
    return _Peer(module.log_prob, lambda n: module.sample(n)[0], module)


def pyro(flow: str, dim: int) -> Peer:
    import pyro.distributions as dist
    from pyro.distributions import transforms as T

    make = {
        "RealNVP": lambda: T.affine_coupling(dim, [WIDTH, WIDTH]),
        "MAF": lambda: T.affine_autoregressive(dim, [WIDTH, WIDTH]),
        "NSF coupling": lambda: T.spline_coupling(dim, hidden_dims=[WIDTH, WIDTH], count_bins=BINS, bound=BOUND),
        "NSF autoregressive": lambda: T.spline_autoregressive(dim, [WIDTH, WIDTH], count_bins=BINS, bound=BOUND),  # of linear rational order
    }[flow]
    layers = [make() for _ in range(LAYERS)]
    chain: list[Any] = []
    for layer in layers:
        # Pyro's autoregressive layers take one pass to sample; their inverses take one pass for the density, as the others' do.
        chain += [layer.inv if flow in ("MAF", "NSF autoregressive") else layer, T.permute(dim, torch.arange(dim).flip(0))]
    flow_distribution = dist.TransformedDistribution(dist.Normal(torch.zeros(dim), torch.ones(dim)), chain)

    def log_prob(x: Tensor) -> Tensor:
        flow_distribution.clear_cache()
        return flow_distribution.log_prob(x)

    return _Peer(log_prob, lambda n: flow_distribution.sample((n,)), *layers)


PEERS: dict[str, Callable[[str, int], Peer]] = {"pyro_flows": ours, "zuko": zuko, "nflows": nflows, "normflows": normflows, "Pyro": pyro}
