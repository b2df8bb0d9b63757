"""Weight compander: the function and its closed forms, limits, export, and hypergradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bilevel.compander import (
    Compander,
    WeightCompander,
    bake,
    bound,
    compand,
    companders,
    load_baked,
)
from bilevel.compander_report import distribution, report
from bilevel.compander_training import confine, hyperparameters, parameter_groups, squared_norm
from hypergrad import CG, Explicit, Implicit, Problem

D = torch.float64
SHAPES = ["arctan", "softsign", "tanh"]


def psi(a: float, b: float, shape: str = "arctan") -> Compander:
    each = Compander(WeightCompander(shape=shape), torch.tensor([-1.0, 1.0], dtype=D))  # type: ignore[arg-type]
    each._override = a, b
    return each


@pytest.mark.parametrize("shape", SHAPES)
def test_odd_increasing_bounded_and_invertible(shape: str) -> None:
    v = torch.linspace(-20, 20, 50_001, dtype=D)
    each = psi(0.3, 0.1, shape)
    w = each(v)
    limit = 0.3 * (math.pi / 2 if shape == "arctan" else 1.0)
    assert torch.allclose(w, -each(-v), atol=1e-16)
    assert (w.abs() <= limit).all()
    assert (w.diff()[23_750:26_250] > 0).all()
    matched = Compander(WeightCompander(shape=shape, start="matched"), v)  # type: ignore[arg-type]
    matched._override = 0.3, 0.1
    inside = torch.linspace(-0.97 * limit, 0.97 * limit, 1001, dtype=D)
    assert torch.allclose(matched(matched.right_inverse(inside)), inside, atol=1e-12)
    assert matched.clipped == 0
    matched.right_inverse(torch.tensor([2 * limit, 0.0], dtype=D))
    assert matched.clipped == 1


def test_gradients_are_the_closed_forms() -> None:
    v = torch.randn(9, generator=torch.Generator().manual_seed(0), dtype=D).requires_grad_()
    a, b = (torch.tensor(x, dtype=D, requires_grad=True) for x in (0.3, 0.1))
    each = psi(0.0, 0.0)
    each._override = a, b
    w = each(v)
    g = torch.randn(9, generator=torch.Generator().manual_seed(1), dtype=D)
    dv, da, db = torch.autograd.grad((w * g).sum(), [v, a, b])
    slope = (a * b / (b**2 + v**2)).detach()
    assert torch.allclose(dv, g * slope, rtol=1e-12)
    assert torch.allclose(slope, (a / b * (w / a).cos() ** 2).detach(), rtol=1e-10)
    assert torch.allclose(da, (g * w / a).sum().detach(), rtol=1e-12)
    assert torch.allclose(db, -(g * v / b * slope).sum().detach(), rtol=1e-12)

    def function(v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        each._override = a, b
        out: Tensor = each(v)
        return out

    assert torch.autograd.gradcheck(function, (v, a, b))


def test_slope_crossing_and_scale_equivariance() -> None:
    each = psi(0.3, 0.1)
    tiny = torch.tensor(1e-8, dtype=D)
    assert float(each(tiny) / tiny) == pytest.approx(3.0, rel=1e-12)
    crossing = torch.tensor(0.39726, dtype=D)
    assert float(each(crossing)) == pytest.approx(float(crossing), abs=1e-5)
    radius = torch.tensor(math.sqrt(0.1 * 0.2), dtype=D, requires_grad=True)
    (slope,) = torch.autograd.grad(each(radius), radius)
    assert float(slope) == pytest.approx(1.0, rel=1e-12)
    v = torch.linspace(-2, 2, 11, dtype=D)
    assert torch.allclose(psi(2.5 * 0.3, 2.5 * 0.1)(2.5 * v), 2.5 * each(v), atol=1e-14)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def train(model: nn.Module, steps: int = 50) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (
        torch.randn(40, 5, generator=generator, dtype=D),
        torch.randint(3, (40,), generator=generator),
    )
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


def test_wide_companders_are_the_plain_network() -> None:
    """a = b → ∞ is the identity: the same training to 1e-8."""
    plain, wide = network(), network()
    compand(wide, WeightCompander(amplitude=1e6, gamma=1.0))
    train(plain), train(wide)
    baked = bake(wide).state_dict()
    for name, value in plain.state_dict().items():
        assert torch.allclose(value, baked[name], atol=1e-8)


def test_export_and_matched_start() -> None:
    plain = network()
    model = copy.deepcopy(plain)
    made = compand(model, WeightCompander(start="matched", amplitude=3.0))
    x = torch.randn(6, 5, dtype=D)
    assert sum(each.clipped for each in made.values()) == 0
    assert torch.allclose(model(x), plain(x), atol=1e-12)
    train(model, 5)
    expected = model(x)
    assert set(bake(model).state_dict()) == set(plain.state_dict())
    assert torch.allclose(model(x), expected, atol=1e-12)
    assert not companders(model)


def test_sgd_on_v_is_a_preconditioner_of_w() -> None:
    """w moves by −η γ² cos⁴(w/a) ∂L/∂w, up to η²."""
    each, eta = psi(0.3, 0.1), 1e-6
    v = torch.linspace(-0.3, 0.3, 7, dtype=D, requires_grad=True)
    w = each(v)
    g = torch.linspace(1, 2, 7, dtype=D)
    (dv,) = torch.autograd.grad((w * g).sum(), v)
    moved = each(v - eta * dv) - w
    expected = -eta * 9 * (w / 0.3).cos() ** 4 * g
    assert torch.allclose(moved, expected, rtol=1e-3)


def test_the_amplitude_does_nothing_in_front_of_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, eps=1e-12), nn.Tanh(), nn.Linear(8, 3))
    compand(model.double(), WeightCompander(learned=True))
    loss = model(torch.randn(20, 5, dtype=D)).square().sum()
    grads = {
        n: torch.autograd.grad(loss, pair[0], retain_graph=True)[0]
        for n, pair in hyperparameters(model).items()
    }
    assert abs(float(grads["0"])) < 1e-6
    assert abs(float(grads["3"])) > 1e-3


def test_hypergradient_of_a_and_b_through_a_solved_training() -> None:
    """A linear model with squared loss and decay on v: implicit against central differences."""
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(30, 4, generator=generator, dtype=D),
        torch.randn(30, generator=generator, dtype=D),
    )
    xv, yv = (
        torch.randn(20, 4, generator=generator, dtype=D),
        torch.randn(20, generator=generator, dtype=D),
    )

    def error(
        params: dict[str, Tensor], h: dict[str, Tensor], batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        each = psi(0.0, 0.0)
        each._override = h["log_a"].exp(), h["log_b"].exp()
        return (batch[0] @ each(params["v"]) - batch[1]).square().mean()

    def inner(
        params: dict[str, Tensor], h: dict[str, Tensor], batch: tuple[Tensor, Tensor]
    ) -> Tensor:
        return error(params, h, batch) + 0.05 * params["v"].square().sum()

    def solved(h: dict[str, Tensor]) -> dict[str, Tensor]:
        v, fixed = torch.zeros(4, dtype=D), {k: t.detach() for k, t in h.items()}

        def loss(v: Tensor) -> Tensor:
            return inner({"v": v}, fixed, (x, y))

        for step in range(30):  # Newton, damped at first
            gradient, hessian = torch.func.grad(loss)(v), torch.func.hessian(loss)(v)
            damping = torch.eye(4, dtype=D) * (0.3 if step < 15 else 0.0)
            v = v - torch.linalg.solve(hessian + damping, gradient)
        assert float(gradient.norm()) < 1e-13
        return {"v": v.requires_grad_()}

    h = {
        k: torch.tensor(t, dtype=D, requires_grad=True)
        for k, t in (("log_a", -0.5), ("log_b", -1.2))
    }
    estimator, problem, params = Implicit(CG(rtol=1e-12)), Problem(inner, error), solved(h)
    found, _ = estimator(problem, params, h, (x, y), (xv, yv), estimator.init(problem, params, h))
    for name in h:
        values = []
        for sign in (1, -1):
            moved = {n: (t + sign * 1e-5 * (n == name)).detach() for n, t in h.items()}
            values.append(float(error(solved(moved), moved, (xv, yv)).detach()))
        assert float(found.grad[name]) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


def test_the_report_says_what_the_paper_claims() -> None:
    """Tails shrink and fewer weights are near zero, the more the smaller the amplitude."""
    torch.manual_seed(0)
    tails, zeros, kurtoses = [], [], []
    for amplitude in (4.0, 2.0, 1.0):
        model = nn.Sequential(nn.Linear(100, 100))
        nn.init.normal_(model[0].weight, std=0.1)
        compand(model, WeightCompander(amplitude=amplitude))
        (line,) = report(model).values()
        tails.append(line.weights.tail)
        zeros.append(line.weights.near_zero)
        kurtoses.append(line.weights.kurtosis)
        assert line.gamma == pytest.approx(2.0, rel=1e-5)
    assert tails == sorted(tails, reverse=True)
    assert zeros == sorted(zeros, reverse=True)
    assert kurtoses == sorted(kurtoses, reverse=True)


def test_distributions_of_known_weights() -> None:
    two = distribution(torch.tensor([-1.0, 1.0]))
    assert (two.deviation, two.tail, two.near_zero) == (1.0, 1.0, 0.0)
    assert two.kurtosis == pytest.approx(-2.0)
    uniform = distribution(torch.linspace(-1, 1, 100_001, dtype=D))
    assert uniform.kurtosis == pytest.approx(-1.2, abs=1e-3)
    assert uniform.near_zero == pytest.approx(0.1 / 3**0.5, abs=1e-3)
    normal = distribution(torch.randn(100_000, generator=torch.Generator().manual_seed(0)))
    assert normal.kurtosis == pytest.approx(0.0, abs=0.1)
    with pytest.raises(ValueError, match="must have a spread"):
        distribution(torch.ones(3))


def test_learned_values_are_trained_and_counted() -> None:
    for sharing, more in (("layer", 4), ("shared", 2)):
        model = network()
        before = sum(p.numel() for p in model.parameters())
        compand(model, WeightCompander(learned=True, sharing=sharing))  # type: ignore[arg-type]
        assert sum(p.numel() for p in model.parameters()) == before + more
        values = {n: float(a.detach()) for n, (a, _) in hyperparameters(model).items()}
        train(model, 10)
        after = {n: float(a.detach()) for n, (a, _) in hyperparameters(model).items()}
        assert all(after[n] != values[n] for n in values)
        assert (len(set(after.values())) == 1) == (sharing == "shared")


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("sharing", ["layer", "shared"])
def test_a_saved_network_is_the_same_in_other_weights(learned: bool, sharing: str) -> None:
    """Units are part of the state: also `bound`, which is in units, gives the same function."""
    model, again = network(), network(5)
    with torch.no_grad():
        again[0].weight *= 7
    for each in (model, again):
        compand(each, WeightCompander(learned=learned, sharing=sharing))  # type: ignore[arg-type]
    train(model, 10)
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, 5, dtype=D)
    assert torch.equal(again(x), model(x))
    with bound(again, [1.0, 2.0], [0.5, 0.5]):
        one = again(x)
    with bound(model, [1.0, 2.0], [0.5, 0.5]):
        assert torch.equal(one, model(x))


def test_training_resumes_bit_for_bit() -> None:
    def made(seed: int) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        model = network(seed)
        compand(model, WeightCompander(learned=True))
        return model, torch.optim.Adam(parameter_groups(model, 0.01, 0.1, hyper_lr=0.05))

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(20, 5, generator=torch.Generator().manual_seed(step), dtype=D)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            confine(hyperparameters(model).values())

    whole, optimizer = made(0)
    go(whole, optimizer, range(8))
    half, optimizer = made(0)
    go(half, optimizer, range(4))
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    resumed, optimizer = made(9)
    resumed.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    go(resumed, optimizer, range(4, 8))
    assert all(torch.equal(v, resumed.state_dict()[n]) for n, v in whole.state_dict().items())


def test_decay_of_latent_and_of_effective_weights() -> None:
    """At the minimum of ½(w − t)² + ½ λ v², and of ½(w − t)² + ½ λ w².

    Decay of w has the solution of the plain weight, t/(1 + λ), whatever a and γ; decay of v holds
    w back less, by γ² near zero: (w − t) ψ'(v) + λ v = 0.
    """
    t, decay = torch.tensor([[0.02, -0.01, 0.03]], dtype=D), 0.5
    for gamma in (1.0, 2.0):
        for of in ("latent", "effective"):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(3, 1, bias=False)).double()
            compand(model, WeightCompander(2.0, gamma))
            optimizer = torch.optim.LBFGS(
                model.parameters(), lr=1, max_iter=200, tolerance_grad=1e-14,
                tolerance_change=0, line_search_fn="strong_wolfe",
            )  # fmt: skip

            def closure(
                optimizer: torch.optim.Optimizer = optimizer,
                model: nn.Sequential = model,
                of: str = of,
            ) -> Tensor:
                optimizer.zero_grad()
                fit = 0.5 * (model[0].weight - t).square().sum()
                loss: Tensor = fit + 0.5 * decay * squared_norm(model, of)  # type: ignore[arg-type]
                loss.backward()
                return loss

            optimizer.step(closure)  # type: ignore[arg-type]
            w = model[0].weight.detach()
            v = model[0].parametrizations.weight.original.detach()  # type: ignore[union-attr]
            if of == "effective":
                assert torch.allclose(w, t / (1 + decay), rtol=1e-6)
                continue
            ((a, b),) = (each.values for each in companders(model).values())
            slope = a * b / (b**2 + v**2)
            assert torch.allclose((w - t) * slope, -decay * v, atol=1e-10)
            assert torch.allclose(w, t / (1 + decay / gamma**2), rtol=0.02)


def test_weight_decay_of_an_optimizer_acts_on_latent_weights_alone() -> None:
    model = network()
    compand(model, WeightCompander(learned=True))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(parameter_groups(model, lr=0.1, weight_decay=0.5))
    (0.0 * sum(p.sum() for p in model.parameters())).backward()
    optimizer.step()
    for name, p in model.named_parameters():
        factor = 0.95 if name.endswith("original") else 1.0
        assert torch.allclose(p, factor * before[name], rtol=1e-14), name


def test_confined_values_stay_in_their_ranges() -> None:
    model = network()
    compand(model, WeightCompander(learned=True))
    (log_a, log_b), (other_a, other_b) = hyperparameters(model).values()
    with torch.no_grad():
        log_a.fill_(math.log(0.1)), log_b.fill_(math.log(1e-4))
    kept = other_a.clone(), other_b.clone()
    confine(hyperparameters(model).values())
    assert float(log_a.detach().exp()) == pytest.approx(0.25)
    assert float((log_a - log_b).detach().exp()) == pytest.approx(8.0)
    assert torch.equal(other_a, kept[0])
    assert torch.equal(other_b, kept[1])


def test_plain_states_load_through_the_inverse() -> None:
    plain = network()
    train(plain, 20)
    model = network(3)
    compand(model, WeightCompander(amplitude=3.0))
    assert load_baked(model, plain.state_dict()) == {"0": 0, "2": 0}
    x = torch.randn(6, 5, dtype=D)
    assert torch.allclose(model(x), plain(x), atol=1e-12)
    with torch.no_grad():
        plain[0].weight[0, 0] = 100.0
    assert load_baked(model, plain.state_dict()) == {"0": 1, "2": 0}
    state = dict(plain.state_dict())
    del state["0.weight"]
    with pytest.raises(ValueError, match=r"state has no '0.weight'"):
        load_baked(model, state)
    with pytest.raises(ValueError, match="no compander to load into"):
        load_baked(plain, plain.state_dict())


def test_the_explicit_hypergradient_is_that_at_constant_weights() -> None:
    """`Explicit` against autograd and central differences, and refused where F knows no h."""
    model = network()
    compand(model)
    params = dict(model.named_parameters())
    x, y = torch.randn(12, 5, dtype=D), torch.randint(3, (12,))

    class Run(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            with bound(self.model, a, b):
                return nn.functional.cross_entropy(self.model(x), y)

    run = Run()

    def outer(params: dict[str, Tensor], h: dict[str, Tensor], batch: None) -> Tensor:
        values = h["a"], h["a"] / h["gamma"]
        found: Tensor = torch.func.functional_call(
            run, {f"model.{n}": p for n, p in params.items()}, values
        )
        return found

    h = {k: torch.tensor([2.0, 1.5], dtype=D, requires_grad=True) for k in ("a", "gamma")}
    problem = Problem(lambda *args: outer(*args) + 0.1 * args[1]["a"].sum(), outer)
    found, _ = Explicit()(problem, params, h, None, None, {})
    assert (found.n_grad, found.n_hvp) == (1, 0)
    for name in h:
        for i in range(2):
            values = []
            for sign in (1, -1):
                moved = {k: t.detach().clone() for k, t in h.items()}
                moved[name][i] += sign * 1e-6
                values.append(float(outer(params, moved, None).detach()))
            difference = (values[0] - values[1]) / 2e-6
            assert float(found.grad[name][i]) == pytest.approx(difference, rel=1e-6)
    blind = Problem(problem.inner_loss, lambda p, h, b: outer(p, {**h, "a": h["gamma"]}, b))
    with pytest.raises(ValueError, match=r"hparams\['a'\] is not part of outer_loss"):
        Explicit()(blind, params, h, None, None, {})


def test_bad_input() -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: WeightCompander(amplitude=0.0), "amplitude must be positive"),
        (lambda: WeightCompander(gamma=math.inf), "gamma must be positive"),
        (lambda: WeightCompander(shape="erf"), "shape must be one of"),  # type: ignore[arg-type]
        (lambda: WeightCompander(start="half"), "start must be"),  # type: ignore[arg-type]
        (lambda: compand(network(), targets="encoder*"), "nothing matches 'encoder\\*'.*0, 2"),
        (lambda: WeightCompander(sharing="all"), "sharing must be"),  # type: ignore[arg-type]
        (lambda: bake(network()), "no compander to bake"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()
    model = network()
    compand(model, targets="0")
    with pytest.raises(ValueError, match="parametrized already"):
        compand(model)
    with (
        pytest.raises(ValueError, match="one value for each of 1 companders"),
        bound(model, [1.0, 2.0], [1.0, 2.0]),
    ):
        pass
    flat = network()
    nn.init.constant_(flat[0].weight, 0.1)
    with pytest.raises(ValueError, match="no spread"):
        compand(flat)
    assert not companders(flat), "nothing is changed"
    lost = network()
    with torch.no_grad():
        lost[2].weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="2: the weights are not finite"):
        compand(lost)
    with pytest.raises(ValueError, match="no compander to penalize"):
        squared_norm(network())
    with pytest.raises(ValueError, match="of must be"):
        squared_norm(model, "w")  # type: ignore[arg-type]
    hooked = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="computed by a hook"):
        compand(hooked)
    halves = nn.Sequential(nn.Linear(4, 4))
    halves[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int64), requires_grad=False)
    with pytest.raises(ValueError, match="int64, not floating"):
        compand(halves)
    halves[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="complex64, not floating"):
        compand(halves)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="shared"):
        compand(tied)
