"""Fixed points, log-det estimates and Lipschitz nets: against dense algebra, known solutions and the exact log-det."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_flows import flows
from pyro_flows.errors import InversionError, OptionError, ShapeError
from pyro_flows.nets import LipschitzMLP, LipSwish
from pyro_flows.nets.lipschitz import induced_norm, mixed_norm, spectral_norm
from pyro_flows.numerics import Roulette, batch_jacobian, estimate_log_det, fixed_point, hutchinson_trace, log_det
from pyro_flows.transforms import Affine, ContractiveResidual, Embedded

INF = float("inf")


def strong(dim: int, lipschitz: float = 0.97, **options) -> ContractiveResidual:
    """A layer that uses its Lipschitz bound: orthogonal weights, and biases where the activations are steep."""
    layer = ContractiveResidual(dim, hidden_features=(2 * dim, 2 * dim), lipschitz=lipschitz, **options).double()
    with torch.no_grad():
        for linear in layer.net.layers:
            nn.init.orthogonal_(linear.weight, 3.0)
            linear.bias.copy_(1.5 + 0.3 * torch.randn(linear.bias.shape))
    return layer


def sides(actual: Tensor, expected: Tensor, count: float = 4.5) -> None:
    """The mean of the first dimension's draws is ``expected``: 99 numbers of 100 within 3 standard errors, and all within ``count``."""
    se = actual.std(0) / len(actual) ** 0.5
    live = se > 1e-12
    z = ((actual.mean(0) - expected).abs() / se)[live]
    assert live.any() and (z < count).all() and (z < 3).double().mean() >= min(0.99, 1 - 1 / z.numel())
    torch.testing.assert_close(actual.mean(0)[~live], expected[~live], rtol=1e-8, atol=1e-8)


# --- fixed points


@pytest.mark.parametrize("dim", (1, 2, 8, 40))
@pytest.mark.parametrize("radius", (0.5, 0.97))
def test_linear_fixed_points(dim, radius):
    """x = a A x + b with |A| = 1, where the solution is known: rotations and reflections, which are hardest for plain steps."""
    a = radius * torch.linalg.qr(torch.randn(dim, dim).double())[0]
    b = torch.randn(6, dim).double().requires_grad_()
    found = fixed_point(lambda x, b: x @ a.mT + b, torch.zeros(6, dim).double(), (b,))
    eye = torch.eye(dim).double()
    torch.testing.assert_close(found.value, torch.linalg.solve(eye - a, b.mT).mT, rtol=1e-10, atol=1e-10)
    assert (found.residual == (found.value @ a.mT + b - found.value).abs().amax(-1)).all() and found.residual.max() < 1e-11
    assert found.iterations.max() < (40 if dim <= 8 else 600)  # up to the window it is as good as Krylov's methods
    v = torch.randn(6, dim).double()
    (gradient,) = torch.autograd.grad(found.value, b, v)
    torch.testing.assert_close(gradient, torch.linalg.solve((eye - a).mT, v.mT).mT, rtol=1e-8, atol=1e-8)


def test_gradients_of_any_order():
    w = (0.4 * torch.randn(3, 3)).double()
    w = (w / torch.linalg.matrix_norm(w, 2) * 0.8).requires_grad_()
    b = torch.randn(4, 3).double().requires_grad_()

    def solve(w: Tensor, b: Tensor) -> Tensor:
        return fixed_point(lambda x, w, b: torch.tanh(x @ w) + b, b.detach(), (w, b)).value

    assert torch.autograd.gradcheck(solve, (w, b)) and torch.autograd.gradgradcheck(solve, (w, b))
    third = [torch.func.jacrev(torch.func.jacrev(torch.func.grad(lambda c: solve(w, c[None]).sum())))(b[0])]
    step = 1e-5

    def hessian(c: Tensor) -> Tensor:
        return torch.func.jacrev(torch.func.grad(lambda c: solve(w, c[None]).sum()))(c)

    numeric = torch.stack([(hessian(b[0] + e) - hessian(b[0] - e)) / (2 * step) for e in step * torch.eye(3).double()], -1)
    torch.testing.assert_close(third[0], numeric, rtol=1e-6, atol=1e-6)


