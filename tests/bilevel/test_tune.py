"""tune() against closed forms, its budget, and its refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Budget, Descent, EarlyStopping, Grad, RunStatus, Space, Until, tune
from hypergrad import CG, SGD, Hyper, Implicit, Problem, Unrolled
from tests.bilevel.problems import RIDGE, TRAIN, optimal_penalty, ridge_options, validation_loss

RULE = SGD(lr=0.05, momentum=0.9)
NESTED = Descent(
    Implicit(CG(rtol=1e-10)),
    lr=0.1,
    inner_steps=Until(grad_norm=1e-6, max_steps=200),
    tolerance=1e-6,
)


def test_nested_reaches_the_optimal_ridge_penalty() -> None:
    found = tune(RIDGE, NESTED, Budget(outer_steps=400), optimizer=RULE, **ridge_options())
    best = optimal_penalty()
    assert found.status is RunStatus.CONVERGED, found.reason
    assert float(found.hparams["penalty"]) == pytest.approx(best, rel=1e-3)
    assert found.val is not None
    assert found.val["loss"] == pytest.approx(validation_loss(best), abs=1e-6)


def test_alternating_comes_near_it() -> None:
    algorithm = Descent(Implicit(CG(max_iter=20)), lr=0.05, inner_steps=5, warmup=50)
    found = tune(RIDGE, algorithm, 3000, optimizer=RULE, **ridge_options())
    assert found.val is not None
    assert found.val["loss"] == pytest.approx(validation_loss(optimal_penalty()), rel=1e-4)


def test_one_penalty_for_each_weight_beats_one_for_all() -> None:
    found = tune(RIDGE, NESTED, Budget(outer_steps=40), optimizer=RULE, **ridge_options((8,)))
    assert found.val is not None
    assert found.val["loss"] < validation_loss(optimal_penalty()) - 1e-3


def test_unrolled_tunes_the_learning_rate_of_a_quadratic() -> None:
    """f = w²/2 from w = 1: one step with rate η gives F = (1 − η)²/2, best at η = 1."""

    def loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        return 0.5 * params["w"] ** 2

    found = tune(
        Problem(loss, loss),
        Descent(Unrolled(SGD(lr=Hyper("lr")), steps=1), lr=0.1, restart=True),
        Budget(outer_steps=200),
        params={"w": torch.tensor(1.0, dtype=torch.float64, requires_grad=True)},
        space=Space(lr=Grad(0.1, low=0.0)),
    )
    assert float(found.hparams["lr"]) == pytest.approx(1.0, abs=1e-3)


def test_simplex_weights_find_the_clean_source() -> None:
    clean, x = torch.tensor([1.0, -1.0]).double(), torch.randn(50, 2).double()
    sources = [(x, x @ clean), (x, torch.randn(50).double() * 3), (x, -(x @ clean))]

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        errors = torch.stack([(x @ params["w"] - y).square().mean() for x, y in sources])
        return (hparams["mix"] * errors).sum()

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        return (params["w"] - clean).square().sum()

    found = tune(
        Problem(inner, outer),
        Descent(Implicit(CG()), lr=0.2, inner_steps=20),
        Budget(outer_steps=150),
        params={"w": torch.zeros(2, dtype=torch.float64, requires_grad=True)},
        space=Space(mix=Grad([0.3, 0.3, 0.4], scale="simplex", shape=(3,))),
        optimizer=SGD(lr=0.1),
    )
    assert int(found.hparams["mix"].argmax()) == 0
    assert float(found.hparams["mix"][0]) > 0.9
    assert float(found.hparams["mix"].sum()) == pytest.approx(1.0)


def test_a_plain_tree_of_hyperparameters_moves_without_bounds() -> None:
    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        return (params["w"] - hparams["target"]["inside"]).square().sum()

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        return (params["w"] - 3).square().sum()

    found = tune(
        Problem(inner, outer),
        Descent(Implicit(), lr=0.3, inner_steps=30),
        Budget(outer_steps=150),
        params={"w": torch.zeros(2, dtype=torch.float64, requires_grad=True)},
        hparams={"target": {"inside": torch.zeros(2, dtype=torch.float64)}},
        optimizer=SGD(lr=0.2),
    )
    assert torch.allclose(
        found.hparams["target__inside"], torch.full((2,), 3.0).double(), atol=1e-2
    )


@pytest.mark.parametrize("steps", [17, 100])
def test_the_budget_is_never_exceeded(steps: int) -> None:
    algorithm = Descent(Implicit(), inner_steps=4, warmup=3)
    found = tune(RIDGE, algorithm, steps, optimizer=RULE, **ridge_options())
    assert found.cost.steps == 3 + 4 * ((steps - 3) // 4)
    assert found.status is RunStatus.MAX_ITER
    limited = Budget(equivalent_steps=500)
    assert (
        tune(RIDGE, algorithm, limited, optimizer=RULE, **ridge_options()).cost.equivalent_steps
        <= 500
    )


def test_a_test_split_is_only_looked_at_after_the_end() -> None:
    seen: list[str] = []
    options = ridge_options()
    test_batch = options["test_batch"]

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        seen.append("test" if batch is test_batch else "val")
        return RIDGE.outer_loss(params, hparams, batch)

    found = tune(Problem(RIDGE.inner_loss, outer), NESTED, Budget(outer_steps=5),
                 optimizer=RULE, evaluate_every=1, **options)  # fmt: skip
    assert seen.index("test") == len(seen) - 1
    assert found.test is not None


def test_early_stopping_returns_the_best_weights() -> None:
    calls = [0]

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        """Grows from the fourth evaluation of the validation loss on."""
        if not torch.is_grad_enabled():
            calls[0] += 1
        worse = max(0, calls[0] - 4) if not torch.is_grad_enabled() else 0
        return RIDGE.outer_loss(params, hparams, batch) + worse

    found = tune(
        Problem(RIDGE.inner_loss, outer),
        Descent(Implicit(), inner_steps=2),
        Budget(outer_steps=50),
        optimizer=RULE,
        evaluate_every=1,
        callbacks=[EarlyStopping(patience=3)],
        **ridge_options(),
    )
    assert found.status is RunStatus.EARLY_STOPPED
    assert found.best is not None
    assert found.best.outer_step < len(found.trace) == found.best.outer_step + 3
    losses = [record["val_loss"] for record in found.trace]
    assert found.best.loss == min(losses)
    weights = RIDGE.outer_loss(found.params, found.hparams, ridge_options()["outer_batch"])
    assert weights.item() == pytest.approx(found.best.loss)


def test_divergence_keeps_the_last_good_weights_and_says_why() -> None:
    calls = [0]

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        """NaN from the twentieth evaluation on."""
        calls[0] += 1
        return RIDGE.inner_loss(params, hparams, batch) * (math.nan if calls[0] >= 20 else 1.0)

    found = tune(
        Problem(inner, RIDGE.outer_loss),
        Descent(Implicit(), inner_steps=2),
        500,
        optimizer=RULE,
        **ridge_options(),
    )
    assert found.status is RunStatus.DIVERGED
    assert "inner_loss is nan" in found.reason
    assert bool(torch.isfinite(found.params["w"]).all())
    assert len(found.trace) > 0


def test_same_seed_same_numbers() -> None:
    def batch(t: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(TRAIN[0]), (6,))
        return TRAIN[0][rows], TRAIN[1][rows]

    def run(seed: int) -> list[Any]:
        options = ridge_options(inner_batch=batch)
        found = tune(RIDGE, Descent(Implicit()), 40, optimizer=RULE, seed=seed, **options)
        return [record["outer_loss"] for record in found.trace]

    before = torch.get_rng_state()
    assert run(1) == run(1)
    assert run(1) != run(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"optimizer": None}, ValueError, "optimizer: a bare Problem needs an update rule"),
        ({"params": None}, ValueError, "params: a bare Problem needs initial weights"),
        ({"budget": 0}, ValueError, "steps must be positive, but got 0"),
        ({"budget": 1, "algorithm": Descent(inner_steps=5)}, ValueError, "do not cover one outer"),
        ({"evaluate_every": 0}, ValueError, "evaluate_every must be at least 1, but got 0"),
        ({"subject": 3}, TypeError, "subject must be a learner .* but got int"),
        ({"space": None}, ValueError, "give the hyperparameters"),
        ({"space": Space(a=Grad(1.0), penalty=Grad(1.0))}, ValueError, r"hparams\['a'\]"),
        ({"hparams": {"penalty": -1.0}}, ValueError, "penalty"),
        ({"algorithm": Descent(lr={"x": 1.0})}, ValueError, r"lr must name each of \['penalty'\]"),
        ({"checkpoint": "/proc/none/x.pt"}, OSError, "checkpoint: cannot write"),
        ({"resume": "no-such-file.pt"}, FileNotFoundError, "no-such-file"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"subject": RIDGE, "algorithm": Descent(), "budget": 20, "optimizer": RULE}
    arguments |= {**ridge_options(), **changes}
    with pytest.raises(error, match=message):
        tune(**arguments)


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"lr": math.nan}, {"inner_steps": -1}, {"warmup": -1}, {"clip": 0.0}],
)
def test_bad_descent_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Descent: {next(iter(settings))}"):
        Descent(**settings)


def test_a_file_that_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_text("not a checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        tune(RIDGE, Descent(), 20, optimizer=RULE, resume=path, **ridge_options())
