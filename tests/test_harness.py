"""Pyro's generic harness for transforms, on every instance of the zoo: the parts of it that ``test_battery.py`` does not ask already.

Pyro's ``tests/distributions/test_transforms.py`` asks of a transform shapes, a finite-difference Jacobian, an inverse, training by autograd, and
that distributions take it. The battery has the shapes, both Jacobians, the round trips and the distributions one transform at a time; here are
Pyro's own containers, its parameter store, ``with_cache``, and maximum likelihood in the inverse direction.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.conditional import ConditionalTransformedDistribution
from pyro.distributions.transforms import ComposeTransformModule
from pyro.infer import SVI, Trace_ELBO
from test_battery import in_context
from torch import nn
from zoo import ZOO, perturbed

from pyro_flows import transforms as T

each = pytest.mark.parametrize("case", [pytest.param(case, id=case.id) for case in ZOO])


def base(case, *batch):
    return dist.Normal(torch.zeros(*batch, case.dim, dtype=torch.float64), 1.0).to_event(1)


def close(actual, expected, tol=1e-6):
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


@each
def test_interface(case):
    transform = perturbed(case)
    assert isinstance(transform, torch.distributions.Transform) and isinstance(transform, nn.Module)
    x, context = case.points(3), case.context(3)
    expected, ladj = transform.forward_and_ladj(x, context)
    for size in (0, 1):
        bound = in_context(transform, case, 3).with_cache(size)
        assert bound.event_dim == bound.inv.event_dim == 1 and bound.bijective
        y = bound(x)
        close(y, expected)
        close(bound.log_abs_det_jacobian(x, y), ladj)
        assert dist.constraints.real_vector.check(y).all()


@each
def test_the_jacobian_is_the_same_after_an_inversion(case):
    """Pyro's ``_test_inverse``: from the far side, with nothing remembered."""
    bound, y = in_context(perturbed(case), case), case.points(10)
    x = bound.inv(y)
    before = bound.log_abs_det_jacobian(x, y)
    bound.clear_cache()
    again = bound(x)
    close(again, y)
    close(bound.log_abs_det_jacobian(x, again), before)
    bound.clear_cache()
    close(bound.log_abs_det_jacobian(x.clone(), y.clone()), before)


@each
def test_containers(case):
    """Two in a row, in torch's container and in Pyro's, and in a distribution's list."""
    parts = [perturbed(case, seed=seed) for seed in (0, 1)]
    bounds, x = [in_context(part, case) for part in parts], case.points(5)
    middle, first = parts[0].forward_and_ladj(x, case.context())
    y, second = parts[1].forward_and_ladj(middle, case.context())
    containers = [torch.distributions.ComposeTransform(bounds)]
    if not case.context_dim:
        containers.append(ComposeTransformModule(bounds))
        assert [id(p) for p in containers[1].parameters()] == [id(p) for part in parts for p in part.parameters()]
    for both in containers:
        close(both(x), y)
        close(both.log_abs_det_jacobian(x, y), first + second)
        close(both.inv(y.clone()), x)
    expected = base(case).log_prob(x) - first - second
    close(dist.TransformedDistribution(base(case), bounds).log_prob(y.detach()), expected)
    unbound = ConditionalTransformedDistribution(base(case), [*parts, T.Affine(case.dim).double()])
    close(unbound.condition(case.context()).log_prob(y.detach()), expected)


@each
def test_pyro_trains_it(case):
    """Maximum likelihood through Pyro's parameter store, in the direction that is the inverse of the battery's."""
    transform, data = perturbed(case), case.points(20)
    pyro.clear_param_store()

    def model():
        pyro.module("transform", transform)
        flow = dist.TransformedDistribution(base(case), [in_context(transform, case).inv])
        with pyro.plate("rows", len(data)):
            pyro.sample("x", flow, obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
    losses = [svi.step() for _ in range(4)]
    names = {name for name, p in transform.named_parameters()}
    assert {name.removeprefix("transform$$$") for name in pyro.get_param_store().keys()} == names
    assert all(torch.tensor(loss).isfinite() for loss in losses)
    # A layer that data initialise starts at its best; what has no parameters stays.
    assert losses[-1] < losses[0] if names and "inverse_trains" not in case.exceptions else losses[-1] == pytest.approx(losses[0], rel=0.05)
