"""A sweep of Ray Tune in a database reads like a study's own trials."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from adapters import registry, tasks
from bilevel import Descent
from hypergrad import Unrolled
from studies import MismatchError, Study
from studies.record import TrialRecord
from tests.studies.console import console
from tests.studies.trials import Behaving, Walker

pytest.importorskip("ray")
from ray.tune.schedulers import ASHAScheduler
from ray.tune.utils import flatten_dict

from studies.ray import StudySearcher, as_trainable, tuner

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("default")]
optuna.logging.set_verbosity(optuna.logging.WARNING)
TASK = tasks.get("digits", noise=0.2, n_train=100)
SPACE = (
    registry.get("network")
    .space.own(lr="sampler", momentum="grad")
    .fix(width=16, depth=1, activation="relu", optimizer="sgd")
)
ALGORITHM = Descent(Unrolled(steps=5), lr=0.1)


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH"
    monkeypatch.setattr(where, str(tmp_path / "results"))


def told(trainable: Any, searcher: StudySearcher, reports: int) -> TrialRecord:
    """One trial with the calls that Tune makes, without a runtime."""
    trial = trainable(searcher.suggest("t0"))
    for _ in range(reports):
        last = flatten_dict(trial.train())
        if not last["done"]:
            searcher.on_trial_result("t0", last)
    searcher.on_trial_complete("t0", {**last, "done": True})
    return TrialRecord.of(searcher.study.trials[0])


def test_a_trial_that_was_stopped_has_seed_and_status() -> None:
    asha = ASHAScheduler(max_t=8)
    searcher = StudySearcher(SPACE, "loss", "min", scheduler=asha, number_trials=True)
    trainable = as_trainable("network", TASK, SPACE, ALGORITHM, budget=40, steps_per_report=2)
    trial = trainable(searcher.suggest("t0"))
    last = flatten_dict(trial.train())
    searcher.on_trial_complete("t0", {**last, "done": True})
    record = TrialRecord.of(searcher.study.trials[0])
    assert record.state == "pruned"
    assert record.status == "stopped by the scheduler at iteration 1"
    assert record.seed == trial._own_seed
    assert (record.cost.steps, record.metrics["val/loss"]) == (10, last["loss"])
    assert set(record.hparams) == set(SPACE.defaults())


def test_a_trial_that_failed_has_its_reason_and_its_cost() -> None:
    space = Behaving.space.fix(how="nan", mark="none", pace=0.0)
    searcher = StudySearcher(space, "loss", "min", number_trials=True)
    trainable = as_trainable(Behaving, TASK, space, budget=10, steps_per_report=4)
    record = told(trainable, searcher, reports=2)
    assert record.state == "failed"
    assert record.failure is not None
    assert record.failure.kind == "not finite"
    assert record.seed is not None
    assert record.cost.steps == 8  # of the report whose number it was


def test_a_sweep_is_of_one_learner_and_one_task(tmp_path: Path) -> None:
    def prepared(learner: Any, space: Any) -> StudySearcher:
        searcher = StudySearcher(SPACE, "loss", "min", storage=tmp_path / "s.db", study_name="s")
        tuner(
            as_trainable(learner, TASK, space, budget=4),
            searcher,
            trials=1,
            workers=1,
            out=tmp_path,
        )
        return searcher

    plain = SPACE.own(**dict.fromkeys(SPACE.grad, "sampler"))
    early = StudySearcher(SPACE, "loss", "min", storage=tmp_path / "s.db", study_name="s")
    assert early.study.user_attrs.keys() == {"space"}  # made before anybody said of what it is
    attributes = prepared("network", plain).study.user_attrs
    assert (attributes["learner"], attributes["task"]) == ("network", "digits")
    with pytest.raises(MismatchError, match="learner: 'network' before, 'walker' now"):
        _ = prepared(Walker, Walker.space).study
    with pytest.raises(MismatchError, match="learner: 'network' before, 'walker' now"):
        early.prepare(None, as_trainable(Walker, TASK, budget=4).setting)


@pytest.mark.slow
def test_commands_show_the_same_fields(tmp_path: Path, ray_cluster: None) -> None:
    trainable = as_trainable("network", TASK, SPACE, ALGORITHM, budget=40, steps_per_report=2)
    searcher = StudySearcher(SPACE, "loss", "min", storage=tmp_path / "tune.db", study_name="s")
    tuner(trainable, searcher, trials=3, workers=1, out=tmp_path / "tune").fit()
    Study(
        "s", "network", TASK, tmp_path / "own.db", space=SPACE, algorithm=ALGORITHM, sampler="tpe"
    ).run(3, 40, rungs=4, scheduler="fifo")

    def read(*command: str) -> list[Any]:
        found = []
        for database in ("tune.db", "own.db"):
            ended = console("study", command[0], database, *command[1:], "--json", cwd=tmp_path)
            assert ended.code in (0, 1), ended.err  # 1: a study without a trial that is complete
            found.append(json.loads(ended.out))
        return found

    for command in (("show", "0"), ("best",)):
        swept, own = read(*command)
        assert swept["state"] == own["state"] == "complete"
        assert swept["status"] == own["status"] == "max_iter"
        assert isinstance(swept["seed"], int)
        assert swept["cost"]["steps"] == own["cost"]["steps"] == 40
        for name in ("hparams", "metrics", "rungs", "params"):
            assert set(swept[name]) == set(own[name]), name
        # Tune keeps schedules in its checkpoints; a sweep's values are those of its last weights.
        apart = {"artifacts", "versions", "number", "at"}
        assert {n for n, v in own.items() if v} - apart <= {n for n, v in swept.items() if v}
    swept, own = read("status")
    assert swept["complete"] == own["complete"] == 3
    assert swept["equivalent_steps"] == own["equivalent_steps"] > 0
    ended = console("study", "report", "tune.db", "--to", "report", cwd=tmp_path)
    assert ended.code == 0, ended.err
    (page,) = (tmp_path / "report").glob("*.html")
    assert "max_iter" in console("study", "show", "tune.db", "0", cwd=tmp_path).out
    assert "momentum" in page.read_text()
    assert "s: network on digits" in console("study", "status", "tune.db", cwd=tmp_path).out
    compared = console("study", "compare", "tune.db", "own.db", "--json", cwd=tmp_path)
    rows = json.loads(compared.out)["studies"]
    assert [(row["learner"], row["task"]) for row in rows] == [("network", "digits")] * 2
