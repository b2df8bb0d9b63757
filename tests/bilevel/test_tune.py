"""tune() against closed forms, its budget, and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from bilevel import Budget, Cost, Descent, Grad, ProblemInner, RunStatus, Space, Until, tune
from hypergrad import CG, SGD, Hyper, Implicit, Problem, Unrolled
from tests.bilevel.problems import (
    RIDGE,
    RULE,
    TRAIN,
    optimal_penalty,
    ridge_options,
    solution,
    validation_loss,
)

NESTED = Descent(
    Implicit(CG(rtol=1e-12)),
    torch.optim.SGD,
    lr=3.0,
    inner_steps=Until(grad_norm=1e-9),
    tolerance=1e-7,
)


def test_nested_reaches_the_optimal_ridge_penalty() -> None:
    found = tune(RIDGE, NESTED, Budget(outer_steps=60), **ridge_options())
    best = optimal_penalty()
    assert found.status is RunStatus.CONVERGED, found.reason
    assert float(found.hparams["penalty"]) == pytest.approx(best, rel=1e-4)
    assert torch.allclose(found.params["w"], solution(best), rtol=1e-4)
    assert found.val is not None
    assert found.val["loss"] == pytest.approx(validation_loss(best), abs=1e-8)


def test_alternating_comes_near_it() -> None:
    algorithm = Descent(Implicit(CG(max_iter=3)), lr=0.02, warmup=5)
    found = tune(RIDGE, algorithm, 300, **ridge_options())
    assert found.val is not None
    assert found.cost.steps == 300
    assert found.val["loss"] == pytest.approx(validation_loss(optimal_penalty()), rel=1e-4)


def test_one_penalty_for_each_weight() -> None:
    """The true support is found: large weights keep small penalties, and F falls far below."""
    algorithm = Descent(Implicit(CG()), torch.optim.SGD, lr=3.0, inner_steps=10)
    found = tune(RIDGE, algorithm, Budget(outer_steps=60), **ridge_options((8,)))
    assert found.val is not None
    assert found.val["loss"] == pytest.approx(validation_loss(found.hparams["penalty"]), rel=1e-3)
    assert found.val["loss"] < validation_loss(optimal_penalty()) - 1.0


def test_unrolled_tunes_the_learning_rate_of_a_quadratic() -> None:
    """f = F = (w₁² + 2w₂²)/2 from w = (1, 1): F = ((1 − η)²ᵀ + 2(1 − 2η)²ᵀ)/2 after T steps."""

    def loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        return 0.5 * (torch.tensor([1.0, 2.0]) * params["w"].square()).sum()

    def reached(rate: Any) -> Any:
        return 0.5 * ((1 - rate) ** 6 + 2 * (1 - 2 * rate) ** 6)

    found = tune(
        Problem(loss, loss),
        Descent(Unrolled(SGD(lr=Hyper("lr")), steps=3), torch.optim.SGD, lr=5.0, restart=True),
        Budget(outer_steps=50),
        params={"w": torch.ones(2, dtype=torch.float64, requires_grad=True)},
        space=Space(lr=Grad(0.4, low=0.0)),
    )
    best = minimize_scalar(reached, bounds=(0.3, 1.0), method="bounded", options={"xatol": 1e-9})
    assert float(found.hparams["lr"]) == pytest.approx(best.x, rel=1e-5)
    losses = [record["outer_loss"] for record in found.trace]
    assert losses == pytest.approx(reached(found.schedule["lr"][:-1]), rel=1e-9)


def test_simplex_weights_find_the_clean_source() -> None:
    g = torch.Generator().manual_seed(0)
    clean = torch.tensor([1.0, -1.0], dtype=torch.float64)
    x, noise = torch.randn(2, 50, 2, generator=g, dtype=torch.float64)
    sources = [(x, x @ clean), (x, 3 * noise[:, 0]), (x, -(x @ clean))]

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        errors = torch.stack([(x @ params["w"] - y).square().mean() for x, y in sources])
        return (hparams["mix"] * errors).sum()

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        return (params["w"] - clean).square().sum()

    found = tune(
        Problem(inner, outer),
        Descent(Implicit(CG()), lr=0.2, inner_steps=10),
        Budget(outer_steps=80),
        params={"w": torch.zeros(2, dtype=torch.float64, requires_grad=True)},
        space=Space(mix=Grad([0.3, 0.3, 0.4], scale="simplex", shape=(3,))),
        optimizer=SGD(lr=0.3),
    )
    assert float(found.hparams["mix"][0]) > 0.9
    assert float(found.hparams["mix"].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("steps", [17, 100])
def test_a_budget_of_steps_is_never_exceeded(steps: int) -> None:
    algorithm = Descent(Implicit(), inner_steps=4, warmup=3)
    found = tune(RIDGE, algorithm, steps, **ridge_options())
    assert found.cost.steps == 3 + 4 * ((steps - 3) // 4)
    assert (found.status, found.reason) == (
        RunStatus.MAX_ITER,
        f"the budget of {steps} steps is spent",
    )


def test_a_budget_of_work() -> None:
    """CG always takes 3 iterations here, so that every outer step costs the same."""
    algorithm = Descent(Implicit(CG(rtol=1e-16, max_iter=3), warm_start=False), lr=0.0)
    found = tune(RIDGE, algorithm, Budget(equivalent_steps=100), **ridge_options())
    each = Cost(gradients=3, hvps=4).equivalent_steps  # a step, two losses; CG, cross product
    assert len(found.trace) == 100 // each
    assert found.cost.equivalent_steps == each * len(found.trace)


def test_the_clock_ends_a_run() -> None:
    found = tune(RIDGE, Descent(Implicit()), Budget(seconds=1e-6), **ridge_options())
    assert (len(found.trace), found.reason) == (1, "the budget of 1e-06 seconds is spent")


def test_the_test_split_is_looked_at_once_and_last() -> None:
    seen: list[str] = []
    options = ridge_options()

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        seen.append("test" if batch is options["test_batch"] else "val")
        return RIDGE.outer_loss(params, hparams, batch)

    problem = Problem(RIDGE.inner_loss, outer)
    found = tune(problem, NESTED, Budget(outer_steps=3), evaluate_every=1, **options)
    assert seen.index("test") == len(seen) - 1
    assert found.test is not None
    assert found.test["loss"] == pytest.approx(
        RIDGE.outer_loss(found.params, {}, options["test_batch"]).item(), rel=1e-12
    )


def test_same_seed_same_numbers() -> None:
    def batch(t: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(TRAIN[0]), (6,))
        return TRAIN[0][rows], TRAIN[1][rows]

    def run(seed: int) -> list[Any]:
        found = tune(RIDGE, Descent(Implicit()), 20, seed=seed, **ridge_options(inner_batch=batch))
        return [record["outer_loss"] for record in found.trace]

    before = torch.get_rng_state()
    assert run(1) == run(1)
    assert run(1) != run(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_inner_level_is_left_at_the_result() -> None:
    options = ridge_options()
    inner = ProblemInner(RIDGE, options.pop("params"), **options)
    found = tune(inner, Descent(Implicit()), 20)
    assert torch.equal(inner.params["w"], found.params["w"])
    assert torch.equal(inner.hparams["penalty"], found.hparams["penalty"])
    assert dict(inner.evaluate("val")) == found.val


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": None}, ValueError, "optimizer: a bare Problem needs an update rule"),
        ({"params": None}, ValueError, "params: a bare Problem needs initial weights"),
        ({"params": {"w": torch.zeros(8)}}, ValueError, "no tensor requires grad"),
        ({"budget": 0}, ValueError, "steps must be positive, but got 0"),
        ({"budget": Budget(steps=1), "algorithm": Descent(inner_steps=5)}, ValueError,
         "budget: 1 steps do not cover one outer step, which takes 5"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every must be at least 1, but got 0"),
        ({"checkpoint_every": -1}, ValueError, "checkpoint_every must be at least 0 s"),
        ({"algorithm": Implicit()}, TypeError, r"algorithm must be .* but got Implicit\("),
        ({"subject": 3}, TypeError, "subject must be a learner .* but got int"),
        ({"space": None}, ValueError, "give the hyperparameters"),
        ({"space": Space(a=Grad(1.0), penalty=Grad(1.0))}, ValueError, r"hparams\['a'\]"),
        ({"hparams": {"penalty": -1.0}}, ValueError, "penalty must be in .* but got -1"),
        ({"hparams": {"penalty": 3.0}}, ValueError, "penalty must be in"),  # on the bound
        ({"algorithm": Descent(lr={"x": 1.0})}, ValueError, r"lr must name each of \['penalty'\]"),
        ({"checkpoint": "/proc/none/x.pt"}, OSError, "checkpoint: cannot write '/proc/none/x.pt'"),
        ({"resume": "no-such-file.pt"}, FileNotFoundError, "no-such-file"),
    ],
)  # fmt: skip
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"subject": RIDGE, "algorithm": Descent(), "budget": 20}
    arguments |= {**ridge_options(), **changes}
    with pytest.raises(error, match=message):
        tune(**arguments)


def test_a_learner_takes_no_arguments_of_a_problem() -> None:
    options = ridge_options()
    inner = ProblemInner(RIDGE, options.pop("params"), **options)
    with pytest.raises(ValueError, match="optimizer belongs to a bare Problem"):
        tune(inner, Descent(), 20, optimizer=RULE)


def test_a_loss_that_is_no_scalar_raises() -> None:
    problem = Problem(lambda w, h, b: h["penalty"] * w["w"], RIDGE.outer_loss)
    with pytest.raises(TypeError, match=r"must return a floating scalar tensor.*\(8,\)"):
        tune(problem, Descent(), 20, **ridge_options())


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        tune(RIDGE, Descent(), 20, resume=path, **ridge_options())
