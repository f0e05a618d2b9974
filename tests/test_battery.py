"""One battery of invariants over the whole zoo. An exception is declared in the zoo, with its reason, never here."""

from __future__ import annotations

import copy
import io
import pickle
import shutil
from collections.abc import Callable
from itertools import product

import pyro
import pyro.distributions as dist
import pytest
import torch
from manifold_zoo import MANIFOLD_ZOO
from pyro.distributions.conditional import ConditionalTransform, ConditionalTransformedDistribution
from pyro.nn.module import PyroModule, to_pyro_module_
from torch import Tensor, nn
from torch.func import functional_call, vmap
from zoo import CIRCLE, INTERVAL, NOT_MAPS, UNIVARIATES, Instance, fresh, normal, perturbed
from zoo import ZOO as EUCLIDEAN

import pyro_flows as pf
from pyro_flows import transforms as T
from pyro_flows.errors import DtypeError, OptionError, ShapeError
from pyro_flows.training.engine import capture
from pyro_flows.transforms import Compose, Coupling, FlowTransform

ZOO = [*EUCLIDEAN, *MANIFOLD_ZOO]
WAYS = ("forward_and_ladj", "inverse_and_ladj")
_made = {case.id: case.make() for case in ZOO}  # to look at: a check makes its own
LEARNS = [case for case in ZOO if list(_made[case.id].parameters())]
CONDITIONAL = [case for case in ZOO if case.context_dim]


def examples(cases: list[Instance]) -> list[Instance]:
    """One of each class with a context and one without, and one coupling for each univariate map; of several coordinates where there is one."""

    def kind(case: Instance) -> tuple:
        transform = _made[case.id]
        name = type(transform.univariate).__name__ if isinstance(transform, Coupling) else ""
        return type(transform), bool(case.context_dim), name

    return list({kind(case): case for case in sorted(cases, key=lambda case: -min(case.dim, 2))[::-1]}.values())


def each(cases: list[Instance], base_decides: bool = False) -> Callable:
    """Run a check over instances; one that declares the check as an exception must fail it.

    What the base class decides for all of them is tested on examples in ``make test`` and on the rest in ``make test-all``.
    """

    def decorate(test: Callable) -> Callable:
        check = test.__name__.removeprefix("test_")
        reasons = [c.exceptions.get(check) for c in cases]
        marks = [[pytest.mark.xfail(reason=reason)] if reason else [] for reason in reasons]
        picked = {case.id for case in (examples(cases) if base_decides else cases)}
        marks = [m if case.id in picked else [*m, pytest.mark.thorough] for m, case in zip(marks, cases, strict=True)]
        params = [pytest.param(c, id=c.id, marks=m) for c, m in zip(cases, marks, strict=True)]
        return pytest.mark.parametrize("case", params)(test)

    return decorate


both_ways = pytest.mark.parametrize("way", WAYS)


def close(actual: Tensor, expected: Tensor, tol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, expected, rtol=tol, atol=tol)


def in_context(transform: FlowTransform, case: Instance, *batch: int) -> torch.distributions.Transform:
    """The transform as torch sees it: conditional ones at a context."""
    return transform.condition(case.context(*batch)) if case.context_dim else transform


def rows(context: Tensor | None) -> int | None:
    """The ``in_dims`` of a context for ``vmap``."""
    return None if context is None else 0


def weighted(outputs: tuple[Tensor, Tensor]) -> Tensor:
    """A scalar that every output influences, each by its own amount."""
    value, ladj = outputs
    return (value * torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view_as(value)).sum() + 0.7 * ladj.sum()


# --- the registry


def test_every_transform_is_registered():
    public = {getattr(pf.transforms, name) for name in pf.transforms.__all__} - {FlowTransform, T.Linear}  # these two are contracts
    public |= {getattr(pf.manifolds, name) for name in pf.manifolds.__all__} - {pf.manifolds.ManifoldTransform}
    public = {t for t in public if isinstance(t, type) and issubclass(t, FlowTransform)}
    assert public == {type(case.make()) for case in ZOO}


def test_every_univariate_is_registered():
    public = {getattr(pf.univariate, name) for name in pf.univariate.__all__} - {*NOT_MAPS}
    assert {u for u in public if isinstance(u, type)} == {type(u) for u in (*UNIVARIATES.values(), *CIRCLE.values(), *INTERVAL.values())}


def test_instances_say_what_they_are():
    assert len({case.id for case in ZOO}) == len(ZOO)
    for case in ZOO:
        transform = case.make()
        assert (transform.dim, transform.context_dim) == (case.dim, case.context_dim), case.id


@pytest.mark.parametrize("case", MANIFOLD_ZOO, ids=lambda case: case.id)
def test_domains_of_manifolds(case):
    """The points of the manifold lie in the domain, and points off it do not."""
    transform, x = case.make(), case.points(5)
    for domain in (transform.domain, transform.codomain):
        assert bool(domain.check(x).all()) and not bool(domain.check(3 * x + 5).any())


