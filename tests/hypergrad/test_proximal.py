"""Proximal operators against their definition, and hypergradients of non-smooth inner problems."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Lasso
from torch import Tensor

from hypergrad import (
    CG,
    GMRES,
    Direct,
    Implicit,
    Neumann,
    Problem,
    ProximalGradient,
    Status,
    check_hypergradient,
    group_soft_threshold,
    project_box,
    project_simplex,
    soft_threshold,
)
from tests.hypergrad.problems import trained


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


OPERATORS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    # the step, and the term that it belongs to
    "l1": (lambda x: soft_threshold(x, 0.4), lambda u: 0.4 * u.abs().sum(-1)),
    "group": (lambda x: group_soft_threshold(x, 0.7), lambda u: 0.7 * u.norm(dim=-1)),
    "box": (
        lambda x: project_box(x, -0.5, 0.8),
        lambda u: torch.where(((u >= -0.5) & (u <= 0.8)).all(-1), 0.0, torch.inf),
    ),
    "simplex": (
        lambda x: project_simplex(x, 1.5),
        lambda u: torch.where((u >= 0).all(-1) & ((u.sum(-1) - 1.5).abs() < 1e-9), 0.0, torch.inf),
    ),
}


@pytest.mark.parametrize("name", OPERATORS)
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), d=st.integers(1, 6), scale=st.floats(0.01, 10))
def test_is_the_minimum_of_its_definition(name: str, seed: int, d: int, scale: float) -> None:
    """No feasible point near it or far from it has a smaller ‖u − x‖²/2 + g(u)."""
    step, term = OPERATORS[name]
    x = scale * normal(seed, d)
    u = step(x)
    others = u + torch.logspace(-4, 1, 60, dtype=x.dtype)[:, None] * normal(seed + 1, 60, d)
    if name in ("box", "simplex"):
        others = step(others)  # feasible, whatever it is

    def objective(u: Tensor) -> Tensor:
        return 0.5 * (u - x).square().sum(-1) + term(u)

    assert bool(torch.isfinite(objective(u)))
    assert float((objective(u) - objective(others)).max()) <= 1e-9 * (1 + scale**2)


@pytest.mark.parametrize("name", OPERATORS)
def test_derivative_is_that_of_central_differences(name: str) -> None:
    step, _ = OPERATORS[name]
    x = normal(3, 4, 5).requires_grad_()
    assert torch.autograd.gradcheck(step, (x,))


def test_settings_are_differentiable() -> None:
    x = normal(0, 3, 5).requires_grad_()
    t = torch.full((3, 1), 0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(soft_threshold, (x, t))
    assert torch.autograd.gradcheck(group_soft_threshold, (x, t))
    assert torch.autograd.gradcheck(project_simplex, (x, t))
    assert torch.autograd.gradcheck(project_box, (x, -t, 0.3 * t))


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_along_any_dimension(dim: int) -> None:
    x = normal(1, 4, 5)
    for function in (
        lambda x, d: group_soft_threshold(x, 0.5, d),
        lambda x, d: project_simplex(x, 2.0, d),
    ):
        assert torch.equal(function(x, dim), function(x.movedim(dim, -1), -1).movedim(-1, dim))


def test_zero_group_without_a_threshold_has_a_finite_derivative() -> None:
    x = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    group_soft_threshold(x, 0.0).sum().backward()
    assert bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: soft_threshold(x, -0.1), "threshold must not be negative, but got -0.1"),
        (lambda x: group_soft_threshold(x, -2.0), "threshold must not be negative, but got -2"),
        (lambda x: project_box(x, 1.0, 0.0), "high - low must not be negative, but got -1"),
        (lambda x: project_simplex(x, 0.0), "total must be positive, but got 0"),
        (lambda x: ProximalGradient(lambda p, h, s: p, step=0.0), "step must be positive"),
    ],
)
def test_bad_settings(call: Callable[[Tensor], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(normal(0, 3))


N, D = 30, 8
X, XV = normal(10, N, D), normal(11, N, D)
TRUE = torch.tensor([2.0, -1.5, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
Y, YV = X @ TRUE + 0.3 * normal(12, N), XV @ TRUE + 0.3 * normal(13, N)


def squares(params: Any, hparams: Any, batch: Any) -> Tensor:
    x, y = batch
    return 0.5 * (x @ params["w"] - y).square().mean()


PROBLEM = Problem(squares, squares)
START = trained({"w": torch.zeros(D, dtype=torch.float64)})
TRAIN, VALID = (X, Y), (XV, YV)


def lasso(params: Any, hparams: Any, step: float) -> Any:
    return {"w": soft_threshold(params["w"], step * hparams["l1"])}


def group_lasso(params: Any, hparams: Any, step: float) -> Any:
    groups = params["w"].view(4, 2)
    return {"w": group_soft_threshold(groups, step * hparams["l2"][:, None]).reshape(-1)}


def box(params: Any, hparams: Any, step: float) -> Any:
    return {"w": project_box(params["w"], -hparams["bound"], hparams["bound"])}


def simplex(params: Any, hparams: Any, step: float) -> Any:
    return {"w": project_simplex(params["w"], hparams["total"])}


CASES: dict[str, tuple[Any, Any]] = {
    "lasso": (lasso, {"l1": torch.tensor(0.2)}),
    "lasso_per_weight": (lasso, {"l1": torch.linspace(0.05, 0.4, D)}),
    "group_lasso": (group_lasso, {"l2": torch.tensor([0.3, 0.4, 0.2, 0.1])}),
    "box": (box, {"bound": torch.tensor(1.2)}),
    "simplex": (simplex, {"total": torch.tensor(2.5)}),
}


def case(name: str) -> tuple[ProximalGradient, Any]:
    prox, hparams = CASES[name]
    return ProximalGradient(prox), trained({k: v.double() for k, v in hparams.items()})


def solved(operator: ProximalGradient, hparams: Any, problem: Problem = PROBLEM) -> Any:
    found = operator.solve(problem, START, hparams, TRAIN, tol=1e-12, max_iter=20_000)
    assert found.status is Status.CONVERGED
    return found.params


def hypergradient(operator: Any, params: Any, hparams: Any, solver: Any = None) -> Any:
    estimator = Implicit(GMRES(rtol=1e-11) if solver is None else solver, operator)
    state = estimator.init(PROBLEM, params, hparams)
    return estimator(PROBLEM, params, hparams, TRAIN, VALID, state)[0]


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.8])
def test_lasso_is_sklearns(alpha: float) -> None:
    operator, _ = case("lasso")
    w = solved(operator, trained({"l1": torch.tensor(alpha, dtype=torch.float64)}))["w"].detach()
    theirs = Lasso(alpha=alpha, fit_intercept=False, tol=1e-12, max_iter=100_000)
    theirs.fit(X.numpy(), Y.numpy())
    assert torch.allclose(w, torch.from_numpy(theirs.coef_), atol=1e-8)
    assert torch.equal(w == 0, torch.from_numpy(theirs.coef_ == 0))


@pytest.mark.parametrize(
    "solver", [GMRES(rtol=1e-12), Direct(), Neumann(terms=20_000, step=1.0, rtol=1e-12)], ids=repr
)
def test_lasso_hypergradient_in_closed_form(solver: Any) -> None:
    """On the active set A, dw_A/dα = −n (X_AᵀX_A)⁻¹ sign(w_A); elsewhere 0."""
    operator, hparams = case("lasso")
    params = solved(operator, hparams)
    w = params["w"].detach()
    active = w != 0
    assert 2 <= int(active.sum()) < D
    xa = X[:, active]
    dw = torch.zeros_like(w)
    dw[active] = -N * torch.linalg.solve(xa.T @ xa, w[active].sign())
    exact = dw @ (XV.T @ (XV @ w - YV)) / N
    found = hypergradient(operator, params, hparams, solver)
    assert float(found.grad["l1"]) == pytest.approx(float(exact), rel=1e-8)
    assert found.status.ok


@pytest.mark.parametrize("name", CASES)
def test_against_central_differences_of_the_solution(name: str) -> None:
    operator, hparams = case(name)
    report = check_hypergradient(
        Implicit(GMRES(rtol=1e-12), operator),
        PROBLEM,
        START,
        hparams,
        TRAIN,
        VALID,
        solve=lambda params, h: solved(operator, h),
    )
    assert report.passed, str(report)
    assert report.conclusive


@pytest.mark.parametrize("name", CASES)
def test_solution_satisfies_its_optimality_conditions(name: str) -> None:
    """w = prox(w − η∇f) for every step η, and the constraint or sparsity is active."""
    operator, hparams = case(name)
    w = solved(operator, hparams)["w"].detach()
    gradient = X.T @ (X @ w - Y) / N
    for step in (0.01, 0.3, 2.0):
        moved = operator.prox({"w": w - step * gradient}, hparams, step)["w"]
        assert torch.allclose(moved, w, atol=1e-9)
    free = torch.linalg.lstsq(X, Y[:, None]).solution[:, 0]
    assert float((w - free).norm()) > 0.1


def test_hypergradient_does_not_depend_on_the_step() -> None:
    operator, hparams = case("group_lasso")
    params = solved(operator, hparams)
    steps = [0.01, 0.1, 5.0]
    found = [hypergradient(ProximalGradient(operator.prox, s), params, hparams) for s in steps]
    for other in found[1:]:
        assert torch.allclose(other.grad["l2"], found[0].grad["l2"], rtol=1e-7)


def test_cg_refuses_the_map() -> None:
    operator, hparams = case("lasso")
    found = hypergradient(operator, solved(operator, hparams), hparams, CG())
    assert found.status is Status.NOT_SYMMETRIC


def test_hyperparameters_of_the_smooth_part_and_of_the_step_together() -> None:
    """Elastic net: the ridge weight in f, the L1 weight in prox."""

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        return squares(params, hparams, batch) + 0.5 * hparams["l2"] * params["w"].square().sum()

    problem = Problem(inner, squares)
    operator = ProximalGradient(lasso)
    hparams = trained({k: torch.tensor(v).double() for k, v in (("l1", 0.2), ("l2", 0.3))})
    report = check_hypergradient(
        Implicit(GMRES(rtol=1e-12), operator),
        problem,
        START,
        hparams,
        TRAIN,
        VALID,
        solve=lambda params, h: solved(operator, h, problem),
    )
    assert report.passed, str(report)


def test_untouched_leaves_and_constants() -> None:
    """A bias without a term is fitted freely, a frozen weight stays."""

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        return (batch[0] @ params["w"] + params["b"] + params["c"] - batch[1]).square().mean()

    params = {**START, "b": torch.zeros((), dtype=torch.float64).requires_grad_()}
    params["c"] = torch.tensor(0.5, dtype=torch.float64)
    operator = ProximalGradient(lambda p, h, s: {**p, "w": soft_threshold(p["w"], s * h["l1"])})
    hparams = trained({"l1": torch.tensor(0.4, dtype=torch.float64)})
    found = operator.solve(Problem(inner, inner), params, hparams, TRAIN, tol=1e-10, max_iter=5000)
    residual = X @ found.params["w"].detach() + found.params["b"].detach() + 0.5 - Y
    assert abs(float(residual.mean())) < 1e-8
    assert float(found.params["c"]) == 0.5
    assert [p.requires_grad for p in found.params.values()] == [True, True, False]


def test_limits_of_the_iteration() -> None:
    operator, hparams = case("lasso")
    found = operator.solve(PROBLEM, START, hparams, TRAIN, tol=1e-12, max_iter=3)
    assert (found.status, found.iterations) == (Status.MAX_ITER, 3)
    with pytest.raises(ValueError, match="tol must be positive, but got 0"):
        operator.solve(PROBLEM, START, hparams, TRAIN, tol=0.0)
    with pytest.raises(ValueError, match="max_iter must be at least 1, but got 0"):
        operator.solve(PROBLEM, START, hparams, TRAIN, max_iter=0)
    with pytest.raises(ValueError, match="the map's result and params must be the same tree"):
        ProximalGradient(lambda p, h, s: p["w"]).solve(PROBLEM, START, hparams, TRAIN)


def test_fixed_step_too_long_diverges_and_says_so() -> None:
    operator, hparams = ProximalGradient(lasso, step=100.0), case("lasso")[1]
    found = operator.solve(PROBLEM, START, hparams, TRAIN, max_iter=5000)
    assert found.status is Status.DIVERGED


def test_projected_descent_of_constrained_hyperparameters() -> None:
    """Mixing weights of two data sets on the simplex: descent ends at a stationary point."""
    noise = torch.cat([Y, 5 * normal(20, N)]), torch.cat([X, normal(21, N, D)])

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        errors = (noise[1] @ params["w"] - noise[0]).square().view(2, N).mean(1)
        return (hparams["mix"] * errors).sum() + 1e-2 * params["w"].square().sum()

    def solution(mix: Tensor) -> Tensor:
        weights = mix.repeat_interleave(N) / N
        gram = noise[1].T @ (weights[:, None] * noise[1]) + 1e-2 * torch.eye(D).double()
        return torch.linalg.solve(gram, noise[1].T @ (weights * noise[0]))

    problem, estimator = Problem(inner, squares), Implicit(Direct())
    mix = torch.tensor([0.2, 0.8], dtype=torch.float64)
    values = []
    for _ in range(40):
        params, hparams = trained({"w": solution(mix)}), trained({"mix": mix})
        state = estimator.init(problem, params, hparams)
        found, _ = estimator(problem, params, hparams, None, VALID, state)
        values.append(float(found.value))
        mix = project_simplex(mix - 0.2 * found.grad["mix"])
    assert float(mix.sum()) == pytest.approx(1.0)
    assert values[-1] < 0.5 * values[0]
    grid = [torch.tensor([m, 1 - m], dtype=torch.float64) for m in torch.linspace(0.01, 1, 100)]
    best = min(float(squares({"w": solution(m)}, None, VALID)) for m in grid)
    assert values[-1] <= best * (1 + 1e-3)
