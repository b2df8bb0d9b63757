"""F2SA, BOME and PBGD against the closed forms of a penalized quadratic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import BOME, F2SA, PBGD, SGD, Adam, Estimator, Hypergradient, Problem, train
from hypergrad.check import solve_inner
from tests.hypergrad import quadratic as q
from tests.hypergrad.problems import _dropout, mlp, module, softmax_ridge
from tests.hypergrad.test_implicit import estimate, flat

FAST = SGD(lr=0.5)  # the curvatures of the quadratic are 1 to 2
SOLVED = 60  # steps of it after which 0.5⁶⁰ of the error is left


def call(method: Estimator[Any], h: Tensor, w: Tensor | None = None) -> tuple[Hypergradient, Any]:
    params, hparams = q.start(w), q.at(h)
    state = method.init(q.PROBLEM, params, hparams)
    return method(q.PROBLEM, params, hparams, None, None, state)


def descend(method: Estimator[Any], lr: float, steps: int) -> tuple[Tensor, Hypergradient, Any]:
    """Gradient descent on h with what the method returns; h, and the last call's results."""
    params, h = q.start(), torch.zeros(3, dtype=torch.float64)
    state = method.init(q.PROBLEM, params, q.at(h))
    for _ in range(steps):
        found, state = method(q.PROBLEM, params, q.at(h), None, None, state)
        params, h = found.params, h - lr * found.grad["h"]
    return h, found, state


@pytest.mark.parametrize("multiplier", [3.0, 10.0, 1000.0])
def test_f2sa_bias_in_closed_form(multiplier: float) -> None:
    """Estimate − exact = −BᵀA⁻¹C(C + λA)⁻¹C(w* − t)."""
    found, state = call(F2SA(FAST, SOLVED, multiplier), q.H)
    residual = torch.linalg.solve(q.C + multiplier * q.A, q.C @ (q.solution(q.H) - q.TARGET))
    bias = -q.B.T @ torch.linalg.solve(q.A, q.C @ residual)
    assert float((found.grad["h"] - q.hypergradient(q.H) - bias).norm()) < 1e-8
    assert float(bias.norm()) > 1e-4
    assert torch.allclose(state["penalized"], q.penalized(q.H, multiplier), atol=1e-12)
    assert torch.allclose(found.params["w"], q.solution(q.H), atol=1e-12)


def test_f2sa_error_is_inverse_to_the_multiplier() -> None:
    exact = q.hypergradient(q.H)
    errors = [
        float((call(F2SA(FAST, SOLVED, multiplier), q.H)[0].grad["h"] - exact).norm())
        for multiplier in (100.0, 1000.0)
    ]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


def test_f2sa_is_the_gradient_of_the_penalized_problem() -> None:
    """Central differences of λ [min (f + F/λ) − min f] on a problem that is not quadratic."""
    case, multiplier = softmax_ridge(), 10.0
    inner, outer = case.problem.inner_loss, case.problem.outer_loss
    penalized = Problem(lambda p, h, b: inner(p, h, b[0]) + outer(p, h, b[1]) / multiplier, outer)
    both = (case.inner, case.outer)

    def value(log_wd: Tensor) -> float:
        h = {"log_wd": log_wd.requires_grad_()}
        y = solve_inner(penalized, case.params, h, both)
        z = solve_inner(case.problem, case.params, h, case.inner)
        gap = penalized.inner_loss(y, h, both) - inner(z, h, case.inner)
        return multiplier * float(gap.detach())

    h, eps = case.hparams["log_wd"].detach(), 1e-4
    differences = torch.tensor(
        [
            (value(h + eps * e) - value(h - eps * e)) / (2 * eps)
            for e in torch.eye(len(h), dtype=h.dtype)
        ],
        dtype=h.dtype,
    )
    found = estimate(F2SA(SGD(lr=1.0, momentum=0.9), 400, multiplier), case).grad["log_wd"]
    assert torch.allclose(found, differences, rtol=1e-6, atol=1e-9)