def test_a_row_does_not_feel_its_batch():
    layer = strong(4)
    y = torch.randn(50, 4).double() * torch.logspace(-3, 3, 50).double()[:, None]
    together = layer.solve(y)
    alone = [layer.solve(row) for row in y]
    torch.testing.assert_close(together.value, torch.stack([r.value for r in alone]), rtol=1e-11, atol=1e-11)
    assert (together.iterations - torch.stack([r.iterations for r in alone])).abs().max() <= 1


def test_acceleration_pays():
    """Plain steps need log(1e-14) / log(.95) = 630 evaluations."""
    a = -0.95 * torch.eye(6).double()
    found = fixed_point(lambda x: x @ a + 1.0, torch.zeros(3, 6).double())
    assert found.iterations.max() < 8
    torch.testing.assert_close(found.value, torch.full((3, 6), 1 / 1.95).double())


def test_failures_are_reported():
    start = torch.tensor([[0.5], [0.0], [3.0]]).double()
    with pytest.raises(InversionError, match=r"1 of 3 points .* number 2, has residual .* after"):
        fixed_point(lambda x: torch.where(x > 1, x + 1, x / 2), start, max_iterations=30)
    with pytest.raises(InversionError, match="is the point finite"):
        strong(2).solve(torch.tensor([[0.0, torch.nan], [1.0, 2.0]]).double())
    with torch.no_grad():
        graph = make_fx(lambda s: fixed_point(lambda x: torch.where(x > 1, x + 1 + x.sin(), x / 2), s).value)(start)
    assert graph(start).isnan().flatten().tolist() == [False, False, True]


@pytest.mark.parametrize("direction", ("density", "sampling"))
def test_inverse_of_strong_layers(direction):
    for dim in (1, 2, 8, 32):
        layer = strong(dim, direction=direction, log_det="exact")
        there, back = ("inverse_and_ladj", "forward_and_ladj")[:: 1 if direction == "density" else -1]
        x = 5 * torch.randn(100, dim).double()
        with torch.no_grad():
            y = getattr(layer, there)(x)[0]
            found = layer.solve(y)
            assert (y - x).abs().max() > 0.1
            torch.testing.assert_close(getattr(layer, back)(y)[0], x, rtol=1e-10, atol=1e-10)
        assert found.residual.max() < 1e-12 and found.iterations.max() < 60


# --- log-dets


def dense(f, x: Tensor) -> Tensor:
    return vmap(jacrev(f))(x)


def test_exact_log_det():
    layer, x = strong(5), torch.randn(7, 5).double()
    f = lambda u: layer.net.evaluate(u, *layer.net.tensors())  # noqa: E731
    jacobian = dense(f, x)
    torch.testing.assert_close(batch_jacobian(f, x), jacobian)
    torch.testing.assert_close(log_det(f, x), torch.linalg.slogdet(torch.eye(5).double() + jacobian)[1])
    assert torch.linalg.matrix_norm(jacobian, 2).max() > 0.3, "too weak a layer to show anything"
    probes = torch.randn(20_000, 7, 5).double().sign()
    estimate = hutchinson_trace(f, x.expand_as(probes), probes)
    sides(estimate, jacobian.diagonal(dim1=-2, dim2=-1).sum(-1), 4)


def drawn(sizes: list[float]) -> list[float]:
    """One draw of the weights of the terms after the exact ones; ``sizes`` begins with the scale."""
    roulette, weights = Roulette(sizes[0]), []
    for size in sizes[1:]:
        weights.append(roulette.next_weight(size))
        if not weights[-1]:
            break
    return weights + [0.0] * (len(sizes) - 1 - len(weights))


