"""MAID and fixed-accuracy Armijo on problems with closed-form f."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Budget, Callback, Grad, ProblemInner, Result, RunStatus, Space, tune
from bilevel.inexact import (
    FISTA,
    LBFGS,
    MAID,
    FixedAccuracy,
    GradientDescent,
    NewtonCG,
    SmoothInner,
    Smoothness,
    quadratic,
)
from hypergrad import SGD, Problem
from tests.bilevel.inexact_problems import (
    DOUBLE,
    Least,
    box,
    images,
    softmax,
    tools_of,
    variation,
)

LEAST = Least(kappa=4.0)


class Points(Callback):
    """Remembers θ after every outer step."""

    def __init__(self) -> None:
        self.theta: list[Tensor] = []

    def on_start(self, run: Any) -> None:
        self.theta = [run.inner.hparams["theta"].clone()]

    def on_outer_step(self, run: Any) -> None:
        self.theta.append(run.inner.hparams["theta"].clone())


def run(algorithm: Any, least: Least = LEAST, steps: int = 10) -> tuple[Result, list[Tensor]]:
    points = Points()
    found = tune(least.inner(), algorithm, Budget(outer_steps=steps), callbacks=[points])
    return found, points.theta


VARIANTS = {
    "certified": MAID(),
    "estimate": MAID(descent_test="estimate"),
    "off": MAID(descent_test="off"),
    "barzilai-borwein": MAID(barzilai_borwein=True),
    "fine": MAID(eps=1e-4),
    "fixed": FixedAccuracy(eps=1e-3),
    "gradient descent": MAID(solver=GradientDescent()),
    "l-bfgs": MAID(solver=LBFGS()),
    "newton": MAID(solver=NewtonCG()),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_accepted_steps_decrease_the_true_function(name: str) -> None:
    """Check 8.3: f(θ⁺) ≤ f(θ) - λ α ‖z‖² with f in closed form; and bounds hold on the way."""
    algorithm = VARIANTS[name]
    found, points = run(algorithm)
    accepted = 0
    for record, before, after in zip(found.trace, points[:-1], points[1:], strict=True):
        f = LEAST.f(after)
        assert float(record["lower"]) - 1e-9 <= f <= float(record["upper"]) + 1e-9
        if record["accepted"]:
            accepted += 1
            decrease = algorithm.lam * float(record["alpha"]) * float(record["z_norm"]) ** 2
            assert f <= LEAST.f(before) - decrease + 1e-10 * abs(f)
        else:
            assert torch.equal(before, after)
    assert accepted >= 6
    assert all(record["certified"] == 1.0 for record in found.trace)


def test_nonmonotone_steps_decrease_the_average() -> None:
    """Zhang and Hager: f(θ⁺) ≤ C - λ α ‖z‖², C the weighted average of the values before."""
    algorithm = MAID(nonmonotone=0.85, barzilai_borwein=True)
    found, points = run(algorithm)
    average, weight = LEAST.f(points[0]), 1.0
    for record, after in zip(found.trace, points[1:], strict=True):
        if record["accepted"]:
            f = LEAST.f(after)
            decrease = algorithm.lam * float(record["alpha"]) * float(record["z_norm"]) ** 2
            assert f <= average - decrease + 1e-10 * abs(f)
            average = (0.85 * weight * average + f) / (0.85 * weight + 1)
            weight = 0.85 * weight + 1


@pytest.mark.parametrize("eps", [10.0, 1e-3])
@pytest.mark.parametrize("test", ["certified", "estimate", "off"])
def test_every_first_accuracy_reaches_the_optimum(eps: float, test: Any) -> None:
    """Check 8.5: θ* in closed form, ∇f(θ*) = 0."""
    assert LEAST.slope(LEAST.best).norm() < 1e-9
    algorithm = MAID(
        eps=eps, descent_test=test, barzilai_borwein=True, nonmonotone=0.85, tolerance=3e-2
    )
    found = tune(LEAST.inner(), algorithm, Budget(outer_steps=400))
    assert found.status is RunStatus.CONVERGED
    assert LEAST.slope(found.hparams["theta"]).norm() < 6e-2
    assert torch.allclose(found.hparams["theta"], LEAST.best, atol=5e-2)


def test_exact_mode_is_armijo_gradient_descent() -> None:
    """Check 8.4: the same iterates as Armijo on the closed form, the same α and ρ."""
    algorithm = FixedAccuracy(eps=1e-12, alpha=0.5, rho=0.5, rho_bar=1.25, lam=0.1)
    _, points = run(algorithm, steps=6)
    theta, alpha = torch.ones(4, dtype=DOUBLE), 0.5
    for point in points[1:]:
        slope, f = LEAST.slope(theta), LEAST.f(theta)
        while LEAST.f(theta - alpha * slope) > f - 0.1 * alpha * float(slope @ slope):
            alpha *= 0.5
        theta, alpha = theta - alpha * slope, 1.25 * alpha
        assert torch.allclose(point, theta, atol=1e-8)


def test_scaling_the_outer_loss_leaves_the_steps_unchanged() -> None:
    """Check 8.6: g times c, with δ times c and α over c."""
    _, first = run(MAID(eps=1e-2, delta=1e-2, alpha=0.01), Least(kappa=4.0), 6)
    _, second = run(MAID(eps=1e-2, delta=4e-2, alpha=0.0025), Least(kappa=4.0, scale=4.0), 6)
    for a, b in zip(first, second, strict=True):
        assert torch.allclose(a, b, rtol=1e-7)


def test_at_a_stationary_point_the_refinement_ends() -> None:
    """Check 8.7: η → 1, the test cannot pass at θ*; the run ends by itself, without a step."""
    space = Space(theta=Grad(LEAST.best.tolist(), shape=(4,)))
    for algorithm, reason in (
        (MAID(eta=0.999), "accuracy floor"),
        (MAID(eta=0.999, eps_floor=1e-6), "eps_floor=1e-06"),
        (MAID(eta=0.999, tolerance=1e-3), "converged"),
        (MAID(descent_test="off", max_refinements=8), "after 8 refinements"),
    ):
        found = tune(LEAST.inner(space=space), algorithm, Budget(outer_steps=400))
        assert found.status in (RunStatus.LINESEARCH, RunStatus.CONVERGED)
        assert re.search(reason, found.reason)
        assert LEAST.f(found.hparams["theta"]) <= LEAST.f(LEAST.best) + 1e-9


def counted(inner: SmoothInner) -> tuple[ProblemInner, list[int], list[int]]:
    """The same inner level, with instrumented losses: evaluations, and double backwards of h."""
    from tests.bilevel.quadratic import _Counted

    losses, doubles = [0], [0]
    problem = inner.problem

    def inner_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        losses[0] += 1
        return problem.inner_loss({"x": _Counted.apply(params["x"], doubles)}, hparams, batch)

    def outer_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        losses[0] += 1
        return problem.outer_loss(params, hparams, batch)

    made = SmoothInner(
        Problem(inner_loss, outer_loss), inner.params, inner.smoothness, hparams=inner.hparams
    )
    return made, losses, doubles


@pytest.mark.parametrize("solver", [FISTA(), LBFGS(), NewtonCG()])
def test_the_cost_is_what_was_called(solver: Any) -> None:
    """Check 8.9: gradients are loss evaluations, products are double backwards."""
    inner, losses, doubles = counted(LEAST.inner())
    algorithm = MAID(solver=solver)
    state = algorithm.init(inner)
    for _ in range(3):
        before = losses[0], doubles[0]
        report, state = algorithm.step(inner, state)
        assert report.cost.gradients == losses[0] - before[0]
        assert report.cost.hvps == doubles[0] - before[1]
        assert 0 < report.cost.steps < report.cost.gradients


def test_an_outer_step_keeps_to_its_work_and_goes_on() -> None:
    """A step of few gradients waits, and the run gets to the same place."""
    least = Least(kappa=50.0)
    small = MAID(lower_cap=30, work=60, eps=1e-3, barzilai_borwein=True)
    found, points = run(small, least, 15)
    waiting = [r for r in found.trace if not r["accepted"]]
    assert waiting
    steps = [0, *(int(r["steps"]) for r in found.trace)]
    assert all(b - a <= 60 for a, b in itertools.pairwise(steps))
    values = [least.f(p) for p in points]
    assert all(b <= a + 1e-9 * abs(a) for a, b in itertools.pairwise(values))
    assert sum(float(r["accepted"]) for r in found.trace) >= 2
    assert values[-1] < values[0] - 0.1


def test_a_budget_of_steps_is_not_exceeded() -> None:
    found = tune(LEAST.inner(), MAID(lower_cap=20, work=60), 300)
    assert 240 < found.cost.steps <= 300


def test_too_bold_a_trial_is_rejected_and_costs_at_most_the_cap() -> None:
    """α₀ = 1e6 sends e^θ to infinity: the run recovers, and the budget survives."""
    found = tune(
        softmax(), MAID(alpha=1e6, lower_cap=30, work=400, max_backtracks=40, descent_test="off"),
        Budget(outer_steps=3),
    )  # fmt: skip
    assert sum(float(r["accepted"]) for r in found.trace) >= 1
    losses = [float(r["outer_loss"]) for r in found.trace]
    assert losses[-1] < float(found.trace[0]["start_loss"])
    assert torch.isfinite(found.hparams["theta"]).all()


def test_nan_in_the_outer_loss_of_a_trial_counts_as_infinite() -> None:
    """log of a negative number beyond a certain θ."""
    inner = Least().inner()
    problem = inner.problem

    def outer_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        fence = (1.2 - hparams["theta"].abs().max()).log().detach() * 0
        return problem.outer_loss(params, hparams, batch) + fence

    fenced = SmoothInner(
        Problem(problem.inner_loss, outer_loss), inner.params, inner.smoothness,
        hparams=inner.hparams,
    )  # fmt: skip
    found = tune(fenced, MAID(alpha=100.0), Budget(outer_steps=10))
    assert sum(float(r["accepted"]) for r in found.trace) >= 3
    assert float(found.hparams["theta"].abs().max()) < 1.2


def test_float32_widens_the_certificate_and_ends_at_the_floor() -> None:
    """Rounding stops the residual; bounds still hold, and nothing fails."""
    A1, b1, A2, A3, b2 = (t.float() for t in (LEAST.A1, LEAST.b1, LEAST.A2, LEAST.A3, LEAST.b2))
    inner = quadratic(A1, b1, A2, A3, b2)
    tools = tools_of(inner)
    theta = torch.ones(4)
    constants, _ = tools.smoothness.at(tools.level, tools.level.start, theta, {})
    solved = FISTA().solve(tools.level, tools.level.start, theta, constants, 1e-12, 10_000)
    assert solved.status.value == "stalled"
    assert float(solved.residual / constants.mu) > 1e-12
    found = tune(inner, MAID(barzilai_borwein=True), Budget(outer_steps=100))
    assert found.status is RunStatus.LINESEARCH
    assert "accuracy floor: rounding in torch.float32" in found.reason
    best = LEAST.f(LEAST.best)
    assert LEAST.f(found.hparams["theta"].double()) - best < 1e-3 * (LEAST.f(theta.double()) - best)


def test_box_constraints_are_met_by_projection() -> None:
    """The solution of the bounded least squares problem, by an independent solver."""
    from scipy.optimize import lsq_linear

    low, high = -0.2, 0.4
    M = LEAST.A1 @ torch.linalg.solve(LEAST.H, LEAST.J)
    rest = LEAST.A1 @ torch.linalg.solve(LEAST.H, LEAST.A2.T @ LEAST.b2) - LEAST.b1
    truth = lsq_linear(M.numpy(), rest.numpy(), bounds=(low, high)).x
    algorithm = MAID(coordinates="box", barzilai_borwein=True, nonmonotone=0.85)
    inner = LEAST.inner(space=box(low, high, 4))
    found = tune(inner, algorithm, Budget(outer_steps=60))
    theta = found.hparams["theta"]
    assert bool(((theta >= low) & (theta <= high)).all())
    assert torch.allclose(theta, torch.from_numpy(truth), atol=1e-4)
    assert int((theta - low < 1e-12).sum() + (high - theta < 1e-12).sum()) >= 1


def test_at_a_corner_the_projected_step_is_zero() -> None:
    one = torch.ones(1, 1, dtype=DOUBLE)
    inner = quadratic(one, 5 * one[0], one, -one, 0 * one[0], space=box(0.0, 1.0, 1))
    found = tune(inner, MAID(coordinates="box"), Budget(outer_steps=100))
    assert found.status is RunStatus.CONVERGED
    assert "at a bound" in found.reason
    assert float(found.hparams["theta"]) == pytest.approx(1.0)


@pytest.mark.parametrize("coordinates", ["unconstrained", "box"])
def test_coordinates_enter_the_bound(coordinates: Any) -> None:
    """On a log scale: ω covers the error of dF/dz in both coordinates, from constants in h."""
    x, y = torch.linspace(-1, 1, 12, dtype=DOUBLE)[:, None] ** torch.arange(4), torch.ones(12)
    y = torch.sin(3 * x[:, 1])

    def inner_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        fit = 0.5 * (x @ params["w"] - y).square().sum()
        return fit + 0.5 * hparams["penalty"] * params["w"].square().sum()

    def outer_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        return 0.5 * (params["w"] - 1).square().sum()

    top = float(torch.linalg.matrix_norm(x, 2)) ** 2
    smoothness = Smoothness(
        mu=lambda h, w: h["penalty"], L=lambda h, w: top + h["penalty"], L_g=1.0, L_J=1.0, L_H=0.0
    )
    inner = SmoothInner(
        Problem(inner_loss, outer_loss),
        {"w": torch.zeros(4, dtype=DOUBLE, requires_grad=True)},
        smoothness,
        space=Space(penalty=Grad(0.5, low=1e-2, high=10.0, scale="log")),
    )
    algorithm = MAID(coordinates=coordinates, eps=1e-2)
    state = algorithm.init(inner)
    theta = state["theta"]
    report, _ = algorithm.step(inner, state)

    def f(at: Tensor) -> float:
        h = algorithm._chart(inner).hparams(at)["penalty"]
        eye = torch.eye(4, dtype=DOUBLE)
        w = torch.linalg.solve(x.T @ x + h * eye, x.T @ y)
        return float(outer_loss({"w": w}, {}, None))

    truth = (f(theta + 1e-6) - f(theta - 1e-6)) / 2e-6
    size = float(report.extra["z_norm"])
    assert report.error_bound is not None
    assert abs(abs(truth) - size) <= report.error_bound
    assert report.extra["certified"] == 1.0


def test_estimated_constants_are_never_certified() -> None:
    inner = LEAST.inner()
    found = tune(inner, MAID(smoothness=Smoothness()), Budget(outer_steps=5))
    assert all(r["certified"] == 0.0 and r["error_bound"] is None for r in found.trace)
    assert LEAST.f(found.hparams["theta"]) < 0.8 * LEAST.f(torch.ones(4, dtype=DOUBLE))
    assumed = replace(inner.smoothness, assumed=("mu",))
    found = tune(LEAST.inner(), MAID(smoothness=assumed), Budget(outer_steps=2))
    assert all(r["certified"] == 0.0 for r in found.trace)
    # Without the descent test, the decrease is certified by μ and L_g alone.
    part = Smoothness(mu=inner.smoothness.mu, L_g=inner.smoothness.L_g, g_convex=True)
    off = MAID(smoothness=part, descent_test="off", solver=LBFGS())
    found = tune(LEAST.inner(), off, Budget(outer_steps=5))
    assert all(r["certified"] == 1.0 for r in found.trace)


def test_a_hidden_negative_curvature_withdraws_the_certificate() -> None:
    """h is not convex, whatever the given μ says: CG sees it."""

    def inner_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        w = params["w"]
        return 0.5 * (w[0] ** 2 - 0.1 * w[1] ** 2) - (hparams["h"] * w).sum() + 1e-3 * w[1] ** 4

    def outer_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        return 0.5 * (params["w"] - 1).square().sum()

    inner = SmoothInner(
        Problem(inner_loss, outer_loss),
        {"w": torch.zeros(2, dtype=DOUBLE, requires_grad=True)},
        Smoothness(1.0, 10.0, 1.0, 0.0, 0.0, jacobian=1.0),
        hparams={"h": torch.tensor([0.5, 0.0], dtype=DOUBLE)},
    )
    sharp = MAID(eps=0.01, lower_cap=200, work=400)
    report, _ = sharp.step(inner, sharp.init(inner))
    assert report.estimate == "negative_curvature"
    assert report.extra["certified"] == 0.0
    assert report.error_bound is None
    damped = replace(sharp, damping=1.0)
    report, _ = damped.step(inner, damped.init(inner))
    assert report.estimate == "converged"
    assert report.extra["certified"] == 0.0


Make = Callable[[], SmoothInner]


@pytest.mark.parametrize("make", [lambda: LEAST.inner(), softmax, variation], ids=["q", "s", "tv"])
def test_resumed_runs_are_those_without_a_break(make: Make, tmp_path: Any) -> None:
    algorithm = MAID(
        descent_test="off",
        eps=1e-2,
        barzilai_borwein=True,
        nonmonotone=0.5,
        lower_cap=200,
        work=400,
    )
    whole = tune(make(), algorithm, Budget(outer_steps=4))
    tune(make(), algorithm, Budget(outer_steps=2)).save(tmp_path)
    again = tune(make(), algorithm, Budget(outer_steps=4), resume=Result.load(tmp_path))

    def numbers(result: Result) -> Any:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in result.trace]

    assert numbers(again) == numbers(whole)
    assert again.status == whole.status


def test_a_step_leaves_the_old_state_valid() -> None:
    inner, algorithm = softmax(), MAID()
    _, state = algorithm.step(inner, algorithm.init(inner))
    saved = inner.state_dict()
    first, _ = algorithm.step(inner, state)
    inner.load_state_dict(saved)
    second, _ = algorithm.step(inner, state)
    assert replace(first, hparams={}) == replace(second, hparams={})


def test_result_schedule_and_trace() -> None:
    """Weights of the result belong to its hyperparameters."""
    found = tune(variation(), MAID(descent_test="off"), Budget(outer_steps=5))
    assert len(found.schedule["log_weight"]) == 6
    last = found.trace[-1]
    inner = variation(
        init=(float(found.hparams["log_weight"]), float(found.hparams["log_smoothing"]))
    )
    inner.adopt(found.params, None, 0)
    tools = tools_of(inner)
    theta = tools.level.chart.theta(inner.hparams)
    _, gradient = tools.level.slope(tools.level.start, theta)
    assert bool((gradient.norm(dim=1) <= 2 * float(last["eps"])).all())
    assert found.val is not None
    assert found.val["loss"] == pytest.approx(float(last["outer_loss"]), rel=1e-9)


def test_a_learner_with_estimates() -> None:
    """Any inner level: here a bare ridge problem without constants, through `tune`."""
    from tests.bilevel.problems import RIDGE, optimal_penalty, ridge_options

    algorithm = MAID(descent_test="estimate", tolerance=1e-4, barzilai_borwein=True)
    found = tune(RIDGE, algorithm, Budget(outer_steps=60), **ridge_options(optimizer=SGD(lr=0.1)))
    assert found.status is RunStatus.CONVERGED
    assert float(found.hparams["penalty"]) == pytest.approx(optimal_penalty(), rel=1e-2)


def test_images_with_any_first_accuracy_reach_one_loss() -> None:
    ends = []
    for eps in (10.0, 1e-2):
        algorithm = MAID(descent_test="off", eps=eps, alpha=0.1, barzilai_borwein=True)
        found = tune(variation(), algorithm, Budget(outer_steps=8))
        ends.append(float(found.trace[-1]["outer_loss"]))
    assert max(ends) - min(ends) < 2e-2 * min(ends)
    start = 0.5 * (images()["noisy"] - images()["clean"]).square().sum((1, 2)).mean()
    assert max(ends) < 0.5 * float(start)
