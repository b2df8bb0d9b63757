"""Stochastic bilevel algorithms reach the closed-form optimum, as far as their noise allows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bilevel.single_loop import (
    BSA,
    FSLA,
    MRBO,
    SABA,
    SOBA,
    SRBA,
    SUSTAIN,
    TTSA,
    VRBO,
    AmIGO,
    Decay,
    Randomized,
    StocBiO,
    Truncated,
)
from tests.bilevel.quadratic import Quadratic, flat, run

EXACT = Truncated(14, 1.1)  # |1 - 1.1 μ| ≤ 0.34 on the spectrum: a bias of 0.34^15 ≈ 1e-7
RANDOM = Randomized(8, 0.7)


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        (SOBA(0.8, 0.1), 200),
        (SABA(0.8, 0.1), 200),
        (SRBA(0.8, 0.1), 200),
        (FSLA(0.8, 0.1, 0.5), 120),
        (AmIGO(0.8, 0.3, 0.8, steps=4, adjoint_steps=4), 40),
        (StocBiO(0.8, 0.3, steps=4, neumann=EXACT), 40),
        (MRBO(0.8, 0.2, 0.5, neumann=EXACT), 100),
        (VRBO(0.8, 0.3, steps=2, neumann=EXACT), 40),
    ],
    ids=lambda x: type(x).__name__,
)
def test_full_batches_lead_to_the_optimum(algorithm: Any, steps: int) -> None:
    problem = Quadratic()
    inner = problem.inner()
    state, reports = run(algorithm, inner, steps)
    torch.testing.assert_close(inner.hparams["h"].detach(), problem.best, rtol=0, atol=1e-6)
    best = problem.weights(problem.best)
    torch.testing.assert_close(flat(inner.params), best, rtol=0, atol=1e-6)
    if state["v"] is not None:  # v = -H⁻¹ ∇_w F, the other part of the joint fixed point
        torch.testing.assert_close(state["v"], problem.adjoint(problem.best), rtol=0, atol=1e-6)
    assert reports[-1].grad_norm < 1e-6 < reports[0].grad_norm


@pytest.mark.parametrize(
    "algorithm",
    [
        BSA(0.8, 0.1, steps=3, neumann=RANDOM),
        TTSA(0.8, 0.1, neumann=RANDOM),
        SUSTAIN(0.8, 0.1, 0.5, neumann=RANDOM),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_randomized_series_is_exact_where_the_adjoint_vanishes(algorithm: Any) -> None:
    problem = Quadratic(attainable=True)
    inner = problem.inner()
    run(algorithm, inner, 100)
    torch.testing.assert_close(inner.hparams["h"].detach(), problem.best, rtol=0, atol=1e-6)


def _errors(algorithm: Any, steps: int, problem: Quadratic | None = None) -> torch.Tensor:
    """‖h - h*‖ after each step, on noisy batches."""
    problem = problem or Quadratic(4, noise=0.2)
    inner = problem.inner()
    state, errors = algorithm.init(inner), []
    for _ in range(steps):
        _, state = algorithm.step(inner, state)
        errors.append((inner.hparams["h"].detach() - problem.best).norm())
    return torch.stack(errors)


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        (SABA(0.5, 0.12), 560),
        (SRBA(0.5, 0.12, period=6), 460),
        (VRBO(0.5, 0.2, steps=2, neumann=Truncated(12, 1.0), period=4), 45),
    ],
    ids=lambda x: type(x).__name__,
)
def test_variance_reduction_reaches_the_optimum_with_constant_steps(
    algorithm: Any, steps: int
) -> None:
    assert _errors(algorithm, steps)[-1] < 1e-5


def test_plain_sampling_stalls_and_decreasing_steps_go_on() -> None:
    constant = _errors(SOBA(0.5, 0.12), 600)
    decreasing = _errors(SOBA(Decay(0.5, 0.5), Decay(0.12, 0.5)), 600)
    floor = constant[-150:].mean()
    assert floor > 0.1  # SABA and SRBA are at 1e-5 with these very step sizes
    assert floor > 0.5 * constant[150:300].mean()  # it stands still
    assert decreasing[-150:].mean() < 0.5 * floor


@pytest.mark.parametrize(
    ("algorithm", "steps"),
    [
        (FSLA(Decay(0.3, 0.4), Decay(0.1, 0.4), Decay(1.0, 0.5)), 200),
        (SUSTAIN(neumann=Randomized(5, 0.7)), 200),
        (MRBO(Decay(0.3, 1 / 3), Decay(0.1, 1 / 3), neumann=Truncated(6, 0.9)), 75),
        (TTSA(Decay(0.3, 0.4), Decay(0.1, 0.6), neumann=Randomized(5, 0.7)), 150),
        (BSA(Decay(0.3, 0.5), Decay(0.1, 0.5), steps=3, neumann=Randomized(5, 0.7)), 100),
        (AmIGO(0.1, Decay(0.1, 0.5), 0.1, steps=3, adjoint_steps=3), 100),
        (StocBiO(0.1, Decay(0.1, 0.5), steps=3, neumann=Truncated(6, 0.9)), 100),
    ],
    ids=lambda x: type(x).__name__,
)
def test_noisy_batches_lead_near_the_optimum(algorithm: Any, steps: int) -> None:
    problem = Quadratic(4, noise=0.1)
    start = (0.5 - problem.best).norm()
    errors = _errors(algorithm, steps, problem)
    assert errors[-steps // 5 :].mean() < 0.1 * start


def test_bounded_hyperparameters_reach_an_optimum_inside_the_bounds() -> None:
    bound = 1.2 * float(Quadratic().best.abs().max())
    problem = Quadratic(4, noise=0.1, bound=bound)
    inner = problem.inner()
    run(SABA(0.5, 0.3), inner, 400)
    torch.testing.assert_close(inner.hparams["h"].detach(), problem.best, rtol=0, atol=1e-4)


def test_bounded_hyperparameters_stay_inside_when_the_optimum_is_outside() -> None:
    problem = Quadratic(bound=0.6)
    assert float(problem.best.abs().max()) > 0.6
    inner = problem.inner()
    for _ in range(3):
        run(SOBA(0.5, 5.0), inner, 50)
        assert float(inner.hparams["h"].detach().abs().max()) < 0.6