def test_f2sa_growing_multiplier_reaches_the_optimum() -> None:
    fixed, _, _ = descend(F2SA(FAST, 5, multiplier=10.0, growth=0.0), 0.3, 150)
    growing, found, state = descend(F2SA(FAST, 5, multiplier=10.0, growth=1.0), 0.3, 150)
    assert torch.allclose(fixed, q.penalized_optimum(10.0), atol=1e-8)
    error = float((growing - q.optimum()).norm())
    assert error < 0.1 * float((fixed - q.optimum()).norm())
    assert state["multiplier"] == 10.0 + 150
    assert torch.allclose(found.params["w"], q.solution(growing), atol=0.01)


def test_f2sa_sequences_share_dropout_masks() -> None:
    """y − z is of size 1/λ: with other masks λ(y − z) would be noise of size λ."""
    case = module(_dropout, seeded=False)
    found = []
    for multiplier in (1e4, 1e6):
        torch.manual_seed(0)
        found.append(flat(estimate(F2SA(SGD(0.1), 3, multiplier), case).grad))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 1e-3


def test_f2sa_continues_both_optimizers() -> None:
    """Two calls of one step at growth 0 are one call of two."""
    case = mlp()
    arguments = (case.hparams, case.inner, case.outer)
    once, twice = F2SA(Adam(0.05), 1, 5.0, 0.0), F2SA(Adam(0.05), 2, 5.0, 0.0)
    state = once.init(case.problem, case.params, case.hparams)
    found, state = once(case.problem, case.params, *arguments, state)
    found, state = once(case.problem, found.params, *arguments, state)
    assert torch.equal(flat(found.grad), flat(estimate(twice, case).grad))
    state["penalized"] = state["penalized"][:-1]
    with pytest.raises(ValueError, match=r"state\['penalized'\] has 42 entries, but params .* 43"):
        once(case.problem, found.params, *arguments, state)


@pytest.mark.parametrize("method", [BOME(FAST, SOLVED), PBGD(FAST, SOLVED, multiplier=7.0)])
def test_gap_and_gradient_in_closed_form(method: Estimator[Any]) -> None:
    """q = (w − w*)ᵀA(w − w*)/2 and ∂q/∂h = −Bᵀ(w − w*)."""
    w = torch.linspace(-1, 1, 4).double()
    found, state = call(method, q.H, w)
    off = w - q.solution(q.H)
    assert state["gap"] == pytest.approx(float(0.5 * off @ q.A @ off), rel=1e-10)
    expected = q.RHO * q.H - state["multiplier"] * q.B.T @ off
    assert float((found.grad["h"] - expected).norm()) < 1e-8


@pytest.mark.parametrize("barrier", ["gradient", "value"])
def test_bome_direction_is_the_projection(barrier: Any) -> None:
    """δ = ∇F + λ∇q is the point nearest to ∇F with ⟨δ, ∇q⟩ ≥ φ."""
    w = torch.linspace(-1, 1, 4).double()
    lr = 0.01
    off, seen = w - q.solution(q.H), set()
    constraint = torch.cat([q.A @ off, -q.B.T @ off])
    for eta in (0.05, 0.5, 50.0):
        method = BOME(SGD(lr), SOLVED, FAST, eta, barrier)
        found, state = call(method, q.H, w)
        direction = torch.cat([(w - found.params["w"].detach()) / lr, found.grad["h"]])
        outer = torch.cat([q.C @ (w - q.TARGET), q.RHO * q.H])
        rate = eta * (float(constraint @ constraint) if barrier == "gradient" else state["gap"])
        slack = float(direction @ constraint) - rate
        if state["multiplier"] > 0:
            assert slack == pytest.approx(0, abs=1e-8)
        else:
            assert slack >= 0
        assert torch.allclose(direction - outer, state["multiplier"] * constraint, atol=1e-8)
        seen.add(state["multiplier"] > 0)
    assert seen == {True, False}


def test_bome_without_a_gap_follows_the_outer_loss() -> None:
    """At w* in float64 ∇q is rounding; with w_T = w exactly it is zero, and λ is 0, not NaN."""
    problem = Problem(
        lambda p, h, b: 0.5 * (p["w"] - h["h"]).square().sum(), lambda p, h, b: p["w"].sum()
    )
    one = torch.ones(2, dtype=torch.float64)
    params = {"w": one.clone().requires_grad_()}
    method = BOME(SGD(0.1), steps=3)
    state = method.init(problem, params, {})
    found, state = method(problem, params, {"h": one.clone().requires_grad_()}, None, None, state)
    assert (state["multiplier"], state["gap"]) == (0.0, 0.0)
    assert torch.equal(found.params["w"].detach(), 0.9 * one)


