"""Balanced averages: the formula, the dynamics, the limits, and exact resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from bilevel.balanced_ema import (
    BalancedEMA,
    Fixed,
    LiteralRule,
    Norms,
    Polynomial,
    Published,
    Rule,
    coefficient_gradient,
)
from bilevel.continual import InstructionGroups, ParameterSets, continual_metrics, similarity

D = torch.float64


def leaf(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=D).requires_grad_()


def drive(ema: BalancedEMA, steps: int, seed: int = 1, lr: float = 0.1) -> None:
    """Steps with random gradients."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in ema.params.values():
            p.grad = torch.randn(p.shape, generator=generator, dtype=D)
            with torch.no_grad():
                p -= lr * p.grad
        ema.update()


def test_the_formula_minimizes_the_second_order_balance() -> None:
    """F(β) = −β L'Δ + ½ β² L''Δ² + λ(1 − β)Δ in one dimension."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        slope, bend, delta, lam = (torch.rand(4, generator=generator, dtype=D) + 0.1).tolist()
        beta = (slope + lam) / (bend * delta)

        def derivative(
            b: float, s: float = slope, k: float = bend, d: float = delta, m: float = lam
        ) -> float:
            return -s * d + b * k * d**2 - m * d

        assert derivative(beta) == pytest.approx(0.0, abs=1e-9)
        # One number, with L'' the quotient of gradients: the rule is the formula.
        move = 0.3
        norms = Norms(gradient=slope, change=bend * move, move=move, lag=delta, step=2)
        assert LiteralRule(lam).coefficient(norms) == pytest.approx(beta, rel=1e-12)


def test_limits_hull_and_equivariance() -> None:
    start = leaf(4)
    keeps = BalancedEMA({"w": start.detach().clone().requires_grad_()}, Fixed(1.0))
    copies = BalancedEMA({"w": start.detach().clone().requires_grad_()}, Fixed(0.0))
    drive(keeps, 5), drive(copies, 5)
    assert torch.equal(keeps.average["w"], start.detach())
    assert torch.equal(copies.average["w"], copies.params["w"].detach())
    seen, ema = (
        [start.detach()],
        BalancedEMA({"w": start.clone().detach().requires_grad_()}, Fixed(0.7)),
    )
    shifted = BalancedEMA({"w": (2 * start.detach() + 3).requires_grad_()}, Fixed(0.7))
    for step in range(6):
        drive(ema, 1, seed=step), drive(shifted, 1, seed=step, lr=0.2)
        seen.append(ema.params["w"].detach().clone())
    box = torch.stack(seen)
    assert (ema.average["w"] <= box.amax(0) + 1e-12).all()
    assert (ema.average["w"] >= box.amin(0) - 1e-12).all()
    assert torch.allclose(shifted.average["w"], 2 * ema.average["w"] + 3)


def test_the_polynomial_rule_with_c_1_is_the_mean() -> None:
    ema = BalancedEMA({"w": leaf(3)}, Polynomial(1.0))
    values = []
    for step in range(7):
        drive(ema, 1, seed=step)
        values.append(ema.params["w"].detach().clone())
    assert torch.allclose(ema.average["w"], torch.stack(values).mean(0))
    assert ema.stats().fallbacks == 0


def test_sizes() -> None:
    """Copies of a tensor leave the literal rule with λ = 0 alone and halve the published 1 − β."""
    one = Norms(gradient=50.0, change=20.0, move=3.0, lag=40.0, step=2)
    two = Norms(*(2 * v for v in one[:4]), step=2)  # type: ignore[arg-type, operator]
    literal = LiteralRule(0.0)
    assert literal.coefficient(one) == literal.coefficient(two)
    published = Published(0.1)
    first, second = published.coefficient(one), published.coefficient(two)
    assert first is not None
    assert second is not None
    assert (1 - first) / (1 - second) == pytest.approx(2.0, rel=0.02)


@pytest.mark.parametrize(
    ("rule", "limit"),
    [(Published(1.0), "published"), (LiteralRule(1.0), "literal")],
)
def test_dynamics_under_a_constant_drift(rule: Rule, limit: str) -> None:
    """Published: t(1 − β) → k/(1 − k); literal: β → q/(1 + q), q = (‖g‖ + λ)/‖change‖ (derived)."""
    drift, average, value, alphas = 1.0, 0.0, 0.0, []
    gradient, change = 2.0, 10.0
    for step in range(1, 20_001):
        value += drift
        lag = value - average
        norms = Norms(gradient, change, drift, lag, step)
        beta = rule.coefficient(norms)
        assert beta is not None
        if not 0 < beta < 1:
            beta = 0.99
        average = beta * average + (1 - beta) * value
        alphas.append(1 - beta)
    if limit == "published":
        k = 1.0 * (1 + gradient) / change
        assert 20_000 * alphas[-1] == pytest.approx(k / (1 - k), rel=0.02)
    else:
        q = (gradient + 1) / change
        assert 1 - alphas[-1] == pytest.approx(q / (1 + q), rel=0.02)


def test_fallbacks_and_bad_gradients_are_counted() -> None:
    ema = BalancedEMA({"a": leaf(3), "b": leaf(2, seed=2)}, LiteralRule(), fallback=0.9)
    drive(ema, 1)
    assert ema.stats().fallbacks == 2, "no earlier gradient"
    assert ema.stats().last == {"a": 0.9, "b": 0.9}
    before = {n: v.clone() for n, v in ema.average.items()}
    for p in ema.params.values():
        p.grad = torch.full_like(p, torch.nan)
    ema.update()
    assert ema.stats().skipped == 1
    assert all(torch.equal(before[n], v) for n, v in ema.average.items())


@pytest.mark.parametrize(("granularity", "groups"), [("tensor", 3), ("layer", 2), ("global", 1)])
def test_granularity(granularity: str, groups: int) -> None:
    params = {"x.A": leaf(3), "x.B": leaf(2, seed=2), "y.A": leaf(2, seed=3)}
    ema = BalancedEMA(params, Published(0.05), granularity=granularity)  # type: ignore[arg-type]
    drive(ema, 3)
    assert len(ema.stats().last) == groups


def test_resume_is_exact_and_applying_is_reversible() -> None:
    one = BalancedEMA({"w": leaf(5)}, LiteralRule(3.0))
    drive(one, 6)
    two = BalancedEMA({"w": one.params["w"].detach().clone().requires_grad_()}, LiteralRule(3.0))
    two.load_state_dict(one.state_dict())
    drive(one, 5, seed=9), drive(two, 5, seed=9)
    assert torch.equal(one.average["w"], two.average["w"])
    assert one.stats() == two.stats()
    value = one.params["w"].detach().clone()
    with one.applied():
        assert torch.equal(one.params["w"], one.average["w"])
    assert torch.equal(one.params["w"], value)
    one.end_task()
    one.end_task()
    assert torch.equal(one.params["w"], one.average["w"])


def test_the_derivative_in_a_coefficient() -> None:
    """Against autograd through the recursion, for a loss of an old task."""
    thetas = [leaf(4, seed=s).detach() for s in range(5)]
    betas = torch.tensor([0.9, 0.7, 0.8, 0.95], dtype=D, requires_grad=True)
    target = leaf(4, seed=9).detach()
    average, history = thetas[0], []
    for beta, theta in zip(betas, thetas[1:], strict=True):
        history.append(average)
        average = beta * average + (1 - beta) * theta
    loss = (average - target).pow(4).sum()
    (expected,) = torch.autograd.grad(loss, betas)
    grad = {"w": (4 * (average - target) ** 3).detach()}
    for t in range(4):
        later = float(betas[t + 1 :].detach().prod())
        before = {"w": history[t].detach()}
        found = coefficient_gradient(grad, before, {"w": thetas[t + 1]}, later)
        assert found == pytest.approx(float(expected[t]), rel=1e-12)


SHORT = ["Answer with a single word or phrase."]
CHOICE = ["Choose the letter of the right option."]


def test_groups_of_instructions() -> None:
    assert similarity(SHORT, SHORT) == pytest.approx(1.0)
    assert similarity(["draw boxes"], ["count sheep"]) == 0.0
    paraphrases = ["Answer briefly.", "Give a short answer.", "Reply in one word.", "Be concise."]
    assert similarity(paraphrases, paraphrases) == pytest.approx(1.0)
    groups = InstructionGroups(threshold=0.5)
    assert groups.assign(SHORT) == (0, True)
    assert groups.assign(["Answer with a single word."]) == (0, False)
    assert groups.assign(CHOICE) == (1, True)
    assert groups.route(["Choose the letter of the option."]) == 1
    with pytest.raises(LookupError, match="no group has similarity"):
        groups.route(["paint it black"])
    with pytest.raises(ValueError, match="must not be empty"):
        groups.assign([])


def test_continual_metrics() -> None:
    a = torch.tensor([[0.9, 0.1, 0.2], [0.95, 0.8, 0.3], [0.6, 0.7, 0.85]], dtype=D)
    found = continual_metrics(a)
    assert found.average == pytest.approx((0.6 + 0.7 + 0.85) / 3)
    assert found.forgetting == pytest.approx((0.35 + 0.1) / 2)
    assert found.new == pytest.approx((0.9 + 0.8 + 0.85) / 3)
    assert found.backward_transfer == pytest.approx((-0.3 - 0.1) / 2)
    with pytest.raises(ValueError, match="square with at least two tasks"):
        continual_metrics(a[:2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BalancedEMA({}, Fixed()), "at least one trained tensor"),
        (lambda: BalancedEMA({"w": leaf(1)}, Fixed(), granularity="block"), "granularity must"),  # type: ignore[arg-type]
        (lambda: BalancedEMA({"w": leaf(1)}, Fixed(), fallback=2.0), "fallback must lie"),
        (lambda: Fixed(1.5), "old must lie"),
        (lambda: Polynomial(0.0), "c must be positive"),
        (lambda: LiteralRule(-1.0), "trade_off must not be negative"),
        (lambda: Published(0.0), "kappa must be positive"),
        (lambda: InstructionGroups(1.5), "threshold must lie"),
        (lambda: similarity([], SHORT), "must not be empty"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_gradients_and_changed_shapes() -> None:
    ema = BalancedEMA({"w": leaf(3)}, Fixed())
    with pytest.raises(RuntimeError, match="w has no gradient"):
        ema.update()
    other = BalancedEMA({"w": leaf(4)}, Fixed())
    with pytest.raises(ValueError, match="state must have shapes"):
        other.load_state_dict(ema.state_dict())
    ema.params["w"].data = torch.zeros(4, dtype=D)
    ema.params["w"].grad = torch.zeros(4, dtype=D)
    with pytest.raises(ValueError, match="w had shape"):
        ema.update()


def test_the_average_of_half_precision_does_not_stall() -> None:
    """A thousand updates of 0.1 % reach 1 − 0.999¹⁰⁰⁰; in bfloat16 none of them would count."""
    w = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    ema = BalancedEMA({"w": w}, Fixed(0.999))
    with torch.no_grad():
        w.fill_(1.0)
    w.grad = torch.ones_like(w)
    for _ in range(1000):
        ema.update()
    assert ema.average["w"].dtype == torch.float32
    assert ema.average["w"][0].item() == pytest.approx(1 - 0.999**1000, rel=1e-3)
    ema.end_task()
    assert w.dtype == torch.bfloat16


def test_nan_parameters_raise_and_nothing_is_lost() -> None:
    ema = BalancedEMA({"a": leaf(3), "b": leaf(2, seed=2)}, LiteralRule(3.0))
    drive(ema, 3)
    before, stats = ema.state_dict(), ema.stats()
    with torch.no_grad():
        ema.params["b"][0] = torch.nan
    with pytest.raises(ValueError, match="b must be finite"):
        ema.update()
    assert all(torch.equal(before["average"][n], v) for n, v in ema.average.items())
    assert ema.stats() == stats
    with pytest.raises(ValueError, match="b must be finite"):
        BalancedEMA(ema.params, Fixed())


@pytest.mark.parametrize(
    "other",
    [
        lambda p: BalancedEMA(p, LiteralRule(2.0)),
        lambda p: BalancedEMA(p, Fixed()),
        lambda p: BalancedEMA(p, LiteralRule(3.0), granularity="global"),
        lambda p: BalancedEMA(p, LiteralRule(3.0), fallback=0.9),
    ],
)
def test_a_state_of_another_rule_is_refused(other: Callable[[dict[str, Tensor]], object]) -> None:
    one = BalancedEMA({"w": leaf(3)}, LiteralRule(3.0))
    drive(one, 3)
    two = other({"w": leaf(3)})
    assert isinstance(two, BalancedEMA)
    with pytest.raises(ValueError, match="state must be of"):
        two.load_state_dict(one.state_dict())
    assert two.stats().updates == 0


def test_sharded_parameters_share_the_coefficient_of_the_whole() -> None:
    """Two ranks with half the numbers each, whose sums are added, choose β of the whole."""
    half = leaf(4).detach()
    whole = BalancedEMA({"w": torch.cat([half, half]).requires_grad_()}, Published(0.05))
    shard = BalancedEMA(
        {"w": half.clone().requires_grad_()}, Published(0.05), reduce=lambda t: 2 * t
    )
    for step in range(4):
        grad = leaf(4, seed=step + 5).detach()
        whole.params["w"].grad, shard.params["w"].grad = torch.cat([grad, grad]), grad
        for ema in (whole, shard):
            with torch.no_grad():
                ema.params["w"] -= 0.1 * ema.params["w"].grad
            ema.update()
        assert shard.stats().last["w"] == pytest.approx(whole.stats().last["w"], rel=1e-12)


def test_sets_of_parameters_by_any_similarity() -> None:
    def same_first(new: Sequence[str], old: Sequence[str]) -> float:
        return float(new[0][0] == old[0][0])

    w = leaf(2)
    start = w.detach().clone()
    sets = ParameterSets({"w": w}, InstructionGroups(0.5, similar=same_first))
    assert sets.open(["a 1"]) == (0, True)
    with torch.no_grad():
        w += 1
    assert sets.open(["b 1"]) == (1, True)
    assert torch.equal(w, start)
    with torch.no_grad():
        w += 5
    state = sets.state_dict()
    assert sets.open(["a 2"]) == (0, False)
    assert torch.equal(w, start + 1)
    sets.use(1)
    assert torch.equal(w, start + 5)
    v = leaf(2, seed=3)
    again = ParameterSets({"w": v}, InstructionGroups(0.5, similar=same_first))
    again.load_state_dict(state)
    assert again.active == 1
    assert torch.equal(v, start + 5)
    assert again.open(["a 3"]) == (0, False)
    with pytest.raises(IndexError, match="group must lie"):
        sets.use(2)
    with pytest.raises(ValueError, match="must not be empty"):
        sets.open([])
    w.data = torch.zeros(3, dtype=D)
    with pytest.raises(ValueError, match="w had shape"):
        sets.open(["b 2"])
    with pytest.raises(ValueError, match="similar must return"):
        InstructionGroups(0.5, [["x"]], lambda new, old: 2.0).assign(["y"])