# --- values


def _cut(rows: Tensor, batch: tuple[int, ...]) -> Tensor:
    """The first rows of a ``(3, 4)`` batch, in the shape asked for."""
    return rows[(0,) * (2 - len(batch))][tuple(slice(size) for size in batch)]


BATCHES = [  # of points and of context
    ((), ()),
    ((4,), (4,)),
    ((3, 4), (3, 4)),
    ((0,), (0,)),
    ((3, 0), (3, 0)),
    ((3, 4), (4,)),
    ((4,), (1,)),
    ((3, 4), ()),
    ((), (4,)),
    ((), (1,)),
    ((3, 1), (4,)),
    ((0,), ()),
]


@each(ZOO)
def test_shapes(case):
    """A batch is its rows, whatever its shape and the context's."""
    transform, point, given = perturbed(case), case.points(3, 4), case.context(3, 4)
    for batch, context_batch in BATCHES if case.context_dim else dict.fromkeys(b for b, _ in BATCHES).items():
        x, context = _cut(point, batch), None if given is None else _cut(given, context_batch)
        shape = torch.broadcast_shapes(batch, context_batch or ())
        for way in WAYS:
            value, ladj = getattr(transform, way)(x, context)
            assert value.shape == (*shape, case.dim) and ladj.shape == shape
            every = 1 if shape.numel() < 10 else 5  # rows of the large ones
            for index in list(product(*map(range, shape)))[::every]:
                row = x.expand(*shape, -1)[index], None if context is None else context.expand(*shape, -1)[index]
                alone = getattr(transform, way)(*row)
                close(value[index], alone[0])
                close(ladj[index], alone[1])


@both_ways
@each(ZOO)
def test_identity(case, way):
    x = case.points(50, scale=2)
    value, ladj = getattr(fresh(case), way)(x, case.context(50))
    close(value, x, 1e-9)
    close(ladj, torch.zeros(50, dtype=torch.float64), 1e-9)


@each(ZOO)
def test_round_trips(case):
    transform, x, context = perturbed(case), case.points(200, scale=2), case.context(200)
    for there, back in (WAYS, WAYS[::-1]):
        value, ladj = getattr(transform, there)(x, context)
        again, reverse = getattr(transform, back)(value, context)
        assert (value - x).abs().amax(-1).gt(1e-4).float().mean() > 0.5, "the perturbed transform moves nothing"
        close(again, x, 1e-8)
        close(reverse, -ladj, 1e-8)


@both_ways
@each(ZOO)
def test_log_det(case, way):
    transform, x, context = perturbed(case), case.points(20, scale=2), case.context(20)
    apply = getattr(transform, way)
    expected = vmap(lambda x, c: case.log_det(lambda x: apply(x, c)[0], x), (0, rows(context)))(x, context)
    close(apply(x, context)[1], expected, 1e-8)
    alone = case.log_det(lambda x: apply(x, case.context())[0], x[0])
    close(apply(x[0], case.context())[1], alone, 1e-8)


@both_ways
@each(ZOO)
def test_vmap(case, way):
    transform, x, context = perturbed(case), case.points(5), case.context(5)
    apply = getattr(transform, way)
    for got, expected in zip(vmap(apply, (0, rows(context)))(x, context), apply(x, context), strict=True):
        close(got, expected)