@pytest.mark.parametrize("barrier", ["gradient", "value"])
def test_bome_comes_near_the_optimum(barrier: Any) -> None:
    h, found, state = descend(BOME(SGD(0.05), 10, FAST, barrier=barrier), 0.05, 200)
    assert float((h - q.optimum()).norm()) < 0.05 * float(q.optimum().norm())
    assert torch.allclose(found.params["w"], q.solution(h), atol=0.15)
    assert 0 <= state["gap"] < 0.01


def test_bome_error_shrinks_with_its_step_size() -> None:
    errors = [
        float((descend(BOME(SGD(lr), 10, FAST), lr, int(10 / lr))[0] - q.optimum()).norm())
        for lr in (0.1, 0.025)
    ]
    assert errors[1] < 0.35 * errors[0]


def test_pbgd_converges_to_the_penalized_optimum() -> None:
    h, found, _ = descend(PBGD(FAST, 25, multiplier=4.0), 0.15, 150)
    assert torch.allclose(h, q.penalized_optimum(4.0), atol=1e-6)
    assert torch.allclose(found.params["w"], q.penalized(h, 4.0), atol=1e-6)


def test_pbgd_fixed_points_approach_the_optimum_inversely_to_the_multiplier() -> None:
    errors = []
    for multiplier in (50.0, 500.0):
        h = q.penalized_optimum(multiplier)
        y = q.penalized(h, multiplier)
        found, _ = call(PBGD(FAST, SOLVED, multiplier=multiplier), h, y)
        assert float(found.grad["h"].norm()) < 1e-8
        assert torch.allclose(found.params["w"].detach(), y, atol=1e-12)
        errors.append(float((h - q.optimum()).norm()))
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05)


@pytest.mark.parametrize("method", [BOME(SGD(0.1), 3, eta=50.0), PBGD(SGD(0.1), 3)])
def test_gap_shares_random_numbers(method: Estimator[Any]) -> None:
    """f = |w − h + noise|²/2: ∂q/∂h = w_T − w if both evaluations draw the same noise."""

    def noisy(p: Any, h: Any, b: Any) -> Tensor:
        return 0.5 * (p["w"] - h["h"] + torch.randn(2, dtype=torch.float64)).square().sum()

    problem = Problem(noisy, lambda p, h, b: p["w"].square().sum())
    params = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)}
    hparams = {"h": torch.zeros(2, dtype=torch.float64, requires_grad=True)}
    torch.manual_seed(0)
    w_t = train(problem, params, hparams, SGD(0.1), None, steps=3).params["w"]
    torch.manual_seed(0)
    state = method.init(problem, params, hparams)
    found, state = method(problem, params, hparams, None, None, state)
    expected = state["multiplier"] * (w_t - params["w"]).detach()
    assert state["multiplier"] > 0
    assert torch.allclose(found.grad["h"], expected, rtol=1e-10)


def test_another_rule_for_the_inner_minimum() -> None:
    """`inner_optimizer` makes w_T; `optimizer` moves w."""
    found, _ = call(PBGD(SGD(0.01), 1, SGD(0.5), multiplier=4.0), q.H)
    gradient = -(q.B @ q.H + q.OFFSET)
    solved = -0.5 * gradient
    assert torch.allclose(found.grad["h"], q.RHO * q.H + 4.0 * q.B.T @ solved)
    moved = -0.01 * (gradient - q.C @ q.TARGET / 4.0)
    assert torch.allclose(found.params["w"].detach(), moved)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: F2SA(FAST, 1, multiplier=0.0), "F2SA multiplier must be positive, but got 0.0"),
        (lambda: F2SA(FAST, 1, growth=-0.1), "F2SA growth must not be negative, but got -0.1"),
        (lambda: PBGD(FAST, 1, multiplier=-2.0), "PBGD multiplier must be positive, but got -2.0"),
        (lambda: BOME(FAST, 1, eta=0.0), "BOME eta must be positive, but got 0.0"),
        (lambda: BOME(FAST, 1, barrier="norm"), "barrier must be one of .* but got 'norm'"),
        (lambda: F2SA(FAST, 1, multiplier=float("nan")), "must be positive, but got nan"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
