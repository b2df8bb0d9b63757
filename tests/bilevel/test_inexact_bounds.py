"""The inequalities of MAID against exact solutions: no bound is ever below the truth."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bilevel.inexact import (
    SmoothInner,
    Smoothness,
    Tools,
    estimate_error,
    inexact_hypergradient,
    quadratic,
    sample_problem,
    tv_denoising,
)
from bilevel.inexact.bounds import hypergradient_bound, value_bounds
from bilevel.inexact.constants import BOUND, VALUE
from tests.bilevel.inexact_problems import (
    DOUBLE,
    Least,
    images,
    normal,
    softmax,
    tools_of,
    variation,
)

ACCURACIES = [10.0**-k for k in range(6)]


def exact(tools: Tools, x0: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, float]:
    """x̂, ∇f and f, to rounding."""
    found, _ = inexact_hypergradient(tools, x0, theta, 1e-13, 1e-13, {})
    return found.x, found.z, found.value


@dataclass
class Misplaced:
    """z, ω and the value bounds for an x̃ AT distance ε of x̂ in every sample, for each δ."""

    z: Tensor
    omega: float
    lower: float
    upper: float


def misplaced(
    tools: Tools, x_hat: Tensor, theta: Tensor, eps: float, deltas: list[float], seed: int
) -> list[Misplaced]:
    level, (m, n) = tools.level, x_hat.shape

    def direction(s: int) -> Tensor:
        rows = normal(s, m, n)
        return rows / rows.norm(dim=1, keepdim=True)

    x = x_hat + eps * direction(seed)
    outer, point = level.outer(x, theta), level.linearize(x, theta)
    hessian = torch.stack([point.hvp(e.expand(m, n)) for e in torch.eye(n, dtype=DOUBLE)], 2)
    constants, _ = tools.smoothness.at(level, x, theta, {}, BOUND, point)
    assert not constants.estimated
    norms, distance = outer.gradient.norm(dim=1), torch.full((m,), eps, dtype=DOUBLE)
    lower, upper = value_bounds(constants, distance, outer.values, norms)
    found = []
    for delta in deltas:
        right = outer.gradient - delta * direction(seed + 1)
        q = torch.linalg.solve(hessian, right[..., None])[..., 0]
        z = outer.direct - point.cross(q) / m
        residual = torch.full((m,), delta, dtype=DOUBLE)
        omega = hypergradient_bound(constants, distance, residual, norms)
        found.append(Misplaced(z, omega, lower, upper))
    return found


PROBLEMS = {
    "quadratic": lambda seed: Least(seed=seed).inner(),
    "softmax": lambda seed: softmax(seed),
    "one penalty": lambda seed: softmax(seed, shape=()),
    "variation": lambda seed: variation(),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bound_is_never_below_the_error(name: str) -> None:
    """Check 8.1, and the sandwich of 8.2: ε, δ from 1 to 1e-5, several θ and directions."""
    ratios = []
    for seed in range(3):
        inner = PROBLEMS[name](seed)
        tools = tools_of(inner)
        base = tools.level.chart.theta(inner.hparams)
        theta = base + 0.3 * normal(seed, len(base))
        x_hat, truth, f = exact(tools, tools.level.start, theta)
        for eps in ACCURACIES:
            for found in misplaced(tools, x_hat, theta, eps, [*ACCURACIES, 0.0], seed):
                error = float((found.z - truth).norm())
                assert error <= found.omega
                assert found.lower - 1e-10 <= f <= found.upper + 1e-10
                ratios.append(found.omega / error)
    assert min(ratios) > 1.0


def test_the_bound_is_attained() -> None:
    """On a 1-D quadratic with |x̃ - x̂| = ε and δ = 0."""
    one = torch.ones(1, 1, dtype=DOUBLE)
    inner = quadratic(2 * one, one[0], 3 * one, one, one[0])
    tools, theta = tools_of(inner), torch.tensor([0.3], dtype=DOUBLE)
    x_hat, truth, _ = exact(tools, tools.level.start, theta)
    (found,) = misplaced(tools, x_hat, theta, 0.1, [0.0], 0)
    assert float((found.z - truth).abs()) == pytest.approx(found.omega, rel=1e-9)


def test_convexity_makes_the_lower_bound_tighter() -> None:
    inner = Least().inner()
    tools, theta = tools_of(inner), torch.ones(4, dtype=DOUBLE)
    constants, _ = tools.smoothness.at(tools.level, tools.level.start, theta, {})
    eps, values, norms = (torch.tensor([v], dtype=DOUBLE) for v in (0.5, 2.0, 3.0))
    lower, upper = value_bounds(constants, eps, values, norms)
    other, same = value_bounds(replace(constants, g_convex=False), eps, values, norms)
    assert upper == same
    assert lower - other == pytest.approx(0.5 * float(constants.L_g) * 0.25)
    assert lower == pytest.approx(2.0 - 1.5, rel=1e-12)


@pytest.mark.parametrize("problem", ["quadratic", "softmax", "variation"])
@pytest.mark.parametrize("eps", [1e-1, 1e-3])
def test_solved_hypergradients_are_within_their_bound(problem: str, eps: float) -> None:
    """With real solvers; z of an exact solve is that of central differences of f."""
    inner = PROBLEMS[problem](0)
    tools = tools_of(inner)
    theta = tools.level.chart.theta(inner.hparams)
    x_hat, truth, _ = exact(tools, tools.level.start, theta)
    for k in range(min(3, len(theta))):
        step = torch.zeros_like(theta)
        step[k] = 1e-5
        high, low = (exact(tools, x_hat, theta + s * step)[2] for s in (1, -1))
        assert (high - low) / 2e-5 == pytest.approx(float(truth[k]), rel=1e-5, abs=1e-8)
    found, _ = inexact_hypergradient(tools, tools.level.start, theta, eps, eps, {}, None, BOUND)
    assert bool((found.eps <= eps).all())
    assert bool((found.delta <= eps).all())
    assert bool(((found.x - x_hat).norm(dim=1) <= found.eps).all())
    assert found.omega is not None
    assert float((found.z - truth).norm()) <= found.omega


def test_a_zero_jacobian_gives_zero_and_no_error() -> None:
    """Check 8.6."""
    least = Least()
    inner = quadratic(least.A1, least.b1, least.A2, 0 * least.A3, least.b2)
    tools = tools_of(inner)
    found, _ = inexact_hypergradient(
        tools, tools.level.start, torch.ones(4, dtype=DOUBLE), 0.1, 0.1, {}, None, BOUND
    )
    assert found.norm == 0.0
    assert found.omega == 0.0


def test_scaling_the_outer_loss_scales_gradient_and_bound() -> None:
    """Check 8.6: with δ scaled as well, since it is a residual of the scaled system."""
    outcomes = []
    for scale in (1.0, 4.0):
        tools = tools_of(Least(scale=scale).inner())
        theta = torch.ones(4, dtype=DOUBLE)
        outcomes.append(
            inexact_hypergradient(
                tools, tools.level.start, theta, 0.1, scale * 0.1, {}, None, BOUND
            )[0]
        )
    first, second = outcomes
    assert torch.allclose(4 * first.z, second.z, rtol=1e-9)
    assert 4 * first.omega == pytest.approx(second.omega, rel=1e-9)


def test_means_over_samples_do_not_depend_on_chunks() -> None:
    """Check 8.8: hypergradient and bound of six images are the means of those of two each."""
    stack = images(6)

    def found(rows: slice) -> tuple[Tensor, float, float]:
        inner = tv_denoising({k: v[rows] for k, v in stack.items()}, init=(-2.0, -2.0))
        tools = tools_of(inner)
        theta = tools.level.chart.theta(inner.hparams)
        made, _ = inexact_hypergradient(
            tools, tools.level.start, theta, 1e-2, 1e-2, {}, None, BOUND
        )
        assert made.omega is not None
        return made.z, made.omega, made.upper

    whole = found(slice(0, 6))
    parts = [found(slice(i, i + 2)) for i in (0, 2, 4)]
    assert torch.allclose(whole[0], torch.stack([p[0] for p in parts]).mean(0), rtol=1e-9)
    for i in (1, 2):
        assert whole[i] == pytest.approx(math.fsum(p[i] for p in parts) / 3, rel=1e-9)


def test_an_outer_loss_that_depends_on_hyperparameters_directly() -> None:
    """∂g/∂θ is part of z, and its Lipschitz constant of ω: zero violations, closed form."""
    least = Least()
    base = least.inner()
    weight = normal(3, 6, 4)
    rows = torch.ones(1, dtype=DOUBLE)

    def outer(params: dict[str, Tensor], hparams: dict[str, Tensor], batch: None) -> Tensor:
        first = base.problem.outer_loss({"x": params["x"][0]}, hparams, batch)
        return (first + params["x"][0] @ weight @ hparams["theta"]) * rows

    def inner_loss(params: dict[str, Tensor], hparams: dict[str, Tensor], batch: None) -> Tensor:
        return base.problem.inner_loss({"x": params["x"][0]}, hparams, batch) * rows

    given = base.smoothness
    direct = float(torch.linalg.matrix_norm(weight, 2))
    smoothness = Smoothness(
        given.mu, given.L, given.L_g, given.L_J, given.L_H, None, given.jacobian, direct
    )
    start = {"x": torch.zeros(1, 6, dtype=DOUBLE, requires_grad=True)}
    inner = SmoothInner(
        sample_problem(inner_loss, outer),
        start,
        smoothness,
        hparams={"theta": torch.ones(4, dtype=DOUBLE)},
    )
    tools, theta = tools_of(inner), torch.ones(4, dtype=DOUBLE)
    x_hat, truth, _ = exact(tools, tools.level.start, theta)
    h_inv_g = torch.linalg.solve(
        least.H,
        least.A1.T @ (least.A1 @ least.x_hat(theta) - least.b1) + weight @ theta,
    )
    closed = weight.T @ least.x_hat(theta) - least.J.T @ h_inv_g
    assert torch.allclose(truth, closed, rtol=1e-9)
    for seed, eps in enumerate(ACCURACIES):
        (found,) = misplaced(tools, x_hat, theta, eps, [0.0], seed)
        assert float((found.z - truth).norm()) <= found.omega


@pytest.mark.parametrize("problem", ["quadratic", "softmax", "variation"])
def test_the_goal_oriented_estimate_is_close(problem: str) -> None:
    """Card section 10: 1.25 times the true error, to second order in ε."""
    inner = PROBLEMS[problem](0)
    tools = tools_of(inner)
    theta = tools.level.chart.theta(inner.hparams)
    _, truth, _ = exact(tools, tools.level.start, theta)
    start = tools.level.start
    found, _ = inexact_hypergradient(tools, start, theta, 1e-4, 1e-3, {}, None, BOUND)
    error = float((found.z - truth).norm())
    guess = estimate_error(tools, found, theta, rtol=1e-9)
    assert guess == pytest.approx(1.25 * error, rel=2e-2)
    rough = estimate_error(tools, found, theta)
    assert 0.5 * guess < rough < 2.0 * guess  # few CG iterations: an order of magnitude
    assert found.omega is not None
    assert guess < found.omega


def test_estimates_are_near_the_constants_and_marked() -> None:
    least = Least()
    given = least.inner()
    tools, theta = tools_of(given), torch.ones(4, dtype=DOUBLE)
    level, x = tools.level, tools.level.start
    point = level.linearize(x, theta)
    known, _ = given.smoothness.at(level, x, theta, {}, BOUND, point)
    guessed, memory = Smoothness().at(level, x, theta, {}, BOUND, point)
    assert known.estimated == frozenset()
    # ‖J‖ is computed exactly for four hyperparameters, and nothing depends on θ directly.
    assert guessed.estimated == {"mu", "L", "L_g", "L_J", "L_Hinv"}
    assert float(guessed.mu) == pytest.approx(0.5 * float(known.mu), rel=1e-6)
    assert float(guessed.L) == pytest.approx(1.1 * float(known.L), rel=1e-6)
    assert float(guessed.L_g) == pytest.approx(1.1 * float(known.L_g), rel=1e-6)
    assert float(guessed.jacobian) == pytest.approx(float(known.jacobian), rel=1e-9)
    assert float(guessed.L_J) <= 1e-6
    used = level.gradients + level.hvps
    again, _ = Smoothness().at(level, x, theta, memory, VALUE)
    assert level.gradients + level.hvps == used  # remembered for ten outer steps
    assert float(again.mu) == float(guessed.mu)


def test_power_iteration_for_a_large_jacobian() -> None:
    """More than 32 rows and columns: within a tenth above the norm, and marked."""
    least = Least(n=40, d=40)
    tools, theta = tools_of(least.inner()), torch.ones(40, dtype=DOUBLE)
    level = tools.level
    point = level.linearize(level.start, theta)
    given = tools.smoothness
    smoothness = Smoothness(given.mu, given.L, given.L_g, 0.0, 0.0, jacobian=None)
    constants, memory = smoothness.at(level, level.start, theta, {}, BOUND, point)
    constants, _ = smoothness.at(level, level.start, theta, memory, BOUND, point)
    truth = float(torch.linalg.matrix_norm(least.J, 2))
    assert truth < float(constants.jacobian) <= 1.1 * truth * (1 + 1e-9)
    assert constants.estimated == {"jacobian"}
