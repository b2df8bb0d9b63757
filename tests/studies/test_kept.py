"""What comes out of a trial: the weights and values of its best rung, or the last ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from adapters import tasks
from benchmarks.studies.ridge import Closed, regression, ridge
from bilevel import Budget, Descent
from bilevel.metrics import Metrics, RunStatus
from studies import MismatchError, Study
from studies.commands.look import final_values
from studies.events import Event, Rung
from studies.views.stored import StoredStudy
from tests.studies.test_study import study
from tests.studies.trials import Walker

optuna.logging.set_verbosity(optuna.logging.WARNING)
TASK = tasks.get("digits", n_train=100)


class Scored(Walker):
    """A random walk with a second metric, which a constraint can bound."""

    def evaluate(self, split: str) -> Metrics:
        """The square of the place, and the place."""
        return Metrics({"loss": float(self.at**2), "at": float(self.at)})


def walk(folder: Path, name: str, **options: Any) -> Study:
    folder.mkdir(exist_ok=True)
    space = Scored.space.fix(pace=0.0)
    path = folder / f"{name}.db"
    return Study(name, Scored, TASK, path, space=space, sampler="random", **options)


def test_the_best_rung_of_plain_training_comes_out(tmp_path: Path) -> None:
    found = walk(tmp_path, "w").run(6, 30)
    for record in found.trials:
        assert record.value == min(record.rungs.values()) == record.metrics["val/loss"]
        best = min(record.rungs, key=lambda rung: record.rungs[rung])
        assert record.at == (None if best == 10 else 3 * best)
        assert record.cost.steps == 30  # all of the work counts
    assert found.trained().evaluate("val")["loss"] == found.best.value
    last = walk(tmp_path, "l").run(6, 30, keep="last")
    for kept, record in zip(found.trials, last.trials, strict=True):
        assert kept.rungs == record.rungs
        assert record.value == record.rungs[10]
        assert record.at is None
    assert last.trained().evaluate("val")["loss"] == last.best.value


def test_the_best_rung_when_maximizing(tmp_path: Path) -> None:
    found = walk(tmp_path, "m", direction="maximize").run(4, 30)
    assert [r.value for r in found.trials] == [max(r.rungs.values()) for r in found.trials]


def test_a_feasible_rung_comes_before_a_better_one(tmp_path: Path) -> None:
    found = walk(tmp_path, "c", constraints={"at": -1.0}).run(6, 30)
    free = walk(tmp_path, "f").run(6, 30)
    moved = 0
    for bound, open_ in zip(found.trials, free.trials, strict=True):
        assert bound.rungs == open_.rungs
        assert (bound.value or 0.0) >= (open_.value or 0.0)
        moved += bound.value != open_.value
        if bound.feasible:
            assert bound.metrics["val/at"] <= -1.0
    assert moved > 0


def test_the_best_rung_of_a_tuned_trial_comes_out(tmp_path: Path) -> None:
    found = study(tmp_path).run(3, 40, scheduler="fifo")
    records = found.trials
    assert any(record.at is not None for record in records)
    for record in records:
        assert record.value == min(record.rungs.values())
    learner = found.trained()
    assert learner.evaluate("val")["loss"] == pytest.approx(found.best.value, rel=1e-6)
    assert learner.evaluate("test")["loss"] == pytest.approx(found.best.metrics["test/loss"])
    schedule, best = found.schedule(), found.best
    assert schedule is not None
    if best.at is not None:  # hyperparameters are those of then, not of the end
        row = list(schedule["step"]).index(best.at) - 1
        assert best.hparams["lr"] == pytest.approx(float(schedule["lr"][row]), rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"executor": "pool", "workers": 1}])
def test_an_interrupted_trial_remembers_its_best_rung(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = walk(tmp_path / "a", "w").run(2, 30)

    def interrupt(event: Event) -> None:
        if isinstance(event, Rung) and event.rung == 8:
            raise RuntimeError("out of power")

    broken = walk(tmp_path / "b", "w")
    with pytest.raises(RuntimeError, match="out of power"):
        broken.run(2, 30, on_event=interrupt, checkpoint_seconds=0.0, **options)
    again = walk(tmp_path / "b", "w").run(2, 30, **options)
    assert [(r.value, r.at, r.metrics) for r in again.trials] == [
        (r.value, r.at, r.metrics) for r in whole.trials
    ]


def test_several_objectives_keep_the_last(tmp_path: Path) -> None:
    found = walk(tmp_path, "s", metric=["loss", "at"]).run(3, 30)
    assert all(record.at is None for record in found.trials)


def test_another_choice_is_another_study(tmp_path: Path) -> None:
    walk(tmp_path, "w").run(1, 30)
    with pytest.raises(MismatchError, match="keep"):
        walk(tmp_path, "w").run(2, 30, keep="last")
    with pytest.raises(ValueError, match="keep must be 'best' or 'last', but got 'first'"):
        walk(tmp_path, "x").run(1, 30, keep="first")  # type: ignore[arg-type]


def test_nobody_starts_from_values_that_made_it_worse(tmp_path: Path) -> None:
    found = study(tmp_path).run(6, 40, scheduler="fifo")
    kept = {record.number: found.files.hparams(record.number).exists() for record in found.trials}
    for record in found.trials:
        trace = found.artifact("trace.json", record.number)
        assert trace is not None
        if record.start is not None:
            assert kept[record.start]
            better = sorted(r.value or 0.0 for r in found.trials[: record.number] if kept[r.number])
            assert (found.trials[record.start].value or 0.0) in better[: (len(better) + 1) // 2]


def test_long_tensors_are_read_as_of_the_best_rung(tmp_path: Path) -> None:
    found = Study("r", ridge(20), regression(20, 0), tmp_path / "r.db",
                  algorithm=Descent(Closed(), lr=3.0))  # fmt: skip
    best = found.run(1, Budget(equivalent_steps=80), scheduler="fifo").best
    assert best.at is not None  # the step is so long that the end is not the best
    assert isinstance(best.hparams["penalty"], dict)  # quantiles of twenty
    learner: Any = found.trained()
    read = final_values(StoredStudy(tmp_path / "r.db"), best)["penalty"]
    assert read == pytest.approx(learner.hparams["penalty"].tolist(), rel=1e-6)


class Breaking(Walker):
    """Is lost at its last step, which is no rung."""

    def step(self) -> Metrics:
        """Walk, and stop at the eleventh step with no number."""
        found = super().step()
        if self.steps < 11:
            return found
        self.at = self.at * float("nan")
        return Metrics({"loss": 1.0}, status=RunStatus.CONVERGED, cost=found.cost)


def test_a_trial_that_ends_without_a_number_fails_whatever_came_before(tmp_path: Path) -> None:
    space = Breaking.space.fix(pace=0.0)
    found = Study("b", Breaking, TASK, tmp_path / "b.db", space=space, sampler="random")
    (record,) = found.run(1, 20, rungs=5).trials
    assert set(record.rungs) == {1, 2}
    assert str(record.failure) == "not finite: val loss is nan after 11 steps"
    assert record.cost.steps == 11
