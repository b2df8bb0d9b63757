"""Sparse transport: limits, certificates by linear and quadratic programming, envelopes."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters import tasks
from adapters.iteration import Solution, configure, solve
from adapters.solvers.sparse_ot import SparseTransport, dual, plan, project_simplex, semi_dual
from adapters.tasks import Transport
from bilevel import RunStatus

TASK = tasks.get("digit_clouds", m=7, n=9, problems=1)
M, N = 7, 9


def solved(task: Any = TASK, **hparams: Any) -> Solution:
    return solve(SparseTransport, task, hparams, max_steps=2000)


def plan_of(found: Solution, task: Any = TASK, **hparams: Any) -> Tensor:
    solver = configure(SparseTransport, SparseTransport.space, task, hparams, 0)
    return solver.plans(found.state, "train")[0]  # type: ignore[attr-defined]


def test_the_projection_is_the_nearest_point_of_the_simplex() -> None:
    """Against the optimality conditions: t = [v − τ]₊ with one τ a column."""
    torch.manual_seed(0)
    v, mass = torch.randn(6, 40, dtype=torch.float64), torch.rand(40, dtype=torch.float64) + 0.1
    t = project_simplex(v, mass)
    assert (t >= 0).all()
    assert torch.allclose(t.sum(0), mass, atol=1e-12)
    shift = v - t
    tau = torch.where(t > 0, shift, -torch.inf).amax(0)
    assert torch.allclose(torch.where(t > 0, shift, tau), tau.expand_as(v), atol=1e-12)
    assert (torch.where(t > 0, tau, v) <= tau + 1e-12).all()


@pytest.mark.parametrize("form", ["semi_dual", "dual"])
def test_gradients_of_the_duals_are_the_errors_of_the_marginals(form: str) -> None:
    torch.manual_seed(1)
    split = TASK.split("train")
    assert isinstance(TASK, Transport)
    a, b, cost = split["a"][0], split["b"][0], TASK.cost(split)[0]
    size = M if form == "semi_dual" else M + N
    potentials = torch.rand(size, dtype=torch.float64, requires_grad=True)
    value = (semi_dual if form == "semi_dual" else dual)(potentials, a, b, cost, 0.7, 3)
    (found,) = torch.autograd.grad(value, potentials)
    t = plan(potentials.detach(), a, b, cost, 0.7, 3, form)
    assert torch.allclose(found[:M], a - t.sum(1))
    if form == "dual":
        assert torch.allclose(found[M:], b - t.sum(0))


def test_without_a_cap_it_is_quadratic_transport() -> None:
    """The optimality conditions of a strictly convex program have one solution."""
    from scipy.optimize import minimize

    found = solved(gamma=1.0, cardinality=M)
    assert found.status is RunStatus.CONVERGED
    t = plan_of(found, gamma=1.0, cardinality=M)
    assert isinstance(TASK, Transport)
    cost = TASK.cost(TASK.split("train"))[0].numpy()
    reference = minimize(
        lambda v: 1e3 * float((v * cost.ravel()).sum() + 0.5 * (v**2).sum()),
        np.full(M * N, 1 / (M * N)),
        jac=lambda v: 1e3 * (cost.ravel() + v),
        bounds=[(0, None)] * (M * N),
        constraints={
            "type": "eq",
            "fun": lambda v: np.concatenate(
                [v.reshape(M, N).sum(1) - 1 / M, v.reshape(M, N).sum(0) - 1 / N]
            )[:-1],
            "jac": lambda v: _marginals()[:-1],
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    assert np.allclose(t.numpy().ravel(), reference.x, atol=1e-5)
    both = plan_of(
        solved(gamma=1.0, cardinality=M, form="dual"), gamma=1.0, cardinality=M, form="dual"
    )
    assert torch.allclose(both, t, atol=1e-6)


def test_a_small_weight_reaches_the_linear_program() -> None:
    from scipy.optimize import linprog

    assert isinstance(TASK, Transport)
    cost = TASK.cost(TASK.split("train"))[0].numpy()
    marginals = np.r_[np.full(M, 1 / M), np.full(N, 1 / N)]
    reference = linprog(cost.ravel(), A_eq=_marginals(), b_eq=marginals).fun
    found = solved(gamma=1e-2, cardinality=M)
    assert found.entries["loss"] == pytest.approx(reference, abs=1e-5)
    assert found.entries["row_error"] < 1e-5


def test_one_nonzero_a_column_and_never_more_than_the_cap() -> None:
    t = plan_of(solved(cardinality=1), cardinality=1)
    assert ((t > 0).sum(0) == 1).all()
    assert torch.allclose(t.amax(0), TASK.split("train")["b"][0])
    values = []
    for k in (1, 2, 3, 5, M):
        found = solved(gamma=10.0, cardinality=k)
        t = plan_of(found, gamma=10.0, cardinality=k)
        assert int((t > 0).sum(0).max()) <= k
        assert (t >= 0).all()
        assert torch.allclose(t.sum(0), TASK.split("train")["b"][0], atol=1e-12)
        values.append(found.entries["value"])
    assert all(b <= a + 1e-6 for a, b in pairwise(values))


def test_the_value_has_its_derivatives_by_the_envelope() -> None:
    split = TASK.split("train")
    assert isinstance(TASK, Transport)
    a, b, cost = split["a"][0], split["b"][0], TASK.cost(split)[0]
    found = solved(gamma=1.0, cardinality=4)
    alpha = found.state["problems"]["train"][0]["potentials"]
    gamma = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    moved = cost.clone().requires_grad_()
    slope, by_cost = torch.autograd.grad(semi_dual(alpha, a, b, moved, gamma, 4), [gamma, moved])
    t = plan(alpha, a, b, cost, 1.0, 4, "semi_dual")
    assert torch.allclose(slope, t.square().sum() / 2)
    assert torch.allclose(by_cost, t)
    step = 1e-3
    ends = [solved(gamma=1.0 + s, cardinality=4).entries["value"] for s in (step, -step)]
    assert float(slope) == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-5)


def test_adam_gets_there_too_and_caps_are_checked() -> None:
    reference = solved(gamma=10.0, cardinality=M).entries["value"]
    found = solved(gamma=10.0, cardinality=M, optimizer="adam", lr=0.02, max_iter=2000)
    assert found.entries["value"] == pytest.approx(reference, abs=1e-5)
    with pytest.raises(ValueError, match="cardinality must be at most the 7 rows"):
        solved(cardinality=8)
    few = solved(gamma=0.1, cardinality=2, max_iter=50, tol=1e-12, optimizer="adam")
    assert few.status is RunStatus.MAX_ITER


def test_bad_weights_are_refused() -> None:
    good = TASK.split("train")
    for key, value, message in (
        ("a", good["a"] * 2, "equal mass"),
        ("b", good["b"] * 0, "must be positive"),
        ("a", good["a"][:, 1:], "must hold the weights"),
    ):
        splits = {name: {**good, key: value} for name in ("train", "val", "test")}
        with pytest.raises(ValueError, match=message):
            Transport("bad", splits)


def _marginals() -> np.ndarray:  # type: ignore[type-arg]
    rows = np.kron(np.eye(M), np.ones(N))
    columns = np.kron(np.ones(M), np.eye(N))
    return np.concatenate([rows, columns])
