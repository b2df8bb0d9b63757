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
    hyperparameters,
    report,
)
from hypergrad import CG, Implicit, Problem

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
    tails, zeros = [], []
    for amplitude in (4.0, 2.0, 1.0):
        model = nn.Sequential(nn.Linear(100, 100))
        nn.init.normal_(model[0].weight, std=0.1)
        compand(model, WeightCompander(amplitude=amplitude))
        (line,) = report(model).values()
        tails.append(line.tail)
        zeros.append(line.near_zero)
        assert line.gamma == pytest.approx(2.0, rel=1e-5)
    assert tails == sorted(tails, reverse=True)
    assert zeros == sorted(zeros, reverse=True)


def test_learned_values_are_trained_and_counted() -> None:
    model = network()
    before = sum(p.numel() for p in model.parameters())
    compand(model, WeightCompander(learned=True))
    assert sum(p.numel() for p in model.parameters()) == before + 4
    values = {n: float(a.detach()) for n, (a, _) in hyperparameters(model).items()}
    train(model, 10)
    assert all(float(a.detach()) != values[n] for n, (a, _) in hyperparameters(model).items())
    again = network(5)
    compand(again, WeightCompander(learned=True))
    again.load_state_dict(model.state_dict())
    x = torch.randn(4, 5, dtype=D)
    assert torch.equal(again(x), model(x))


def test_bad_input() -> None:
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: WeightCompander(amplitude=0.0), "amplitude must be positive"),
        (lambda: WeightCompander(gamma=math.inf), "gamma must be positive"),
        (lambda: WeightCompander(shape="erf"), "shape must be one of"),  # type: ignore[arg-type]
        (lambda: WeightCompander(start="half"), "start must be"),  # type: ignore[arg-type]
        (lambda: compand(network(), targets="encoder*"), "nothing matches 'encoder\\*'.*0, 2"),
        (lambda: bake(network()), "no compander"),
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
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="shared"):
        compand(tied)
