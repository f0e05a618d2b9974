"""The free-form estimate of a log-determinant's gradient: exact when the probes run over a basis, unbiased when they are random."""

import pytest
import torch
from manifold_zoo import MANIFOLD_ZOO
from zoo import ZOO, perturbed

from pyro_flows.numerics import free_form_log_det

IDS = ("coupling-spline", "lu", "sphere-affine-3", "sphere-axis-3", "simplex-generalized-3", "torus-coupling-circular-3")
CASES = [case for case in (*ZOO, *MANIFOLD_ZOO) if case.id in IDS]


def _setting(case):
    """A transform, points, the basis of the tangent space at each, and the two maps."""
    transform, x = perturbed(case), case.points(6)
    manifold = getattr(case, "manifold", None)
    basis = manifold.tangent_basis(x) if manifold else torch.eye(case.dim).double().expand(6, -1, -1)
    project = manifold.project if manifold else lambda z: z
    return transform, x, basis, lambda x: transform.forward_and_ladj(x)[0], lambda y: transform.inverse_and_ladj(project(y))[0]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_probes_over_a_basis_give_the_gradient(case):
    transform, x, basis, f, inverse = _setting(case)
    exact = torch.autograd.grad(transform.forward_and_ladj(x)[1].sum(), list(transform.parameters()), allow_unused=True)
    total = sum(free_form_log_det(f, inverse, x, basis[..., i]).sum() for i in range(basis.shape[-1]))
    found = torch.autograd.grad(total, list(transform.parameters()), allow_unused=True)
    for e, g in zip(exact, found, strict=True):
        e, g = (torch.zeros(()) if t is None else t for t in (e, g))
        torch.testing.assert_close(*torch.broadcast_tensors(g, e), rtol=1e-8, atol=1e-8, check_dtype=False)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.id, marks=[pytest.mark.thorough] * (i > 0)) for i, c in enumerate(CASES[:4])])
def test_random_probes_are_unbiased(case):
    transform, x, basis, f, inverse = _setting(case)
    gradients = torch.autograd.grad(transform.forward_and_ladj(x)[1].sum(), list(transform.parameters()), allow_unused=True)
    parameter, exact = max(zip(transform.parameters(), gradients, strict=True), key=lambda pair: 0 if pair[1] is None else pair[1].norm().item())
    draws = []
    for _ in range(400):
        probe = (basis @ torch.randn(6, basis.shape[-1], 1).double()).squeeze(-1)
        draws.append(torch.autograd.grad(free_form_log_det(f, inverse, x, probe).sum(), parameter)[0])
    found = torch.stack(draws)
    error = found.std(0) / len(found) ** 0.5 + 1e-9
    assert ((found.mean(0) - exact) / error).abs().max() < 5
    assert found.std() > 1e-3


def test_tangent_noise_is_standard():
    for case in MANIFOLD_ZOO:
        if case.id in ("sphere-affine-3", "simplex-generalized-3"):
            x = case.points(1).expand(50_000, -1)
            noise = case.manifold.tangent_noise(x)
            basis = case.manifold.tangent_basis(x[0])
            torch.testing.assert_close(noise.mT @ noise / 50_000, basis @ basis.mT, atol=0.03, rtol=0)
