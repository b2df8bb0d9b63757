"""Stochastic bilevel algorithms under the outer-algorithm contract: cost, resume, errors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import Budget, Cost, Grad, ProblemInner, RunStatus, Space, tune
from bilevel.algorithm import Diverged
from bilevel.checkpoint import copy, load, save
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
    FiniteSum,
    Randomized,
    StocBiO,
    Truncated,
)
from hypergrad import SGD, Problem
from tests.bilevel.quadratic import Quadratic, flat, run

N, M = 5, 3  # batches of f and of F
Q = Truncated(4, 0.5)
P = Randomized(6, 0.5, seed=3)
ALL = [
    SOBA(),
    SABA(),
    SRBA(period=3),
    FSLA(),
    AmIGO(steps=3, adjoint_steps=2),
    StocBiO(steps=3, neumann=Q),
    BSA(steps=3, neumann=P),
    TTSA(neumann=P),
    SUSTAIN(neumann=P),
    MRBO(neumann=Q),
    VRBO(steps=2, neumann=Q, period=3),
]
each = pytest.mark.parametrize("algorithm", ALL, ids=lambda a: type(a).__name__)


def _formula(name: str, k: int) -> tuple[int, int]:
    """Gradients and HVPs of outer step k, as the docstrings state them."""
    p, first, full = P.factors(k), k == 0, k % 3 == 0
    return {
        "SOBA": (2, 1),
        "SABA": (N + M, N) if first else (2, 1),
        "SRBA": (N + M, N) if full else (4, 2),
        "FSLA": (5, 2) if first else (7, 3),
        "AmIGO": (3 + 2 + 2, 2 + 1),
        "StocBiO": (3 + 4 + 2, 4 + 1),
        "BSA": (3 + p + 2, p + 1),
        "TTSA": (1 + p + 2, p + 1),
        "SUSTAIN": (p + 2, p + 1) if first else (2 * (p + 2), 2 * (p + 1)),
        "MRBO": (4 + 2, 4 + 1) if first else (2 * (4 + 2), 2 * (4 + 1)),
        "VRBO": (N + M + 12, N * 5 + 10) if full else (2 * 12, 2 * 10),
    }[name]


@each
def test_costs_are_those_of_the_losses_and_of_the_docstring(algorithm: Any) -> None:
    problem = Quadratic(N, noise=0.1)
    inner = problem.inner()
    state = algorithm.init(inner)
    for k in range(5):
        calls, backwards = problem.loss_calls[0], problem.double_backwards[0]
        report, after = algorithm.step(inner, state)
        spent = (problem.loss_calls[0] - calls, problem.double_backwards[0] - backwards)
        assert (report.cost.gradients, report.cost.hvps) == spent
        assert spent == _formula(type(algorithm).__name__, k)
        assert report.cost.steps == algorithm.next_steps(state) == getattr(algorithm, "steps", 1)
        state = after


@each
def test_resume_is_bit_identical(algorithm: Any, tmp_path: Path) -> None:
    problem = Quadratic(N, noise=0.2)
    inner = problem.inner()
    state, _ = run(algorithm, inner, 4)
    save(tmp_path / "run.pt", {"algorithm": state, "inner": inner.state_dict()})
    expected = []
    for _ in range(4):
        report, state = algorithm.step(inner, state)
        expected.append((report.loss, report.inner_loss, dict(report.grad_norms)))

    saved, again = load(tmp_path / "run.pt"), problem.inner()
    algorithm.init(again)
    again.load_state_dict(saved["inner"])
    state, found = saved["algorithm"], []
    for _ in range(4):
        report, state = algorithm.step(again, state)
        found.append((report.loss, report.inner_loss, dict(report.grad_norms)))
    assert found == expected
    assert torch.equal(again.hparams["h"], inner.hparams["h"])
    assert torch.equal(flat(again.params), flat(inner.params))


@each
def test_a_step_leaves_the_old_state_valid(algorithm: Any) -> None:
    inner = Quadratic(N, noise=0.2).inner()
    state, _ = run(algorithm, inner, 3)
    before, kept = copy(inner.state_dict()), copy(state)
    first, _ = algorithm.step(inner, state)
    inner.load_state_dict(before)
    second, _ = algorithm.step(inner, kept)
    assert (first.loss, first.grad_norms) == (second.loss, second.grad_norms)


def test_report_belongs_to_the_point_of_the_step() -> None:
    problem = Quadratic()
    inner = problem.inner()
    algorithm = SOBA(0.1, 0.1)
    state = algorithm.init(inner)
    w, h = inner.params, inner.hparams
    report, _ = algorithm.step(inner, state)
    batch = problem.outer_batches[0]
    assert report.loss == pytest.approx(problem._outer_loss(w, h, batch).item(), rel=1e-14)
    assert torch.equal(report.hparams["h"], h["h"])
    assert not torch.equal(inner.hparams["h"], h["h"])
    assert report.estimate == "stochastic"


def test_tune_runs_retreats_and_stops_at_the_budget() -> None:
    problem = Quadratic(N, noise=0.1)
    result = tune(problem.inner(), SABA(0.3, 0.1), Budget(outer_steps=30), evaluate_every=10)
    assert result.cost.steps == 30
    assert result.cost == Cost(30, N + M + 29 * 2, N + 29, result.cost.seconds)
    wild = tune(problem.inner(), SOBA(1e200, 1e200), Budget(outer_steps=30))
    assert wild.status is RunStatus.DIVERGED
    assert all(math.isfinite(float(x)) for x in wild.hparams["h"])


def test_divergence_names_what_is_not_finite_and_retreat_halves_the_steps() -> None:
    inner = Quadratic(N, noise=0.1).inner()
    algorithm = SOBA(1e308, 1e308)
    states = [algorithm.init(inner)]

    def go() -> None:
        for _ in range(3):
            states.append(algorithm.step(inner, states[-1])[1])

    with pytest.raises(Diverged, match="not finite") as caught:
        go()
    state = states[-1]
    assert caught.value.cost.gradients >= 1
    calm = algorithm.retreat(inner, state)
    assert calm is not None
    assert (calm["scale"], calm["memory"]) == (state["scale"] / 2, None)
    assert calm["v"] is not None
    assert not calm["v"].any()


def test_retreat_scales_every_step_size() -> None:
    problem = Quadratic()
    for big, small in [
        (SOBA(0.4, 0.2), SOBA(0.2, 0.1)),
        (StocBiO(0.4, 0.2, 3, Truncated(3, 0.6)), StocBiO(0.2, 0.1, 3, Truncated(3, 0.3))),
        (AmIGO(0.4, 0.2, 0.4, 3, 3), AmIGO(0.2, 0.1, 0.2, 3, 3)),
        (FSLA(0.4, 0.2), FSLA(0.2, 0.1)),
        (VRBO(0.4, 0.2, 2, Truncated(3, 0.6)), VRBO(0.2, 0.1, 2, Truncated(3, 0.3))),
    ]:
        one, two = problem.inner(), problem.inner()
        state = big.retreat(one, big.init(one))
        assert state is not None
        big.step(one, state)
        small.step(two, small.init(two))
        torch.testing.assert_close(one.hparams["h"], two.hparams["h"], rtol=1e-14, atol=0)
        torch.testing.assert_close(flat(one.params), flat(two.params), rtol=1e-14, atol=0)


def _bare(**changes: Any) -> ProblemInner:
    problem = Quadratic()
    options: dict[str, Any] = {
        "space": Space(h=Grad(0.5, shape=(4,))),
        "optimizer": SGD(lr=0.1),
        "inner_batch": problem.inner_batches[0],
        "outer_batch": problem.outer_batches[0],
        **changes,
    }
    params = problem.inner().params
    return ProblemInner(Problem(problem._inner_loss, problem._outer_loss), params, **options)


@pytest.mark.parametrize("algorithm", [SABA(), SRBA(), VRBO()], ids=lambda a: type(a).__name__)
def test_lists_are_asked_for_where_needed(algorithm: Any) -> None:
    with pytest.raises(TypeError, match=r"needs finite lists of batches, but ProblemInner"):
        algorithm.init(_bare())
    run(SOBA(), _bare(), 2)  # a stream is enough for the others


def test_a_hyperparameter_that_enters_neither_loss_is_named() -> None:
    inner = _bare(space=Space(h=Grad(0.5, shape=(4,)), lr=Grad(0.1)))
    with pytest.raises(ValueError, match=r"hparams\['lr'\] enters neither the inner nor"):
        run(SOBA(), inner, 1)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SOBA(inner_lr=-0.1), ValueError, "SOBA: inner_lr must be >= 0, but got -0.1"),
        (lambda: SOBA(outer_lr=math.nan), ValueError, "SOBA: outer_lr must be finite"),
        (lambda: SOBA(outer_lr="fast"), TypeError, "SOBA: outer_lr must be a number"),
        (lambda: SRBA(period=0), ValueError, "SRBA: period must be at least 1, but got 0"),
        (lambda: BSA(steps=0), ValueError, "BSA: steps must be at least 1"),
        (lambda: Truncated(steps=2.5), TypeError, "Truncated: steps must be an integer"),
        (lambda: Randomized(seed=-1), ValueError, "Randomized: seed must be at least 0"),
        (lambda: MRBO(momentum=1.5), ValueError, "MRBO: momentum must be at most 1"),
        (lambda: FSLA(momentum=Decay(2.0, 0.5)), ValueError, "FSLA: momentum must be at most 1"),
        (lambda: Decay(-1.0, 0.5), ValueError, "Decay: initial must be >= 0"),
        (lambda: Decay(1.0, -0.5), ValueError, "Decay: power must be >= 0"),
    ],
)
def test_bad_settings(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_bad_lists() -> None:
    problem, inner = Quadratic(), Quadratic().inner()
    losses = Problem(problem._inner_loss, problem._outer_loss)
    for lists, name in [(([], [1]), "inner_batches"), (([1], []), "outer_batches")]:
        with pytest.raises(ValueError, match=f"{name} must hold at least one batch"):
            FiniteSum(losses, inner.params, *lists, space=inner.space)


def test_rates_decay_polynomially() -> None:
    assert [Decay(0.3, 0.5)(k) for k in (0, 3, 99)] == pytest.approx([0.3, 0.15, 0.03])
    assert Decay(0.3, 0.0)(1000) == 0.3
