"""Ready-made problems, solvers, adjoint systems, HOAG and ISGD."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Budget, Grad, ProblemInner, RunStatus, Space, tune
from bilevel.inexact import (
    FISTA,
    HOAG,
    ISGD,
    LBFGS,
    MAID,
    FixedAccuracy,
    Geometric,
    GradientDescent,
    NewtonCG,
    NotStronglyConvexError,
    SmoothInner,
    Smoothness,
    dct_filters,
    field_of_experts,
    inexact_hypergradient,
    logistic_ridge,
    psnr,
    quadratic,
    sample_problem,
    tv_denoising,
)
from bilevel.inexact.adjoint import solve_adjoint
from bilevel.inexact.constants import BOUND
from bilevel.single_loop import Decay
from hypergrad import SGD, Problem, Status
from tests.bilevel.inexact_problems import (
    DOUBLE,
    Least,
    images,
    normal,
    softmax,
    tools_of,
    variation,
)

LEAST = Least(kappa=4.0)


def experts(learn_filters: bool = False) -> SmoothInner:
    return field_of_experts(
        images(), dct_filters(3)[:3], init=(-2.0, -0.5, -1.5), learn_filters=learn_filters
    )


# Constants of the ready-made problems, against dense second derivatives.


@pytest.mark.parametrize("make", [softmax, variation, experts], ids=["softmax", "tv", "foe"])
def test_constants_bound_dense_derivatives(make: Any) -> None:
    """μ, L, L_g, ‖J‖ at random points; L_J and L_H between pairs of points."""
    inner = make()
    tools = tools_of(inner)
    level = tools.level
    theta = level.chart.theta(inner.hparams)
    theta = theta + 0.1 * normal(9, len(theta))
    m, n = level.start.shape

    def dense(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        point = level.linearize(x, theta)
        eye = torch.eye(n, dtype=DOUBLE)
        hessian = torch.stack([point.hvp(e.expand(m, n)) for e in eye], 2)
        columns = [point.jvp(e) for e in torch.eye(len(theta), dtype=DOUBLE)]
        outer = level.outer_hvp(x, theta)
        return (
            hessian,
            torch.stack(columns, 2),
            torch.stack([outer(e.expand(m, n)) for e in eye], 2),
        )

    def size(matrix: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(matrix, 2)

    base = level.start
    first = dense(base)
    point = level.linearize(base, theta)
    c, _ = tools.smoothness.at(level, base, theta, {}, BOUND, point)
    assert c.estimated == frozenset()
    values = torch.linalg.eigvalsh(first[0])
    assert bool((values[:, 0] >= c.mu * (1 - 1e-9)).all())
    assert bool((values[:, -1] <= c.L * (1 + 1e-9)).all())
    assert bool((size(first[2]) <= c.L_g * (1 + 1e-9)).all())
    assert bool((size(first[1]) <= c.jacobian * (1 + 1e-9)).all())
    L_H = c.L_Hinv * c.mu.square()
    for seed in range(2):
        for length in (1e-2, 0.3):
            move = normal(20 + seed, m, n)
            move = length * move / move.norm(dim=1, keepdim=True)
            other = dense(base + move)
            assert bool((size(other[0] - first[0]) <= L_H * length).all())
            assert bool((size(other[1] - first[1]) <= c.L_J * length * (1 + 1e-9)).all())


def test_learned_filters_have_an_estimated_constant() -> None:
    inner = experts(learn_filters=True)
    assert inner.smoothness.estimates(BOUND, direct=False) == {"L_J", "jacobian"}
    assert len(tools_of(inner).level.chart.theta(inner.hparams)) == 1 + 3 + 3 + 27
    filters = dct_filters(7)
    assert filters.shape == (48, 7, 7)
    gram = filters.flatten(1) @ filters.flatten(1).T
    assert torch.allclose(gram, torch.eye(48, dtype=DOUBLE), atol=1e-12)
    assert float(filters.sum((1, 2)).abs().max()) < 1e-12


def test_psnr() -> None:
    clean = torch.zeros(2, 3, 3, dtype=DOUBLE)
    assert psnr(clean + 0.1, clean) == pytest.approx(20.0)


@pytest.mark.parametrize("make", [lambda: LEAST.inner(), softmax, variation], ids=["q", "s", "tv"])
@pytest.mark.parametrize("solver", [FISTA(), GradientDescent(), LBFGS(), NewtonCG()], ids=str)
def test_solvers_reach_the_certified_distance(make: Any, solver: Any) -> None:
    inner = make()
    tools = tools_of(inner)
    level = tools.level
    theta, start = level.chart.theta(inner.hparams), level.start
    constants, _ = tools.smoothness.at(level, start, theta, {})
    exact = FISTA().solve(level, start, theta, constants, 1e-11, 5000).x
    solved = solver.solve(level, start, theta, constants, 1e-3, 5000)
    assert solved.status is Status.CONVERGED
    _, gradient = level.slope(solved.x, theta)
    assert torch.allclose(gradient.norm(dim=1), solved.residual)
    assert bool((solved.residual <= 1e-3 * constants.mu).all())
    assert bool(((solved.x - exact).norm(dim=1) <= solved.residual / constants.mu).all())
    capped = solver.solve(level, start + 1.0, theta, constants, 1e-11, 2)
    assert capped.status is Status.MAX_ITER


def test_acceleration_pays_on_ill_conditioned_problems() -> None:
    tools = tools_of(Least(kappa=100.0).inner())
    level, theta = tools.level, torch.ones(4, dtype=DOUBLE)
    constants, _ = tools.smoothness.at(level, level.start, theta, {})
    used = []
    for solver in (FISTA(), GradientDescent()):
        before = level.steps
        solver.solve(level, level.start, theta, constants, 1e-6, 5000)
        used.append(level.steps - before)
    assert used[0] < 0.5 * used[1]


def test_adjoint_systems_of_all_samples() -> None:
    """Against dense solves; each row to its own accuracy."""
    roots = normal(0, 3, 6, 6)
    matrices = roots @ roots.mT + torch.eye(6, dtype=DOUBLE)
    b = normal(1, 3, 6)

    def hvp(v: Tensor) -> Tensor:
        return (matrices @ v[..., None])[..., 0]

    exact = torch.linalg.solve(matrices, b[..., None])[..., 0]
    goal = torch.tensor([1e-10, 1e-2, 100.0], dtype=DOUBLE)
    found = solve_adjoint(hvp, b, goal)
    assert found.status is Status.CONVERGED
    assert torch.allclose(found.residual, (hvp(found.q) - b).norm(dim=1), atol=1e-13)
    assert bool((found.residual <= goal).all())
    assert torch.allclose(found.q[0], exact[0], atol=1e-9)
    assert bool((found.q[2] == 0).all())  # δ ≥ ‖∇g‖: q = 0 already solves to δ
    again = solve_adjoint(hvp, b, goal, exact)
    assert again.iterations == 1
    assert solve_adjoint(hvp, b, 0.0, cap=200).status is Status.STALLED
    assert solve_adjoint(hvp, b, 1e-10, cap=2).status is Status.MAX_ITER
    indefinite = solve_adjoint(lambda v: hvp(v) - 5 * v, b, 1e-10)
    assert indefinite.status is Status.NEGATIVE_CURVATURE
    assert indefinite.curvature < 0


# The methods without a certificate.


@pytest.mark.parametrize(
    "schedule", [Decay(0.1, 2.0), Decay(0.1, 3.0), Geometric(0.1, 0.9)], ids=["k-2", "k-3", "0.9"]
)
def test_hoag_descends_by_its_schedule(schedule: Any) -> None:
    found = tune(LEAST.inner(), HOAG(schedule=schedule, alpha=0.02), Budget(outer_steps=25))
    assert [r["eps"] for r in found.trace] == [schedule(k) for k in range(25)]
    assert all(r["certified"] == 0.0 for r in found.trace)
    gap = LEAST.f(LEAST.best)
    assert LEAST.f(found.hparams["theta"]) - gap < 0.2 * (LEAST.f(torch.ones(4).double()) - gap)


def test_hoag_goes_back_from_a_worse_point() -> None:
    """Λ too small: g rises by a fifth, so Λ doubles, ε halves, and θ is the last one."""
    inner = LEAST.inner()
    algorithm = HOAG(alpha=10.0, schedule=Decay(1e-4, 0.0))
    state = algorithm.init(inner)
    start = state["theta"].clone()
    first, state = algorithm.step(inner, state)
    second, state = algorithm.step(inner, state)
    assert second.loss > 1.2 * first.loss
    assert torch.equal(state["theta"], start)
    third, _ = algorithm.step(inner, state)
    assert third.extra["alpha"] == pytest.approx(5.0)
    assert third.extra["eps"] == pytest.approx(0.5e-4)


def test_hoag_stops_at_its_tolerance() -> None:
    found = tune(LEAST.inner(), HOAG(tolerance=1e3), Budget(outer_steps=5))
    assert found.status is RunStatus.CONVERGED


def test_isgd_with_all_samples_is_gradient_descent() -> None:
    inner = LEAST.inner()
    algorithm = ISGD(alpha=Decay(0.01, 0.5), accuracy=Decay(1e-10, 0.0))
    found = tune(inner, algorithm, Budget(outer_steps=6))
    theta = torch.ones(4, dtype=DOUBLE)
    for k in range(6):
        assert found.schedule["theta"][k].tolist() == pytest.approx(theta.tolist(), abs=1e-7)
        theta = theta - 0.01 * (k + 1) ** -0.5 * LEAST.slope(theta)


def test_isgd_draws_samples_and_keeps_the_others() -> None:
    inner = variation()
    algorithm = ISGD(alpha=0.3, batch=1, accuracy=Decay(1e-2, 0.5), seed=3)
    state = algorithm.init(inner)
    before = inner.params["x"].detach().clone()
    _, state = algorithm.step(inner, state)
    changed = (inner.params["x"].detach() != before).flatten(1).any(1)
    assert int(changed.sum()) == 1
    assert bool(((state["q"] != 0).any(1) == changed).all())
    losses = []
    for _ in range(25):
        report, state = algorithm.step(inner, state)
        losses.append(report.loss)
    assert inner.evaluate("val")["loss"] < 0.6 * float(
        0.5 * (before - images()["clean"]).square().sum((1, 2)).mean()
    )


def test_isgd_is_unbiased_over_samples() -> None:
    """The mean of z over all draws of one sample is the z of all samples."""
    whole = []
    for rows in ([0], [1], None):
        inner = variation()
        algorithm = ISGD(alpha=0.3, accuracy=Decay(1e-10, 0.0))
        tools = algorithm._tools(inner, algorithm.init(inner), rows)
        theta = tools.level.chart.theta(inner.hparams)
        found, _ = inexact_hypergradient(tools, tools.level.start, theta, 1e-10, 1e-10, {})
        whole.append(found.z)
    assert torch.allclose((whole[0] + whole[1]) / 2, whole[2], atol=1e-8)


# Bad input.


def bare(inner_loss: Any, outer_loss: Any, **options: Any) -> ProblemInner:
    return ProblemInner(
        Problem(inner_loss, outer_loss),
        {"w": torch.zeros(2, dtype=DOUBLE, requires_grad=True)},
        optimizer=SGD(lr=0.1),
        **{"hparams": {"h": torch.tensor(1.0, dtype=DOUBLE)}, **options},
    )


def convex(params: Any, hparams: Any, batch: Any) -> Tensor:
    return 0.5 * (params["w"] - hparams["h"]).square().sum()


def target(params: Any, hparams: Any, batch: Any) -> Tensor:
    return 0.5 * (params["w"] - 2).square().sum()


def test_bad_numbers_are_named() -> None:
    for make, message in (
        (lambda: MAID(eps=0.0), r"MAID: eps must be finite and positive, but got 0\.0"),
        (lambda: MAID(delta=-1.0), "MAID: delta must be finite and positive"),
        (lambda: MAID(rho=1.0), r"MAID: rho must be in \(0, 1\)"),
        (lambda: MAID(lam=0.6), "0 < lam < eta < 1 must hold, but lam = 0.6"),
        (lambda: MAID(nu=1.0), r"MAID: nu must be in \(0, 1\) and nu_bar at least 1"),
        (lambda: MAID(nonmonotone=1.0), "MAID: nonmonotone must be in"),
        (lambda: MAID(work=100), "work must be at least 2 lower_cap = 4000"),
        (lambda: MAID(descent_test="on"), "descent_test must be one of .* but got 'on'"),
        (lambda: MAID(coordinates="cube"), "coordinates must be 'unconstrained' or 'box'"),
        (lambda: MAID(damping=-1.0), "damping must be finite and not negative"),
        (lambda: Smoothness(assumed=("nu",)), r"assumed names no constant \['nu'\]"),
        (lambda: MAID(lower_cap=0), "lower_cap must be at least 1"),
        (lambda: MAID(max_refinements=0), "max_refinements must be at least 1"),
        (lambda: MAID(eps_floor=-1.0), "eps_floor must be finite and positive"),
        (lambda: FixedAccuracy(lam=0.0), r"FixedAccuracy: lam must be in \(0, 1\)"),
        (lambda: FixedAccuracy(max_backtracks=0), "max_backtracks must be at least 1"),
        (lambda: HOAG(alpha=-1.0), "HOAG: alpha must be finite and positive"),
        (lambda: HOAG(slack=-1.0), "HOAG: slack must be at least 0"),
        (lambda: Geometric(0.1, 1.0), r"Geometric: ratio must be in \(0, 1\)"),
        (lambda: ISGD(alpha=0.0), "ISGD: alpha must be finite and positive"),
        (lambda: ISGD(alpha=1.0, batch=0), "ISGD: batch must be at least 1"),
        (lambda: Smoothness(mu=-1.0), "mu must be positive, but got -1: the inner loss must be"),
        (lambda: Smoothness(L_g=-1.0), "L_g must be at least 0, but got -1"),
        (lambda: Smoothness(every=0), "every must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_problems_without_strong_convexity_are_refused() -> None:
    def flat(params: Any, hparams: Any, batch: Any) -> Tensor:
        return 0.5 * (params["w"][0] - hparams["h"]) ** 2 - params["w"][1] ** 2

    with pytest.raises(NotStronglyConvexError, match=r"smallest curvature .* estimated as -1"):
        tune(bare(flat, target), MAID(), Budget(outer_steps=2))
    gone = Smoothness(mu=lambda h, w: h["h"] - 1, L=2.0, L_g=1.0)
    with pytest.raises(NotStronglyConvexError, match=r"mu must be positive, but got 0 at h = 1:"):
        tune(bare(convex, target), MAID(smoothness=gone), Budget(outer_steps=2))
    mixed = Smoothness(mu=3.0, L=2.0, L_g=1.0)
    with pytest.raises(ValueError, match="L must be at least mu, but L = 2 and mu = 3 at h = 1"):
        tune(bare(convex, target), MAID(smoothness=mixed), Budget(outer_steps=2))
    A = normal(0, 4, 3)
    A[:, 2] = A[:, 0]
    with pytest.raises(ValueError, match=r"A2 of shape \(4, 3\) must have rank 3"):
        quadratic(normal(1, 4, 3), normal(2, 4), A, normal(3, 4, 2), normal(4, 4))


def test_unused_hyperparameters_are_named() -> None:
    space = Space(h=Grad(1.0), lr=Grad(0.1))
    with pytest.raises(ValueError, match=r"hparams\['lr'\] enters neither"):
        tune(bare(convex, target, hparams=None, space=space), MAID(), Budget(outer_steps=2))

    def detached(params: Any, hparams: Any, batch: Any) -> Tensor:
        return target({"w": params["w"].detach()}, hparams, batch)

    with pytest.raises(ValueError, match="outer_loss depends on none of the parameters"):
        tune(bare(convex, detached), MAID(), Budget(outer_steps=2))


def test_a_hyperparameter_without_effect_converges_at_once() -> None:
    """J = 0 in numbers, not in the graph."""

    def blind(params: Any, hparams: Any, batch: Any) -> Tensor:
        return 0.5 * (params["w"] - 1).square().sum() + 0 * hparams["h"] * params["w"].sum()

    found = tune(bare(blind, target), MAID(eps=10.0), Budget(outer_steps=50))
    assert found.status is RunStatus.CONVERGED
    assert "zero" in found.reason


def test_a_nan_ends_the_run_with_the_last_good_values() -> None:
    def broken(params: Any, hparams: Any, batch: Any) -> Tensor:
        return convex(params, hparams, batch) / (hparams["h"] - 1)

    found = tune(bare(broken, target), MAID(), Budget(outer_steps=3))
    assert found.status is RunStatus.DIVERGED
    assert "inner_loss is inf" in found.reason
    assert float(found.hparams["h"]) == 1.0


def test_data_and_samples_are_checked() -> None:
    data = torch.ones(3, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="see the same data"):
        tune(
            bare(convex, target, inner_batch=data, outer_batch=data), MAID(), Budget(outer_steps=1)
        )
    stack = images()
    with pytest.raises(TypeError, match=r"images\['noisy'\] must be floating in \[0, 1\], but is"):
        tv_denoising({**stack, "noisy": (255 * stack["noisy"]).int()})
    with pytest.raises(ValueError, match=r"must have shape \(m, H, W\)"):
        tv_denoising({k: v[0] for k, v in stack.items()})
    with pytest.raises(ValueError, match="must have the keys 'clean' and 'noisy'"):
        tv_denoising({"clean": stack["clean"]})
    with pytest.raises(ValueError, match=r"filters must have shape \(k, f, f\)"):
        field_of_experts(stack, torch.ones(1, 9, 9))
    with pytest.raises(ValueError, match=r"shape=\(2, 2\) must be \(\)"):
        softmax(shape=(2, 2))
    x = torch.ones(4, 2)
    with pytest.raises(ValueError, match="labels must be integers from 0"):
        logistic_ridge((x, torch.ones(4)), (x, torch.ones(4)))

    def scalar(params: Any, hparams: Any, batch: Any) -> Tensor:
        return params["x"].square().sum()

    rows = {"x": torch.ones(2, 3, requires_grad=True)}
    hparams = {"h": torch.tensor(1.0)}
    inner = SmoothInner(
        sample_problem(scalar, scalar), rows, Smoothness(1.0, 2.0, 1.0), hparams=hparams
    )
    with pytest.raises(ValueError, match="one value for each of the 2 samples, but got shape"):
        tune(inner, ISGD(alpha=1.0), Budget(outer_steps=1))
    uneven = {**rows, "y": torch.ones(3, requires_grad=True)}
    inner = SmoothInner(
        sample_problem(scalar, scalar), uneven, Smoothness(1.0, 2.0, 1.0), hparams=hparams
    )
    with pytest.raises(ValueError, match="must have one row for each sample"):
        tune(inner, ISGD(alpha=1.0), Budget(outer_steps=1))
    with pytest.raises(ValueError, match="batch=3, but there are 2 samples"):
        tune(variation(), ISGD(alpha=1.0, batch=3), Budget(outer_steps=1))
    with pytest.raises(ValueError, match="batch=1 draws rows of a SampleProblem"):
        tune(LEAST.inner(), ISGD(alpha=1.0, batch=1), Budget(outer_steps=1))


def test_spaces_are_checked() -> None:
    simplex = Space(h=Grad([0.5, 0.5], scale="simplex", shape=(2,)))
    inner = bare(convex, target, hparams=None, space=simplex)
    with pytest.raises(ValueError, match="coordinates='box' cannot hold h"):
        tune(inner, MAID(coordinates="box"), Budget(outer_steps=1))
    with pytest.raises(ValueError, match="100 steps do not cover one outer step, which takes 4000"):
        tune(LEAST.inner(), MAID(), 100)
    found = tune(bare(convex, target, hparams=None, space=simplex), MAID(), Budget(outer_steps=2))
    assert float(found.hparams["h"].sum()) == pytest.approx(1.0)