@each(ZOO, base_decides=True)
def test_pyro_expectations(case):
    """What Pyro's own tests of transforms ask, with finite differences in place of autograd."""
    transform = perturbed(case)
    bound = in_context(transform, case, 1)
    assert bound.bijective and bound.domain.event_dim == bound.codomain.event_dim == 1
    for batch in ((3,), (3, 4), (3, 4, 5)):
        assert dist.TransformedDistribution(case.base(*batch), [bound]).sample().shape == (*batch, case.dim)

    x = case.points(1)
    close(bound.log_abs_det_jacobian(x, bound(x)), case.log_det_by_differences(bound, x), 1e-6)

    flow = dist.TransformedDistribution(case.base(), [bound])
    before = flow.log_prob(x)
    if case in LEARNS:
        optimizer = torch.optim.Adam(transform.parameters(), 1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            (-flow.log_prob(x).mean()).backward()
            optimizer.step()
        assert (flow.log_prob(x) > before).all()


# --- torch's Transform, and its memory


@each(ZOO, base_decides=True)
def test_log_abs_det_jacobian(case):
    transform, x = perturbed(case), case.points(6)
    bound = in_context(transform, case, 6)
    y, ladj = transform.forward_and_ladj(x, case.context(6))
    close(bound.log_abs_det_jacobian(x, y), ladj)  # nothing to remember
    cached = bound(x)
    close(cached, y)
    close(bound.log_abs_det_jacobian(x, cached), ladj)  # remembered
    assert bound.inv(cached) is x, "the way back from a draw is remembered"
    close(bound.inv.log_abs_det_jacobian(cached, x), -ladj)
    bound.clear_cache()
    assert bound.inv(cached) is not x
    close(bound.inv(cached), x, 1e-8)
    close(bound.log_abs_det_jacobian(x, cached), ladj)
    found = bound.inv(y)  # the other direction first
    close(bound.log_abs_det_jacobian(found, y), ladj, 1e-8)
    assert bound(found) is y
    other = case.moved(x)
    close(bound.log_abs_det_jacobian(other, bound(other)), transform.forward_and_ladj(other, case.context(6))[1])


def _shift_parameters(transform: FlowTransform) -> None:
    with torch.no_grad():
        for p in transform.parameters():
            p.add_(0.1)


def _optimizer_step(transform: FlowTransform) -> None:
    optimizer = torch.optim.SGD(transform.parameters(), 0.1)
    for p in transform.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


def _load(transform: FlowTransform, assign: bool) -> None:
    transform.load_state_dict({k: v + 0.1 if v.is_floating_point() else v for k, v in transform.state_dict().items()}, assign=assign)


CHANGES = {
    "no_grad": _shift_parameters,
    "optimizer": _optimizer_step,
    "load": lambda t: _load(t, assign=False),
    "load-assign": lambda t: _load(t, assign=True),
}


@pytest.mark.parametrize("change", [c if c != "load-assign" else pytest.param(c, marks=pytest.mark.thorough) for c in CHANGES])
@each(LEARNS, base_decides=True)
def test_a_changed_parameter_is_seen(case, change):
    transform, x = perturbed(case), case.points(6)
    bound = in_context(transform, case)
    y = bound(x)
    found = bound.inv(x.clone())
    for t in (bound, bound.inv):
        old = t(x)
        back = t.inv(old)
        assert back is x
        t.log_abs_det_jacobian(x, old)
        CHANGES[change](transform)
        fresh_copy = in_context(copy.deepcopy(transform), case)
        reference = fresh_copy if t is bound else fresh_copy.inv
        close(t.inv(old), reference.inv(old.clone()))
        close(t.log_abs_det_jacobian(x, old), reference.log_abs_det_jacobian(x.clone(), old.clone()))
        assert (t.inv(old) - x).abs().max() > 1e-6
    assert (bound(x) - y).abs().max() > 1e-6 and (bound.inv(x) - found).abs().max() > 1e-6


@each(LEARNS, base_decides=True)
def test_a_changed_mode_is_seen(case):
    transform, x = perturbed(case), case.points(6)
    bound = in_context(transform, case)
    with torch.no_grad():
        y = bound(x)
    assert not y.requires_grad and bound.inv(y).requires_grad and bound.log_abs_det_jacobian(x, y).shape == (6,)
    transform.requires_grad_(False)
    y = bound(x)
    close(bound.inv(y.requires_grad_()), x, 1e-8)
    assert bound.inv(y).requires_grad, "the point asks for a gradient now"
    y = bound(x)
    transform.requires_grad_(True)
    assert bound.inv(y) is not x, "the parameters ask for gradients now"


@each(ZOO, base_decides=True)
def test_a_changed_point_is_seen(case):
    transform, x = perturbed(case), case.points(6)
    bound = in_context(transform, case)
    y = bound(x)
    expected = bound(case.moved(x))
    x.copy_(case.moved(x))
    close(bound(x), expected)
    y = bound(x).detach()
    with torch.no_grad():
        y = bound(x)
        y.copy_(case.moved(y))
        assert (bound.inv(y) - x).abs().max() > 1e-3
        close(transform.forward_and_ladj(bound.inv(y), case.context())[0], y, 1e-8)


@each(CONDITIONAL, base_decides=True)
def test_a_changed_context_is_seen(case):
    transform, x, context = perturbed(case), case.points(6), case.context()
    bound = transform.condition(context)
    y = bound(x)
    context.add_(1)
    assert bound.inv(y) is not x
    close(bound.inv(y), transform.inverse_and_ladj(y, context)[0])


@each([case for case in LEARNS if not case.context_dim], base_decides=True)
def test_functional_calls_leave_no_trace(case):
    transform, x = perturbed(case), case.points(6)
    moved = {k: p.detach() + 0.1 for k, p in transform.named_parameters()}
    own, other = transform(x), functional_call(transform, moved, (x,))
    assert (own - other).abs().max() > 1e-6
    assert transform.inv(other) is not x
    torch.func.grad(lambda params: functional_call(transform, params, (x,)).sum())(moved)
    close(transform(x), own)


@each(LEARNS, base_decides=True)
def test_the_same_question_twice_has_two_graphs(case):
    transform, x = perturbed(case), case.points(6)
    bound = in_context(transform, case)
    flow = dist.TransformedDistribution(case.base(), [bound])
    gradients = []
    for question in (lambda: flow.log_prob(x), lambda: flow.log_prob(x), lambda: bound(x), lambda: bound(x)):
        transform.zero_grad()
        question().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in transform.parameters() if p.grad is not None]))
    close(gradients[0], gradients[1])
    close(gradients[2], gradients[3])


