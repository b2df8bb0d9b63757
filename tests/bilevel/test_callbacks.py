"""Callbacks: what they see and when, early stopping, the progress bar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Budget, Callback, Descent, EarlyStopping, RunStatus, tune
from bilevel.result import Result
from bilevel.run import Run
from hypergrad import CG, Implicit, Problem
from tests.bilevel.problems import RIDGE, ridge_options

ALGORITHM = Descent(Implicit(CG()), inner_steps=2)


def scripted(losses: Sequence[float]) -> Problem:
    """Ridge whose k-th full validation reads losses[k], whatever the weights are."""
    left = iter(losses)

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        value = RIDGE.outer_loss(params, hparams, batch)
        return value if torch.is_grad_enabled() else value * 0 + next(left, losses[-1])

    return Problem(RIDGE.inner_loss, outer)


def stop(losses: Sequence[float], patience: int, evaluate_every: int = 1, **options: Any) -> Result:
    return tune(
        scripted(losses),
        ALGORITHM,
        Budget(outer_steps=30),
        evaluate_every=evaluate_every,
        callbacks=[EarlyStopping(patience, **options)],
        **ridge_options(),
    )


class Watch(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_start(self, run: Run) -> None:
        self.seen.append(("start", len(run.trace)))

    def on_outer_step(self, run: Run) -> None:
        self.seen.append((run.outer_steps, run.cost.steps, run.trace[-1]["steps"]))

    def on_end(self, run: Run) -> None:
        self.seen.append(("end", run.status))


def test_order_of_calls() -> None:
    watch = Watch()
    tune(RIDGE, ALGORITHM, 6, callbacks=[watch], **ridge_options())
    steps = [(1, 2, 2), (2, 4, 4), (3, 6, 6)]
    assert watch.seen == [("start", 0), *steps, ("end", RunStatus.MAX_ITER)]


def test_a_callback_may_end_the_run() -> None:
    class Prune(Callback):
        def on_outer_step(self, run: Run) -> None:
            if run.outer_steps == 4:
                run.stop(RunStatus.PRUNED, "too slow")

    found = tune(RIDGE, ALGORITHM, 100, callbacks=[Prune()], **ridge_options())
    assert (found.status, found.reason, len(found.trace)) == (RunStatus.PRUNED, "too slow", 4)


@pytest.mark.parametrize(
    ("losses", "patience", "steps", "best"),
    [
        ([5, 4, 3, 3, 3, 1], 2, 5, 3),
        ([5, 4, 3, 3, 2, 2, 2, 2], 2, 7, 5),
        ([5, 6, 7], 1, 2, 1),
        ([5, 4.5, 4.2, 4.1, 3.0], 2, 3, 3),  # decreases below min_delta = 1 do not count
    ],
)
def test_patience(losses: list[float], patience: int, steps: int, best: int) -> None:
    found = stop(losses, patience, min_delta=1.0 if 4.5 in losses else 0.0)
    assert found.status is RunStatus.EARLY_STOPPED
    assert len(found.trace) == steps
    assert found.best is not None
    assert (found.best.outer_step, found.best.loss) == (best, losses[best - 1])


def test_patience_counts_looks_not_steps() -> None:
    found = stop([5, 4, 4, 4], 2, evaluate_every=3)
    assert len(found.trace) == 12
    assert found.reason == "val_loss not below 4 in 2 looks"


def test_the_best_weights_are_returned_with_their_hyperparameters() -> None:
    found = stop([5, 4, 3, 6, 6, 6], 3)
    short = tune(RIDGE, ALGORITHM, Budget(outer_steps=3), **ridge_options())
    assert torch.equal(found.params["w"], short.params["w"])
    assert torch.equal(found.hparams["penalty"], short.hparams["penalty"])
    assert len(found.trace) == 6


def test_without_early_stopping_the_last_weights_are_returned() -> None:
    options = {**ridge_options(), "evaluate_every": 1}
    found = tune(scripted([5, 4, 3, 6, 6, 6]), ALGORITHM, Budget(outer_steps=6), **options)
    plain = tune(RIDGE, ALGORITHM, Budget(outer_steps=6), **ridge_options())
    assert torch.equal(found.params["w"], plain.params["w"])
    assert found.best is not None
    assert found.best.outer_step == 3


def test_without_validation_the_outer_loss_of_the_step_decides() -> None:
    frozen = Descent(Implicit(CG()), inner_steps=0, lr=0.0)  # nothing moves
    found = tune(RIDGE, frozen, Budget(outer_steps=9), callbacks=[EarlyStopping(3)],
                 **ridge_options())  # fmt: skip
    assert len(found.trace) == 4
    assert found.best is None
    assert found.reason.startswith("outer_loss not below")


def test_one_object_may_watch_two_runs() -> None:
    stopping = EarlyStopping(2)
    options = {**ridge_options(), "evaluate_every": 1, "callbacks": [stopping]}
    for losses in ([1, 2, 3], [9, 8, 8, 8]):
        found = tune(scripted(losses), ALGORITHM, 100, **options)
        assert len(found.trace) == len(losses)


@pytest.mark.parametrize("arguments", [{"patience": 0}, {"patience": 1, "min_delta": -1.0}])
def test_bad_early_stopping(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"EarlyStopping: {list(arguments)[-1]} must be"):
        EarlyStopping(**arguments)


def test_progress_is_on_standard_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(RIDGE, ALGORITHM, 6, progress=True, **ridge_options())
    assert capsys.readouterr() == ("", "")  # a log file is no place for a bar
    monkeypatch.setenv("FORCE_COLOR", "1")
    tune(RIDGE, ALGORITHM, 6, progress=True, **ridge_options())
    out, err = capsys.readouterr()
    assert out == ""
    assert "outer step 3" in err