@pytest.mark.parametrize("sizes", ([0.8**k for k in range(80)], [2.0, 1.0, 0.4, 0.9, 0.3, 0.29, 0.01, 0.02]), ids=("shrinking", "unsteady"))
def test_roulette(sizes):
    """E[c_k] = 1, which is what makes the sum unbiased, and P(c_k > 0) is the survival promised; weights are at most its inverse."""
    draws = torch.tensor([drawn(sizes) for _ in range(20_000)]).double()
    survival = torch.tensor(sizes[1:]).double().div(sizes[0]).cummin(0).values
    for k in range(min(8, len(survival))):
        alive = draws[:, k] > 0
        torch.testing.assert_close(draws[alive, k], (1 / survival[k]).expand(int(alive.sum())))
        se = (survival[k] * (1 - survival[k]) / len(draws)) ** 0.5
        assert abs(alive.double().mean() - survival[k]) < 4 * se
    if len(sizes) == 80:
        counts = (draws > 0).sum(1).double()
        assert abs(counts.mean() - 0.8 / 0.2) < 4 * counts.std() / len(draws) ** 0.5


def test_roulette_ends():
    for size in (0.0, math.nan, INF):
        assert Roulette(1.0).next_weight(size) == 0.0
    assert Roulette(0.0).next_weight(0.0) == 0.0


@pytest.mark.parametrize("rho, draws", ((0.9, 800), (0.97, 300)))
def test_the_variance_is_finite_and_known(rho, draws):
    """At the edge, J = -rho I, where a Poisson cut's average of 20,000 draws was -2.20 for log(1 - 0.9) = -2.303 and -2.85 for -3.507.

    With Rademacher probes only the cut is random, and E S^2 = sum_kl a_k a_l / P(N >= min(k, l)) for the sum S of terms a_k c_k.
    """
    slope = torch.tensor(-rho, dtype=torch.float64, requires_grad=True)
    x = torch.zeros(1, 1).double()
    ask = lambda: estimate_log_det(lambda x, a: a * x, x, (slope,), torch.ones_like(x))  # noqa: E731
    values, gradients = [], []
    for _ in range(draws):
        values.append(ask())
        gradients.append(torch.autograd.grad(values[-1], slope)[0])
    k = torch.arange(1, 2000).double()
    survival = torch.where(k <= 2, 1.0, rho ** (k - 2))
    after = lambda a: a.flip(0).cumsum(0).flip(0)  # noqa: E731
    for found, terms, exact in (
        (torch.cat(values).detach(), -(rho**k) / k, math.log(1 - rho)),
        (torch.stack(gradients), rho**k, 1 / (1 - rho) - 1),
    ):
        second = (terms / survival * (2 * after(terms) - terms)).sum()  # each pair with its smaller index
        variance = (second - terms.sum() ** 2).item()
        found = found - (1 if exact > 0 else 0)  # the gradient's first term, of k = 0, is certain
        assert abs(terms.sum() - exact) < 1e-10
        assert abs(found.mean() - exact) < 4 * (variance / draws) ** 0.5
        fourth = (found - exact).pow(4).mean() - variance**2
        assert abs(found.var() - variance) < 4 * (fourth / draws) ** 0.5 and variance < math.inf


@pytest.mark.parametrize("training", (True, False), ids=("train", "eval"))
@pytest.mark.parametrize("dim", (2, *(pytest.param(dim, marks=pytest.mark.thorough) for dim in (5, 8))))
def test_estimates_are_unbiased(dim, training):
    """Mean of the value and of the gradient by the point and by every parameter, against the exact ones; rows weigh differently."""
    layer = strong(dim, log_det="estimate").train(training)
    exact = copy.deepcopy(layer)
    exact.log_det = "exact"
    x, weight = torch.randn(3, dim).double(), torch.tensor([1.0, -2.0, 0.5]).double()

    copies, draws = 20, 200  # probes are drawn for each copy, the cut for each call

    def ask(layer: ContractiveResidual) -> tuple[Tensor, Tensor]:
        points = x.expand(copies, 3, dim).clone().requires_grad_()
        ladj = layer.inverse_and_ladj(points)[1]
        gradients = torch.autograd.grad((ladj * weight).sum() / copies, [points, *layer.parameters()], materialize_grads=True)
        return ladj.detach().mean(0), torch.cat([gradients[0].sum(0).flatten(), *(g.flatten() for g in gradients[1:])])

    value, gradient = ask(exact)
    found = [ask(layer) for _ in range(draws)]
    assert value.abs().min() > 0.02
    sides(torch.stack([v for v, _ in found]), value, 4)
    sides(torch.stack([g for _, g in found]), gradient, 4.5)