@each(ZOO, base_decides=True)
def test_inference_mode(case):
    transform, x = perturbed(case), case.points(6)
    bound = in_context(transform, case, 6)
    expected = bound(x)
    with torch.inference_mode():
        inside = in_context(transform, case, 6)
        y = inside(x.clone())
        close(y, expected)
        close(inside.inv(y), x, 1e-8)
        bound(x)
    y = bound(x)
    assert not y.is_inference()
    close(bound.inv(y), x, 1e-8)


# --- gradients


@both_ways
@each(LEARNS)
def test_gradients(case, way):
    transform, x = perturbed(case), case.points(40, scale=2).requires_grad_()
    weighted(getattr(transform, way)(x, case.context(40))).backward()
    assert x.grad.isfinite().all() and x.grad.ne(0).all()
    dead = {f"gradient:{name}" for name, p in transform.named_parameters() if p.grad is None or not (p.grad.abs() > 1e-13).any()}
    assert dead == {name for name in case.exceptions if name.startswith("gradient:")}
    assert all(p.grad.isfinite().all() for p in transform.parameters() if p.grad is not None)


@both_ways
@each(LEARNS)
def test_training_can_start(case, way):
    transform, x = fresh(case), case.points(40, scale=2)
    weighted(getattr(transform, way)(x, case.context(40))).backward()
    assert any(p.grad is not None and p.grad.any() for p in transform.parameters())


# The inverses of these solve linear equations, whose forward derivative torch gets wrong under vmap; adaptive solvers do not run there.
_FORWARD = [c for c in ZOO if not any(word in c.id for word in ("exponential", "generalized", "residual", "adjoint", "adaptive"))]
_FORWARD += [c for c in ZOO if c.id == "residual"]


@each(_FORWARD, base_decides=True)
def test_forward_mode(case):
    """Derivatives of the log-det by forward mode under ``vmap`` are those of reverse mode."""
    transform, x, context = perturbed(case).eval(), case.points(3), case.context(3)
    for way in WAYS if case.id != "residual" else WAYS[:1]:
        def ladj(x: Tensor, context: Tensor | None, way: str = way) -> Tensor:
            return getattr(transform, way)(x, context)[1]

        forward, reverse = (vmap(d(ladj), (0, rows(context)))(x, context) for d in (torch.func.jacfwd, torch.func.grad))
        close(forward, reverse, 1e-7)


@each(LEARNS)
def test_gradients_of_the_two_ways_agree(case):
    """A round trip is the identity whatever the parameters, so its gradient is too: nothing may be detached."""
    transform, x, context = perturbed(case), case.points(10, scale=2), case.context(10)
    for there, back in (WAYS, WAYS[::-1]):
        x = x.detach().requires_grad_()
        value, ladj = getattr(transform, there)(x, context)
        again, reverse = getattr(transform, back)(value, context)
        wanted = (x, *transform.parameters())
        grads = torch.autograd.grad(weighted((again, ladj + reverse)), wanted, allow_unused=True)
        expected = torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype).view_as(x)
        close(case.along(x, grads[0]), case.along(x, expected), 1e-7)
        for g in grads[1:]:
            assert g is None or g.abs().lt(1e-7).all()


@each(LEARNS)
def test_gradients_by_differences(case):
    """Along a random direction of all parameters and the context at once: a part of a parameter that is detached in both ways is seen here only."""
    transform, x, context = perturbed(case), case.points(10), case.context(10)
    way = getattr(transform, WAYS[transform.one_pass == "inverse"])
    moved = [*transform.parameters(), *([] if context is None else [context.requires_grad_()])]
    steps = [normal(100 + i, *t.shape) for i, t in enumerate(moved)]
    grads = torch.autograd.grad(weighted(way(x, context)), moved, allow_unused=True)
    slope = sum((g * step).sum() for g, step in zip(grads, steps, strict=True) if g is not None)

    def at(size: float) -> Tensor:
        with torch.no_grad():
            for t, step in zip(moved, steps, strict=True):
                t += size * step
            return weighted(way(x, context))

    h = 1e-5
    close((at(h) - at(-2 * h)) / (2 * h), slope, 1e-5)


# --- numbers


@each(ZOO)
def test_float32(case):
    transform, x, context = perturbed(case, torch.float32), case.points(100).float(), case.context(100)
    context = None if context is None else context.float()
    exact = perturbed(case)
    for there, back in (WAYS, WAYS[::-1]):
        value, ladj = getattr(transform, there)(x, context)
        assert value.dtype == ladj.dtype == torch.float32
        again, _ = getattr(transform, back)(value, context)
        close(again, x, 1e-4)
        wide = getattr(exact, there)(x.double(), None if context is None else context.double())
        close(value.double(), wide[0], 1e-4)
        close(ladj.double(), wide[1], 1e-4)


