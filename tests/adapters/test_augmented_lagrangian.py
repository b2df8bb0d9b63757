"""Exact augmented Lagrangian: the merit function, textbook problems, sketches, statuses."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import tasks
from adapters.iteration import solve
from adapters.solvers import augmented_lagrangian as al
from adapters.solvers.augmented_lagrangian import ExactAugmentedLagrangian
from adapters.solvers.sketch import Sketch
from adapters.tasks import Constrained
from adapters.tasks.constrained import HOCK_SCHITTKOWSKI
from bilevel import RunStatus


def problem(number: int) -> Constrained:
    found = tasks.get("hock_schittkowski", number=number)
    assert isinstance(found, Constrained)
    return found


def made(objective: Any, constraints: Any, start: list[float], m: int = 1) -> Constrained:
    row = {
        "x": torch.tensor([start], dtype=torch.float64),
        "y": torch.zeros(1, m, dtype=torch.float64),
    }
    splits = {"train": row, "val": row, "test": row}
    return Constrained("made", splits, objective=objective, constraints=constraints)


@pytest.mark.parametrize("number", HOCK_SCHITTKOWSKI)
def test_the_merit_gradient_matches_differences(number: int) -> None:
    """The published code has ∇²f for ∇²ₓₓL, which curved constraints expose."""
    task = problem(number)
    x = task.split("train")["x"][0] * 0.9 + 0.1
    multipliers = torch.linspace(0.5, 1.0, task.split("train")["y"].shape[1], dtype=torch.float64)
    n, eta = len(x), (2.0, 0.3)
    at = al._derivatives(task, x, multipliers)
    found = al.merit_gradient(at, *eta)

    def value(v: Tensor) -> Tensor:
        return al.merit(task, v[:n], v[n:], *eta)

    point = torch.cat([x, multipliers])
    expected = torch.autograd.functional.jacobian(value, point)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    step = 1e-6 * torch.eye(len(point), dtype=torch.float64)
    differences = torch.stack([(value(point + e) - value(point - e)) / 2e-6 for e in step])
    assert torch.allclose(found, differences, rtol=1e-5, atol=1e-4 * float(found.norm() + 1))


@pytest.mark.parametrize("number", HOCK_SCHITTKOWSKI)
def test_textbook_problems_with_exact_solves(number: int) -> None:
    task = problem(number)
    found = solve(ExactAugmentedLagrangian, task, {"sketch": "exact"})
    assert found.status is RunStatus.CONVERGED
    assert abs(found.entries["loss"] - (task.minimum or 0.0)) < 1e-4
    assert found.entries["residual"] <= 1e-4
    if number in (28, 48, 51, 52):
        # Linear constraints, quadratic objective: one full Newton step, then the check.
        assert found.steps == 2


@pytest.mark.parametrize("sketch", ["gaussian", "kaczmarz", "gmres"])
@pytest.mark.parametrize("number", [40, 42, 78])
def test_sketches_reach_the_same_minimum(number: int, sketch: str) -> None:
    task = problem(number)
    found = solve(ExactAugmentedLagrangian, task, {"sketch": sketch})
    assert found.status is RunStatus.CONVERGED
    assert abs(found.entries["loss"] - (task.minimum or 0.0)) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("sketch", ["gaussian", "kaczmarz"])
@pytest.mark.parametrize("number", HOCK_SCHITTKOWSKI)
def test_every_sketch_reaches_every_minimum(number: int, sketch: str) -> None:
    task = problem(number)
    found = solve(ExactAugmentedLagrangian, task, {"sketch": sketch}, max_steps=60)
    assert found.status is RunStatus.CONVERGED
    assert abs(found.entries["loss"] - (task.minimum or 0.0)) < 1e-4


@pytest.mark.parametrize("kind", ["gaussian", "kaczmarz"])
@pytest.mark.parametrize("block", [1, 3])
def test_a_sketch_never_moves_away_from_the_solution(kind: str, block: int) -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    A[2] = 0.0  # a row of zeros is skipped
    solution = torch.randn(6, generator=generator, dtype=torch.float64)
    sketch = Sketch(A, A @ solution, kind, block)
    z, errors = torch.zeros(6, dtype=torch.float64), []
    for _ in range(60):
        z, used = sketch.refine(z, 0.0, 1, generator)
        errors.append(float((z - solution).norm()))
        assert used == 1
    assert all(b <= a + 1e-12 for a, b in pairwise(errors))
    assert errors[-1] < errors[0]
    again, _ = sketch.refine(z, 1e-3, 200_000, generator)
    assert sketch.residual(again) <= 1e-3


def test_weights_move_one_way_and_the_merit_falls() -> None:
    from adapters.iteration import configure

    task = problem(39)
    solver = configure(
        ExactAugmentedLagrangian, ExactAugmentedLagrangian.space, task, {"sketch": "exact"}, 0
    )
    state = solver.start()
    for _ in range(30):
        after, said = solver.iterate(state)
        if said.status.finished:
            break
        assert after["eta1"] >= state["eta1"]
        assert after["eta2"] <= state["eta2"]
        assert after["delta"] <= state["delta"]
        weights = after["eta1"], after["eta2"]
        values = [float(al.merit(task, s["x"], s["multipliers"], *weights)) for s in (state, after)]
        assert values[1] < values[0]
        state = after
    assert said.status is RunStatus.CONVERGED
    assert state["eta1"] > 1.0  # this problem needs heavier weights


def test_statuses() -> None:
    def parabola(x: Tensor) -> Tensor:
        return x.square().sum()

    # The gradient of the constraint vanishes at the start.
    flat = made(parabola, lambda x: (x[:1] - 1) ** 3, [1.0, 1.0])
    assert solve(ExactAugmentedLagrangian, flat, {}).status is RunStatus.SINGULAR
    one = problem(6)
    found = solve(ExactAugmentedLagrangian, one, {"max_outer": 10, "tol": 1e-8, "sketch": "exact"})
    assert found.status in (RunStatus.CONVERGED, RunStatus.MAX_ITER)
    broken = made(lambda x: torch.log(x.sum()), lambda x: x[:1] - 1, [-1.0, -1.0])
    assert solve(ExactAugmentedLagrangian, broken, {}).status is RunStatus.DIVERGED
    with pytest.raises(ValueError, match="block must be at most n"):
        solve(ExactAugmentedLagrangian, one, {"block": 40})
    with pytest.raises(ValueError, match="constraints must return shape"):
        made(parabola, lambda x: x, [1.0, 1.0], m=1)


def test_data_of_the_problem_have_exact_derivatives() -> None:
    """min ‖x − p‖² on the unit circle: x* = p/‖p‖, λ* = ‖p‖ − 1."""
    p = torch.tensor([1.5, -0.8], dtype=torch.float64)

    def residual(x: Tensor, multipliers: Tensor, p: Tensor) -> Tensor:
        g = 2 * (x - p) + 2 * multipliers * x
        return torch.cat([g, (x.square().sum() - 1)[None]])

    x, multipliers = p / p.norm(), (p.norm() - 1)[None]
    found = al.sensitivity(residual, x, multipliers, p)
    expected = torch.autograd.functional.jacobian(
        lambda q: torch.cat([q / q.norm(), (q.norm() - 1)[None]]), p
    )
    assert torch.allclose(found, expected)
    task = made(
        lambda x: (x - p).square().sum(), lambda x: (x.square().sum() - 1)[None], [1.0, 0.5]
    )
    solved = solve(ExactAugmentedLagrangian, task, {"sketch": "exact", "tol": 1e-8})
    assert torch.allclose(solved.state["x"], x, atol=1e-7)


def test_logistic_regression_agrees_with_scipy() -> None:
    from scipy.optimize import minimize

    task = tasks.get("constrained_logistic", linear=10)
    assert isinstance(task, Constrained)
    found = solve(ExactAugmentedLagrangian, task, {"sketch": "exact", "tol": 1e-7})
    assert found.status is RunStatus.CONVERGED
    reference = minimize(
        lambda w: float(task.objective(torch.from_numpy(w))),
        found.state["x"].numpy() + 0.01,
        jac=lambda w: torch.func.grad(task.objective)(torch.from_numpy(w)).numpy(),
        constraints={
            "type": "eq",
            "fun": lambda w: task.constraints(torch.from_numpy(w)).numpy(),
            "jac": lambda w: torch.func.jacrev(task.constraints)(torch.from_numpy(w)).numpy(),
        },
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 200},
    )
    assert found.entries["loss"] == pytest.approx(reference.fun, abs=1e-5)