def test_noise_is_fresh():
    layer, x = strong(12), torch.randn(3, 12).double()
    for mode in (True, False):
        layer.train(mode)
        first, second = (layer.inverse_and_ladj(x)[1] for _ in range(2))
        assert (first != second).all()
        torch.manual_seed(3)
        first = layer.inverse_and_ladj(x)[1]
        torch.manual_seed(3)
        assert torch.equal(first, layer.inverse_and_ladj(x)[1])
    assert torch.equal(strong(8).inverse_and_ladj(x[:, :8])[1].isfinite(), torch.ones(3).bool())


def test_the_estimate_keeps_no_graph():
    """What the backward pass holds does not grow with the number of terms."""
    layer, x = strong(12), torch.randn(3, 12).double().requires_grad_()
    sizes = []
    for terms in (1, 40):
        value = estimate_log_det(layer.net.evaluate, x, layer.net.tensors(), torch.ones_like(x), terms, roulette=False)
        sizes.append(sum(t.numel() for t in value.grad_fn.saved_tensors))
    assert sizes[0] == sizes[1]
    (gradient,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|does not require grad"):
        torch.autograd.grad(gradient.sum(), x)


def test_estimates_under_vmap_and_capture():
    layer, x = strong(10, direction="sampling"), torch.randn(4, 10).double()
    with pytest.raises(RuntimeError, match="random"):
        vmap(layer.forward_and_ladj)(x)
    exact = torch.linalg.slogdet(torch.eye(10).double() + dense(lambda u: layer.net(u), x))[1]
    draws = vmap(vmap(lambda x: layer.forward_and_ladj(x)[1], randomness="different"), randomness="different")(x.expand(800, 4, 10))
    sides(draws, exact, 4)
    graph = make_fx(lambda x: layer.forward_and_ladj(x)[1])(x.expand(2000, 4, 10))
    captured = graph(x.expand(2000, 4, 10))
    sides(captured, exact, 4)
    assert (graph(x.expand(2000, 4, 10)) != captured).any(), "the probes are drawn anew in each run"


def test_compiled_estimates():
    layer, x = strong(10, direction="sampling"), torch.randn(500, 10).double().requires_grad_()
    torch.compiler.reset()
    compiled = torch.compile(lambda x: layer.forward_and_ladj(x)[1], fullgraph=True, backend="eager")

    def twenty_terms(x: Tensor) -> Tensor:
        return estimate_log_det(layer.net.evaluate, x, layer.net.tensors(), torch.randn_like(x).sign(), 20, roulette=False)

    values, gradients = [], []
    for f in (compiled, twenty_terms):
        torch.manual_seed(0)
        values.append(f(x))
        gradients.append(torch.autograd.grad(values[-1].sum(), [x, *layer.net.parameters()], materialize_grads=True))
    torch.testing.assert_close(*values)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


# --- nets


def test_spectral_norm():
    for m, n in ((1, 1), (3, 7), (64, 64), (100, 20)):
        for weight in (torch.randn(m, n).double(), nn.init.orthogonal_(torch.empty(m, n)).double(), torch.zeros(m, n).double()):
            exact = torch.linalg.matrix_norm(weight, 2)
            assert exact * (1 - 1e-12) <= spectral_norm(weight) <= exact * min(m, n) ** (1 / 256) * (1 + 1e-12) + 1e-30
            assert spectral_norm(1e-6 * weight).allclose(1e-6 * spectral_norm(weight))
    weight = torch.randn(4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(spectral_norm, (weight,)) and torch.autograd.gradgradcheck(spectral_norm, (weight,))


@pytest.mark.parametrize("p", (1.0, 1.3, 2.0, 4.0, INF))
def test_induced_norm_is_an_upper_bound(p):
    for _ in range(5):
        weight, x = torch.randn(6, 4).double(), torch.randn(5000, 4).double()
        ratio = torch.linalg.vector_norm(x @ weight.mT, p, -1) / torch.linalg.vector_norm(x, p, -1)
        bound = induced_norm(weight, torch.tensor(1 / p).double())
        assert ratio.max() <= bound and ratio.max() > 0.5 * bound
        if p in (1.0, INF):
            torch.testing.assert_close(bound, torch.linalg.matrix_norm(weight, p))


def largest_ratio(weight: Tensor, p: float, q: float) -> Tensor:
    """The largest |Wx|_q / |x|_p that the power iteration of Boyd finds from many starts, and among all corners of the cube."""

    def dual(x: Tensor, p: float) -> Tensor:
        """The vectors of dual norm 1 at which the norm is reached."""
        if p == INF:
            return x.sign() * torch.nn.functional.one_hot(x.abs().argmax(-1), x.shape[-1])
        size = torch.linalg.vector_norm(x, p, -1, keepdim=True)
        return x.sign() * (x.abs() / size) ** (p - 1)

    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * weight.shape[1])
    x = torch.cat([torch.randn(500, weight.shape[1]).double(), torch.eye(weight.shape[1]).double(), corners])
    for _ in range(100):
        x = dual(dual(x @ weight.mT, q) @ weight, 1 / (1 - 1 / p) if p > 1 else INF)
    x = torch.cat([x, corners, torch.eye(weight.shape[1]).double()])
    return (torch.linalg.vector_norm(x @ weight.mT, q, -1) / torch.linalg.vector_norm(x, p, -1)).nan_to_num().max()


@pytest.mark.parametrize("p", (1.0, 1.3, 2.0, 4.0, INF))
@pytest.mark.parametrize("q", (1.0, 1.5, 2.0, 3.0, INF))
def test_mixed_norm_is_an_upper_bound(p, q):
    for shape in ((6, 4), (3, 5)):
        weight = torch.randn(shape).double()
        bound, found = mixed_norm(weight, p, q), largest_ratio(weight, p, q)
        assert found <= bound * (1 + 1e-9) and found > (0.75 if p <= q else 0.4) * bound
        if p == 1 or q == INF:
            torch.testing.assert_close(bound, found)
        if p == q:
            torch.testing.assert_close(bound, induced_norm(weight, torch.tensor(1 / p).double()))
        assert torch.autograd.gradcheck(lambda w: mixed_norm(w, p, q), weight.requires_grad_())


@pytest.mark.parametrize("p, q", ((1.0, 64.0), (64 / 63, INF), (4 / 3, 4.0001), (1.02, 60.0)))
@pytest.mark.parametrize("size", (1e-3, 100.0))
def test_mixed_norms_of_high_exponents(p, q, size):
    """In float32, powers of the entries overflow or vanish: the bound does not."""
    weight = (size * torch.randn(6, 4)).requires_grad_()
    bound, found = mixed_norm(weight, p, q), largest_ratio(weight.detach().double(), p, q)
    assert found <= bound * (1 + 1e-5) and found > 0.75 * bound
    (slope,) = torch.autograd.grad(bound, weight)
    torch.testing.assert_close((slope * weight).sum(), bound, rtol=1e-4, atol=0)  # of degree one


def test_a_learned_norm_can_leave_two():
    raw = torch.zeros((), dtype=torch.float64, requires_grad=True)
    weight = torch.ones(5, 2).double()  # |W|_1 = 5, |W|_inf = 2
    (slope,) = torch.autograd.grad(induced_norm(weight, torch.sigmoid(raw)), raw)
    assert slope > 0.1


@pytest.mark.parametrize("norm", (1.0, 2.0, 3.0, INF, "learned", (1.5, 2.0, 4.0), (INF, 2.0, 1.0)), ids=str)
def test_nets_are_contractions(norm):
    """The ratio is maximised over pairs, at weights far beyond the bound; the context is free."""
    mixed = isinstance(norm, tuple)
    for widths in ((16, 16),) if mixed else ((), (16,), (16, 16)):
        net = LipschitzMLP(3, 3, widths, 2, lipschitz=0.9, norm=norm).double()
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.dim():
                    parameter.add_(5 * torch.randn_like(parameter))
            if norm == "learned":
                net.raw_p.fill_(0.7)
        p = 1 / torch.sigmoid(net.raw_p).item() if norm == "learned" else norm[0] if mixed else norm
        x, step, context = 3 * torch.randn(20_000, 3).double(), 1e-4 * torch.randn(20_000, 3).double(), torch.randn(20_000, 2).double()
        moved = net(x + step, context) - net(x, context)
        ratio = torch.linalg.vector_norm(moved, p, -1) / torch.linalg.vector_norm(step, p, -1)
        assert ratio.max() < 0.9 + 1e-9
        assert ratio.max() > 0.001 and (widths or ratio.max() > 0.4)
        assert (net(x, 10 * context) - net(x, context)).abs().max() > 1


def test_lip_swish():
    x = torch.linspace(-50, 50, 200_001).double().requires_grad_()
    for raw in (-3.0, 0.5, 4.0):
        activation = LipSwish().double()
        activation.raw_beta.data.fill_(raw)
        (slope,) = torch.autograd.grad(activation(x).sum(), x)
        assert 0.99 < slope.abs().max() < 1


BROKEN = (
    {"direction": "forward"},
    {"lipschitz": 1.0},
    {"lipschitz": 0.0},
    {"norm": 0.5},
    {"norm": "two"},
    {"norm": (2.0, 2.0)},  # of three layers
    {"norm": (2.0, 0.5, 2.0)},
    {"norm": ("learned", 2.0, 2.0)},
    {"log_det": "maybe"},
    {"hidden_features": (0,)},
)


@pytest.mark.parametrize("options", BROKEN, ids=str)
def test_broken_options_are_refused(options):
    with pytest.raises(OptionError):
        ContractiveResidual(2, **options)


@pytest.mark.parametrize("direction", ("density", "sampling"))
def test_the_recipe_has_both_directions(direction):
    flow = flows.residual(2, transforms=2, direction=direction)
    assert flow.transform.one_pass == ("inverse" if direction == "density" else "forward")


# --- features of a context


def test_features_are_computed_once_a_context():
    seen = []
    net = nn.Linear(4, 2).double()
    net.register_forward_hook(lambda *a: seen.append(a[1][0].shape))
    layer = Embedded(Affine(3, 2).double(), net, 4)
    x, context = torch.randn(100, 5, 3).double(), torch.randn(5, 4).double()
    y = layer.condition(context)(x)
    assert seen == [(5, 4)] and y.shape == (100, 5, 3)
    torch.testing.assert_close(y, layer.transform.forward_and_ladj(x, net(context))[0])


def test_broken_features_are_refused():
    with pytest.raises(OptionError, match="takes a context"):
        Embedded(Affine(3), nn.Linear(4, 2), 4)
    with pytest.raises(OptionError, match="nn.Module"):
        Embedded(Affine(3, 2), torch.tanh, 4)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="positive"):
        Embedded(Affine(3, 2), nn.Linear(4, 2), 0)
    with pytest.raises(ShapeError, match="2 features"):
        Embedded(Affine(3, 2), nn.Linear(4, 5), 4).forward_and_ladj(torch.zeros(3), torch.zeros(4))


def test_cinn_learns_features_of_an_image():
    """x ~ N(which half of a noisy 4 x 4 image is brighter, .3): the loss approaches the entropy, which no flow without the image can."""
    net = nn.Sequential(nn.Unflatten(-1, (1, 4, 4)), nn.Conv2d(1, 4, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(64, 4))
    flow = flows.cinn(2, 16, net, 4, transforms=2, hidden_features=(16,))

    def draw(n: int) -> tuple[Tensor, Tensor]:
        side = torch.randint(2, (n, 1)).float()
        image = 0.3 * torch.randn(n, 4, 4) + torch.cat([side, side, 1 - side, 1 - side], -1).unsqueeze(1)
        return 2 * side - 1 + 0.3 * torch.randn(n, 2), image.flatten(1)

    optimizer = torch.optim.Adam(flow.parameters(), 1e-2)
    for _ in range(150):
        x, image = draw(256)
        optimizer.zero_grad()
        (-flow(image).log_prob(x).mean()).backward()
        optimizer.step()
    x, image = draw(5000)
    entropy = math.log(2 * math.pi * math.e * 0.09)
    loss = -flow(image).log_prob(x).mean().item()
    assert entropy - 0.05 < loss < entropy + 0.25 < entropy + math.log(2)