@both_ways
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@each(ZOO)
def test_extremes(case, way, dtype):
    x = case.extremes(dtype).requires_grad_()
    transform, context = perturbed(case, dtype), case.context(len(x), dtype=dtype)
    value, ladj = getattr(transform, way)(x, context)
    assert value.isfinite().all() and ladj.isfinite().all()
    weighted((value, ladj)).backward()
    for grad in (x.grad, *(p.grad for p in transform.parameters() if p.grad is not None)):
        assert grad.isfinite().all()


@both_ways
@each(ZOO, base_decides=True)
def test_double_and_float(case, way):
    transform, x, context = perturbed(case), case.points(6), case.context(6)
    expected = getattr(transform, way)(x, context)
    narrow = getattr(transform.float(), way)(x.float(), None if context is None else context.float())
    wide = getattr(transform.double(), way)(x, context)
    for e, n, w in zip(expected, narrow, wide, strict=True):
        assert n.dtype == torch.float32 and w.dtype == torch.float64
        close(n.double(), e, 1e-4)
        close(w, e, 1e-4)


# --- modules


@both_ways
@each(ZOO, base_decides=True)
def test_eval_is_train(case, way):
    transform, x, context = perturbed(case), case.points(6), case.context(6)
    train, evaluated = (getattr(transform.train(mode), way)(x, context) for mode in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(train, evaluated, strict=True))


@each(ZOO, base_decides=True)
def test_state_dict(case):
    transform, x, context = perturbed(case), case.points(6), case.context(6)
    file = io.BytesIO()
    torch.save(transform.state_dict(), file)
    file.seek(0)
    other = perturbed(case, seed=1)
    if case in LEARNS:
        assert not torch.equal(other.forward_and_ladj(x, context)[0], transform.forward_and_ladj(x, context)[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    for way in WAYS:
        assert torch.equal(getattr(other, way)(x, context)[0], getattr(transform, way)(x, context)[0])


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda t: pickle.loads(pickle.dumps(t))}


@pytest.mark.parametrize("how", COPIES)
@each(ZOO, base_decides=True)
def test_copies(case, how):
    transform, x = perturbed(case), case.points(6)
    for t in (transform, transform.inv, in_context(transform, case), in_context(transform, case).inv):
        bound = t if t.event_dim and not getattr(t, "context_dim", 0) else in_context(t, case)
        y = bound(x.clone().requires_grad_())  # the memory now holds tensors that cannot be copied
        bound.log_abs_det_jacobian(x, y)
        other = COPIES[how](bound)
        assert torch.equal(other(x), y) and other is not bound
        close(other.inv(y), x, 1e-8)
        assert bound.inv(y) is not x
    other = COPIES[how](transform)
    mine, theirs = list(transform.parameters()), list(other.parameters())
    assert all(torch.equal(a, b) and a is not b for a, b in zip(mine, theirs, strict=True))


@each(ZOO, base_decides=True)
def test_inverse_module(case):
    transform, x, context = perturbed(case), case.points(6), case.context(6)
    inverse = transform.inv
    assert isinstance(inverse, FlowTransform) and isinstance(inverse, nn.Module) and inverse.inv is transform
    assert [id(p) for p in inverse.parameters()] == [id(p) for p in transform.parameters()]
    assert (inverse.dim, inverse.context_dim) == (case.dim, case.context_dim)
    for ours, theirs in (WAYS, WAYS[::-1]):
        for a, b in zip(getattr(inverse, ours)(x, context), getattr(transform, theirs)(x, context), strict=True):
            assert torch.equal(a, b)
    bound = in_context(inverse, case, 6)
    close(bound(x), transform.inverse_and_ladj(x, context)[0])
    assert bound.inv(bound(x)).shape == x.shape


@each(LEARNS, base_decides=True)
def test_inverse_trains(case):
    transform, x = perturbed(case), case.points(20)
    bound = in_context(transform.inv, case)
    flow = dist.TransformedDistribution(case.base(), [bound])
    optimizer = torch.optim.Adam(transform.inv.parameters(), 0.01)
    before = [p.detach().clone() for p in transform.parameters()]
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = -flow.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    assert losses[-1] < losses[0]
    assert any(not torch.equal(a, b) for a, b in zip(before, transform.parameters(), strict=True))


@both_ways
@each(ZOO, base_decides=True)
def test_pyro_module(case, way):
    """Pyro can make the parameters random: the conversion changes classes and nothing else."""
    transform, x, context = perturbed(case), case.points(6), case.context(6)
    expected = getattr(transform, way)(x, context)
    to_pyro_module_(transform)
    assert isinstance(transform, PyroModule) and isinstance(transform, FlowTransform) and isinstance(transform, ConditionalTransform)
    for got, value in zip(getattr(transform, way)(x, context), expected, strict=True):
        assert torch.equal(got, value)


@each(ZOO, base_decides=True)
def test_repr(case):
    transform = case.make()
    text = repr(transform)
    assert text.startswith(type(transform).__name__) and f"dim={case.dim}" in text
    assert (f"context_dim={case.context_dim}" in text) == bool(case.context_dim)


# --- graphs


# The last of each class, the formula with the most operations, and a root: tracing the rest would show nothing new.
TRACED = {type(_made[case.id]): case for case in ZOO if "1d" not in case.id and "all-moved" not in case.id}
_and_these = ("coupling-spline-context", "coupling-mixture-context")
TRACED = list({case.id: case for case in (*TRACED.values(), *(c for c in ZOO if c.id in _and_these))}.values())


@each([case for case in TRACED if case.id not in ("sphere-exponential-3", "continuous-torus3-context")])  # the longest: others have their operations
def test_make_fx(case):
    transform, context = perturbed(case), case.context(5)

    def apply(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(part for way in WAYS for part in getattr(transform, way)(x, context))

    graph = capture(apply, (case.points(5),))
    for got, expected in zip(graph(case.points(5, seed=9)), apply(case.points(5, seed=9)), strict=True):
        close(got, expected)


# Compiling takes ten times as long as tracing, which finds most of what stops it: one instance a mechanism (roots: a Sylvester layer's).
COMPILED = [
    *("coupling-spline-context", "autoregressive-spline-residual", "inverse-context", "lu-conditional", "batch-norm", "embedded"),
    *("sylvester-orthogonal-context", "residual-context", "continuous-context", "sphere-axis-odd-3", "simplex-flow-ilr-3"),
    "torus-elementwise-gather-3",
]


def _compiled(case: Instance, backend: str, ways: tuple[str, ...] = WAYS) -> None:
    """Each way in one graph that has them all."""
    torch.compiler.reset()
    transform, x, context = perturbed(case), case.points(5).requires_grad_(), case.context(5)

    def apply(x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        values, ladjs = zip(*(getattr(transform, way)(x, context) for way in ways), strict=True)
        return torch.cat(values, -1), torch.stack(ladjs, -1)

    compiled = torch.compile(apply, fullgraph=True, backend=backend)
    for seed in (1, 9):
        point = case.points(5, seed=seed)
        for got, expected in zip(compiled(point, context), apply(point, context), strict=True):
            close(got, expected, 1e-8)
    wanted = [x, *transform.parameters()]
    for got, expected in zip(
        torch.autograd.grad(weighted(compiled(x, context)), wanted, allow_unused=True),
        torch.autograd.grad(weighted(apply(x, context)), wanted, allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (expected is None) and (got is None or torch.allclose(got, expected, 1e-8, 1e-8))


@each([case for case in TRACED if case.id in COMPILED])
def test_compile(case):
    _compiled(case, "eager")


@pytest.mark.thorough
@each([case for case in TRACED if case.id not in COMPILED])
def test_compile_the_rest(case):
    _compiled(case, "eager")


@pytest.mark.thorough
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_compile_to_machine_code():
    _compiled(next(case for case in ZOO if case.id == "coupling-affine-context"), "inductor", WAYS[1:])


def test_compiled_calls_leave_no_memory():
    case = next(case for case in ZOO if case.id == "compose-unconditional")
    torch.compiler.reset()
    transform, x = perturbed(case), case.points(5)
    transform(x)  # a memory that the graph must not look at
    y = torch.compile(lambda x: transform(x), fullgraph=True, backend="eager")(x)
    assert transform.inv(y) is not x
    close(transform.inv(y), x, 1e-8)


@pytest.mark.cuda
@each(ZOO)
def test_cuda(case):
    transform, x, context = perturbed(case), case.points(6), case.context(6)
    expected = [getattr(transform, way)(x, context) for way in WAYS]
    transform.cuda()
    for way, (value, ladj) in zip(WAYS, expected, strict=True):
        got = getattr(transform, way)(x.cuda(), None if context is None else context.cuda())
        assert got[0].is_cuda and got[1].is_cuda
        close(got[0].cpu(), value, 1e-8)
        close(got[1].cpu(), ladj, 1e-8)
        if case in LEARNS:
            with pytest.raises(DtypeError):
                getattr(transform, way)(x, context)


# --- distributions


@each(ZOO, base_decides=True)
def test_distributions(case):
    """Shapes, samples and densities of the distributions that torch and Pyro make of a transform."""
    transform = perturbed(case)
    for batch in ((), (1,), (3, 4)) if case.context_dim else ((),):
        context = case.context(*batch)
        unbound = ConditionalTransformedDistribution(case.base(), [transform]).condition(context)
        bound = dist.TransformedDistribution(case.base(), [in_context(transform, case, *batch)])
        for d in (unbound, bound):
            assert d.batch_shape == batch and d.event_shape == (case.dim,) and d.has_rsample
            for sample_shape in ((), (7,)):
                x = d.rsample(sample_shape)
                assert d.sample(sample_shape).shape == x.shape == (*sample_shape, *batch, case.dim)
                assert x.requires_grad == (case in LEARNS)
                base, ladj = transform.inverse_and_ladj(x, context)
                close(d.log_prob(x), case.base().log_prob(base) + ladj, 1e-7)
            wide = d.expand((5, *batch))
            x = wide.sample((2,))
            assert wide.batch_shape == (5, *batch) and x.shape == (2, 5, *batch, case.dim)
            close(wide.log_prob(x), d.log_prob(x.clone()), 1e-7)
            assert d.to_event(len(batch)).log_prob(x).shape == (2, 5)


@each(ZOO, base_decides=True)
def test_a_context_of_a_smaller_base_is_broadcast(case):
    """A point with fewer batch dimensions than the context comes back with them all, remembered or not."""
    transform, x = perturbed(case), case.points()
    bound = in_context(transform, case, 4)
    batch = (4,) if case.context_dim else ()
    y = bound(x)
    assert y.shape == bound.inv(y).shape == (*batch, case.dim)
    assert bound.log_abs_det_jacobian(x, y).shape == batch
    assert bound.forward_shape(x.shape) == y.shape and bound.inverse_shape(x.shape) == y.shape


@each(ZOO, base_decides=True)
def test_plates(case):
    transform, context = perturbed(case), case.context(4)

    def model(context):
        bound = transform.condition(context) if case.context_dim else transform
        with pyro.plate("rows", 4), pyro.poutine.scale(scale=2.0):
            return pyro.sample("x", dist.TransformedDistribution(case.base(), [bound]))

    for inputs in (context, case.context(1)):
        trace = pyro.poutine.trace(model).get_trace(inputs)
        trace.compute_log_prob()
        x, site = trace.nodes["x"]["value"], trace.nodes["x"]
        assert x.shape == (4, case.dim) and site["log_prob"].shape == (4,)
        base, ladj = transform.inverse_and_ladj(x, inputs)
        close(site["log_prob"], 2 * (case.base().log_prob(base) + ladj), 1e-7)


# --- errors


def _spoilt(case: Instance) -> dict[str, tuple[Tensor, Tensor | None, type[Exception]]]:
    x, context = case.points(4), case.context(4)
    table = {
        "too-wide": (case.points(4).repeat(1, 2), context, ShapeError),
        "too-narrow": (x[..., 1:], context, ShapeError),
        "scalar": (torch.tensor(1.0, dtype=torch.float64), context, ShapeError),
        "integer": (x.long(), context, DtypeError),
        "bool": (x > 0, context, DtypeError),
    }
    if list(t for t in case.make().state_dict().values() if t.is_floating_point()):
        table["single"] = (x.float(), context, DtypeError)
    if context is None:
        table["unexpected"] = (x, torch.zeros(4, 2).double(), ShapeError)
    else:
        table |= {
            "missing": (x, None, ShapeError),
            "context-wide": (x, context.repeat(1, 2), ShapeError),
            "context-scalar": (x, context.sum(), ShapeError),
            "context-integer": (x, context.long(), DtypeError),
            "context-single": (x, context.float(), DtypeError),
            "apart": (x, case.context(3), ShapeError),
        }
    return table


@both_ways
@each(ZOO, base_decides=True)
def test_errors(case, way):
    transform, worked = perturbed(case), []
    for module in transform.modules():
        if isinstance(module, nn.Linear | pf.nets.Hypernetwork):
            module.register_forward_hook(lambda *_: worked.append(1))
    for what, (x, context, error) in _spoilt(case).items():
        with pytest.raises(error, match=f"^{type(transform).__name__}"):
            getattr(transform, way)(x, context)
        assert not worked, what


@each(CONDITIONAL, base_decides=True)
def test_errors_of_condition(case):
    transform, base = perturbed(case), case.base(5)
    for wrong in (case.context(4).repeat(1, 2), torch.tensor(1.0)):
        with pytest.raises(ShapeError):
            transform.condition(wrong)
    with pytest.raises(ShapeError):
        dist.TransformedDistribution(base, [transform.condition(case.context(4))])
    with pytest.raises(ShapeError):
        transform(case.points(4))  # no context at all
    for wrong in (case.context(4).long(), case.context(4).float()):
        with pytest.raises(DtypeError):
            transform.condition(wrong)


_f, _eye = UNIVARIATES["affine"], torch.eye(2)
BROKEN = {
    "dim-zero": (lambda: T.Affine(0), ShapeError),
    "dim-float": (lambda: T.TriangularLinear(2.0), ShapeError),
    "context-negative": (lambda: T.Elementwise(_f, 2, -1), ShapeError),
    "moved-nothing": (lambda: T.Coupling(_f, 2, torch.zeros(2).bool()), ShapeError),
    "moved-size": (lambda: T.Coupling(_f, 2, torch.ones(3).bool()), ShapeError),
    "moved-dtype": (lambda: T.Coupling(_f, 2, torch.ones(2)), ShapeError),
    "hidden": (lambda: T.Coupling(_f, 2, hidden_features=(0,)), OptionError),
    "direction": (lambda: T.Autoregressive(_f, 2, "forward"), OptionError),
    "order-repeats": (lambda: T.Autoregressive(_f, 2, order=torch.tensor([0, 0])), ShapeError),
    "order-size": (lambda: T.Autoregressive(_f, 2, order=torch.arange(3)), ShapeError),
    "permutation-repeats": (lambda: T.Permutation(torch.tensor([1, 1])), ShapeError),
    "permutation-shape": (lambda: T.Permutation(torch.tensor([[0, 1]])), ShapeError),
    "permutation-empty": (lambda: T.Permutation(torch.arange(0)), ShapeError),
    "lu-permutation": (lambda: T.LULinear(2, torch.tensor([0, 2])), ShapeError),
    "rank-zero": (lambda: T.LowRankLinear(3, 0), OptionError),
    "rank-large": (lambda: T.LowRankLinear(3, 4), OptionError),
    "scale-shape": (lambda: T.Standardize(torch.zeros(2), torch.eye(3)), ShapeError),
    "scale-sign": (lambda: T.Standardize(torch.zeros(2), -_eye), ShapeError),
    "scale-set": (lambda: T.Standardize(torch.zeros(2), _eye).set(torch.zeros(3), _eye), ShapeError),
    "planar-activation": (lambda: T.Planar(2, activation="relu"), OptionError),
    "sylvester-rank-zero": (lambda: T.Sylvester(2, 0), OptionError),
    "sylvester-rank-large": (lambda: T.Sylvester(2, 3), OptionError),
    "sylvester-basis": (lambda: T.Sylvester(2, basis="qr"), OptionError),
    "factors-none": (lambda: T.BlockAutoregressive(2, ()), OptionError),
    "factors-zero": (lambda: T.BlockAutoregressive(2, (3, 0)), OptionError),
    "bnaf-direction": (lambda: pf.flows.bnaf(2, direction="forward"), OptionError),
    "parts-none": (lambda: T.Compose([]), OptionError),
    "parts-stock": (lambda: T.Compose([torch.distributions.ExpTransform()]), OptionError),
    "parts-dims": (lambda: T.Compose([T.Affine(2), T.Affine(3)]), ShapeError),
    "parts-contexts": (lambda: T.Compose([T.Affine(2, 1), T.Affine(2, 2)]), ShapeError),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_options_are_refused(what):
    make, error = BROKEN[what]
    with pytest.raises(error):
        make()


def test_linear_layers_are_their_matrices():
    for case in (c for c in ZOO if c.id in ("triangular", "lu", "low-rank")):
        layer, x = perturbed(case), case.points(7)
        y, ladj = layer.forward_and_ladj(x)
        close(y, x @ layer.weight().mT + layer.shift)
        close(ladj, torch.linalg.slogdet(layer.weight())[1].expand(7))
        close(layer.logabsdet(), ladj[0])


def test_standardize_can_be_set():
    layer, x = T.Standardize(torch.zeros(2), _eye), torch.randn(5, 2)
    y = layer(x)
    layer.set(torch.ones(2), 2 * _eye)
    close(layer.inv(y), (x - 1) / 2, 1e-6)
    close(layer(x), 2 * x + 1, 1e-6)
    assert not list(layer.parameters())


@pytest.mark.parametrize("kept", list(product((False, True), repeat=3)), ids=str)
def test_any_coordinates_can_be_kept(kept):
    if all(kept):
        with pytest.raises(ShapeError):
            Coupling(UNIVARIATES["affine"], 3, ~torch.tensor(kept))
        return
    case = Instance("", lambda: Coupling(UNIVARIATES["affine"], 3, ~torch.tensor(kept), hidden_features=(4,)), 3)
    x = case.points(5)
    moved = perturbed(case).forward_and_ladj(x)[0].ne(x).all(0)
    assert moved.tolist() == [not k for k in kept]


def test_composition_is_in_order():
    parts = [perturbed(case) for case in EUCLIDEAN if case.dim == 3 and case.context_dim in (0, 2)]
    case = Instance("", lambda: None, 3, 2)
    x, context = case.points(5), case.context(5)
    composed = Compose(parts)
    assert len(composed) == len(parts) and composed[0] is parts[0]
    y, total = x, 0
    for part in parts:
        y, ladj = part.forward_and_ladj(y, context if part.context_dim else None)
        total = total + ladj
    got = composed.forward_and_ladj(x, context)
    close(got[0], y)
    close(got[1], total)
