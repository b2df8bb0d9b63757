"""The searcher in real sweeps of Ray Tune: what OptunaSearch does right, and what it does not."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from bilevel import Choice, Float, Int, Space

pytest.importorskip("ray")
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from studies import MismatchError
from studies.ray import StudySearcher, tuner

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("default")]
SPACE = Space(
    x=Float(-1.0, 1.0),
    kind=Choice("a", "b"),
    n=Int(1, 4, when={"kind": "b"}),
)
X = {"x": FloatDistribution(-1.0, 1.0)}
DONE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL


def square(config: dict[str, Any]) -> None:
    tune.report({"loss": config["x"] ** 2})


def by_run(trial: Any) -> dict[str, Any]:
    trial.suggest_float("x", -1.0, 1.0)
    if trial.suggest_categorical("kind", ["a", "b"]) == "b":
        trial.suggest_int("n", 1, 4)
    return {"constant": 7}


def sweep(
    folder: Path, searcher: StudySearcher, function: Any = square, trials: int = 3, **options: Any
) -> Any:
    options = {"workers": 1, **options}
    return tuner(function, searcher, trials=trials, out=folder, **options).fit()


def states(searcher: StudySearcher) -> list[TrialState]:
    return [trial.state for trial in searcher.study.trials]


# Without a runtime: the calls that Tune makes.


def test_told_again_does_nothing() -> None:
    found = StudySearcher(X, "loss", "min")
    found.suggest("t0")
    found.on_trial_complete("t0", {"loss": 0.5, "finished": True})
    found.on_trial_complete("t0", {"loss": 9.0, "finished": True})
    found.on_trial_result("t0", {"loss": 9.0, "training_iteration": 4})
    assert [(t.state, t.value) for t in found.study.trials] == [(DONE, 0.5)]


@pytest.mark.parametrize("value", [math.nan, math.inf, "0.5x", None])
def test_what_is_no_finite_number_fails(value: Any) -> None:
    found = StudySearcher(X, "loss", "min")
    found.suggest("t0")
    found.on_trial_complete("t0", {"loss": value, "finished": True})
    (trial,) = found.study.trials
    assert trial.state is FAIL
    assert trial.user_attrs["failure"]["kind"] == "not finite"


def test_pruned_before_max_t_and_complete_at_it() -> None:
    asha = ASHAScheduler(max_t=9)
    found = StudySearcher(X, "loss", "min", scheduler=asha)
    for name, last in (("t0", 9), ("t1", 3)):
        found.suggest(name)
        for i in range(1, last):
            found.on_trial_result(name, {"loss": 1.0 / i, "training_iteration": i})
        found.on_trial_complete(name, {"loss": 1.0, "training_iteration": last, "done": True})
    assert states(found) == [DONE, PRUNED]
    assert found.study.trials[1].intermediate_values[3] == 1.0


def test_same_seed_same_points_also_after_a_break(tmp_path: Path) -> None:
    def ask(found: StudySearcher, count: range) -> list[Any]:
        asked = []
        for i in count:
            asked.append(found.suggest(f"t{i}"))
            found.on_trial_complete(f"t{i}", {"loss": asked[-1]["x"] ** 2, "finished": True})
        return asked

    whole = ask(StudySearcher(SPACE, "loss", "min", seed=4), range(14))
    first = StudySearcher(SPACE, "loss", "min", seed=4)
    head = ask(first, range(7))
    first.save(str(tmp_path / "state"))
    second = StudySearcher(SPACE, "loss", "min", seed=4)
    second.restore(str(tmp_path / "state"))
    assert head + ask(second, range(7, 14)) == whole


def test_a_trial_that_the_snapshot_forgot_is_asked_again(tmp_path: Path) -> None:
    first = StudySearcher(SPACE, "loss", "min", storage=tmp_path / "s.db", study_name="s")
    first.suggest("t0")
    first.save(str(tmp_path / "state"))
    late = first.suggest("t1")
    second = StudySearcher(SPACE, "loss", "min", storage=tmp_path / "s.db", study_name="s")
    second.restore(str(tmp_path / "state"))
    assert second.suggest("u1") == late
    assert len(second.study.trials) == 2


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="metric and mode must be"):
        StudySearcher(X, "loss", "minimum")
    with pytest.raises(ValueError, match="1 points, but got 2 rewards"):
        StudySearcher(X, points_to_evaluate=[{"x": 0.1}], evaluated_rewards=[1.0, 2.0])
    with pytest.raises(RuntimeError, match="needs a space, a metric and a mode"):
        StudySearcher(X).suggest("t0")
    _ = StudySearcher(X, "loss", "min", storage=tmp_path / "s.db", study_name="s").study
    with pytest.raises(MismatchError, match="direction"):
        _ = StudySearcher(X, "loss", "max", storage=tmp_path / "s.db", study_name="s").study
    outside = StudySearcher(
        X, "loss", "min", points_to_evaluate=[{"x": 3.0}], evaluated_rewards=[1.0]
    )
    with pytest.raises(ValueError, match=r"x=3.0 is outside"):
        _ = outside.study


# The 19 behaviors of OptunaSearch, in real sweeps: nine that it has, then ten that it has not.


def case_single(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min")
    results = sweep(folder, found)
    assert states(found) == [DONE] * 3
    assert results.get_best_result("loss", "min").metrics["loss"] == found.study.best_value


def two(config: dict[str, Any]) -> None:
    tune.report({"f": config["x"] ** 2, "g": (config["x"] - 1) ** 2})


def case_multi(folder: Path) -> None:
    found = StudySearcher(X, ["f", "g"], ["min", "min"])
    sweep(folder, found, two)
    assert states(found) == [DONE] * 3
    assert found.study.best_trials


def case_define_by_run(folder: Path) -> None:
    found = StudySearcher(by_run, "loss", "min")
    results = sweep(folder, found, trials=4)
    assert states(found) == [DONE] * 4
    assert all(r.config["constant"] == 7 for r in results)
    assert all(("n" in t.params) == (t.params["kind"] == "b") for t in found.study.trials)


def case_points(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min", points_to_evaluate=[{"x": 0.25}])
    sweep(folder, found)
    assert found.study.trials[0].params == {"x": 0.25}


def case_rewards(folder: Path) -> None:
    points: list[Any] = [{"x": 0.25}]
    found = StudySearcher(X, "loss", "min", points_to_evaluate=points, evaluated_rewards=[0.0625])
    sweep(folder, found)
    assert len(found.study.trials) == 4
    assert found.study.trials[0].value == 0.0625


def case_save(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min")
    sweep(folder, found)
    found.save(str(folder / "state"))
    again = StudySearcher(X, "loss", "min")
    again.restore(str(folder / "state"))
    assert [(t.params, t.value) for t in again.study.trials] == [
        (t.params, t.value) for t in found.study.trials
    ]


def case_seed(folder: Path) -> None:
    runs = []
    for name in ("a", "b"):
        found = StudySearcher(X, "loss", "min", seed=3)
        sweep(folder, found, name=name, trials=4)
        runs.append([t.params for t in found.study.trials])
    assert runs[0] == runs[1]


def raises(config: dict[str, Any]) -> None:
    tune.report({"loss": 1.0})
    raise RuntimeError("broken")


def case_error(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min")
    sweep(folder, found, raises, trials=1)
    assert states(found) == [FAIL]
    assert found.study.trials[0].user_attrs["failure"]["kind"] == "exception"


def case_tune_space(folder: Path) -> None:
    found = StudySearcher()
    domains = {"x": tune.uniform(-1.0, 1.0), "k": tune.choice([1, 2])}
    sweep(folder, found, param_space=domains, metric="loss")
    assert states(found) == [DONE] * 3
    assert set(found.study.trials[0].params) == {"x", "k"}


def nine(config: dict[str, Any]) -> None:
    for i in range(9):
        tune.report({"loss": config["x"] ** 2 + 1 / (i + 1)})
        time.sleep(0.02)


def case_asha(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min", seed=2)
    asha = ASHAScheduler(max_t=9, grace_period=1, reduction_factor=3)
    results = sweep(folder, found, nine, trials=9, workers=2, scheduler=asha)
    iterations = {r.metrics["trial_id"]: r.metrics["training_iteration"] for r in results}
    assert min(iterations.values()) < 9
    for trial in found.study.trials:
        reached = iterations[trial.user_attrs["ray_trial_id"]]
        assert trial.state is (DONE if reached == 9 else PRUNED)


def is_nan(config: dict[str, Any]) -> None:
    tune.report({"loss": math.nan})


def case_nan(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min")
    sweep(folder, found, is_nan, trials=2)
    assert states(found) == [FAIL] * 2


def case_local_space(folder: Path) -> None:
    top = 1.0
    found = StudySearcher(lambda trial: {"y": trial.suggest_float("x", -1, top)}, "loss", "min")
    sweep(folder, found)
    assert states(found) == [DONE] * 3
    assert tune.Tuner.restore(str(folder / "sweep"), square).get_results()


def case_rewards_multi(folder: Path) -> None:
    points: list[Any] = [{"x": 0.5}]
    found = StudySearcher(
        X, ["f", "g"], ["min", "min"], points_to_evaluate=points, evaluated_rewards=[[0.25, 0.25]]
    )
    sweep(folder, found, two)
    assert found.study.trials[0].values == [0.25, 0.25]
    assert states(found) == [DONE] * 4


def case_rewards_define_by_run(folder: Path) -> None:
    points: list[Any] = [{"x": 0.5, "kind": "b", "n": 2}]
    found = StudySearcher(
        by_run, "loss", "min", points_to_evaluate=points, evaluated_rewards=[0.25]
    )
    sweep(folder, found)
    assert found.study.trials[0].params == points[0]
    assert states(found) == [DONE] * 4


def forgets(config: dict[str, Any]) -> None:
    tune.report({"other": 1.0} if config["x"] == 0.25 else {"loss": 1.0, "other": 1.0})


def case_missing_metric(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min", points_to_evaluate=[{"x": 0.25}])
    sweep(folder, found, forgets)
    assert states(found) == [FAIL, DONE, DONE]
    assert "no metric 'loss'" in found.study.trials[0].user_attrs["failure"]["message"]


def case_own_name(folder: Path) -> None:
    for name in ("a", "b"):
        sweep(folder, StudySearcher(X, "loss", "min", storage=folder / "s.db"), name=name)
    stored = optuna.get_all_study_summaries(f"sqlite:///{folder / 's.db'}")
    assert sorted(s.n_trials for s in stored) == [3, 3]


def case_metric_of_tune_config(folder: Path) -> None:
    found = StudySearcher(X)
    sweep(folder, found, metric="loss", mode="max")
    assert found.study.direction.name == "MAXIMIZE"
    assert states(found) == [DONE] * 3


def annotated(config: dict[str, Any]) -> None:
    x = config["x"]
    tune.report({"loss": x**2, "constraint": {"size": x - 0.5}, "attr": {"note": "n"}})


def case_constraints(folder: Path) -> None:
    found = StudySearcher(X, "loss", "min")
    sweep(folder, found, annotated)
    for trial in found.study.trials:
        assert trial.constraints == pytest.approx({"size": trial.params["x"] - 0.5})
        assert trial.user_attrs["note"] == "n"


def case_restore(folder: Path) -> None:
    """The database is newer than Tune's snapshot: the state that aborts OptunaSearch."""
    found = StudySearcher(X, "loss", "min", storage=folder / "s.db", study_name="s")
    sweep(folder, found)
    # Tune has forgotten that the trials ended; the database has not.
    again = tune.Tuner.restore(str(folder / "sweep"), square, resume_unfinished=True)
    search = again._local_tuner._tune_config.search_alg
    search.restore_from_dir(str(folder / "sweep"))
    for trial in found.study.trials:
        search.on_trial_result(trial.user_attrs["ray_trial_id"], {"loss": 9.0})
        search.on_trial_complete(trial.user_attrs["ray_trial_id"], {"loss": 9.0, "finished": True})
    assert [t.value for t in search.study.trials] == [t.value for t in found.study.trials]
    assert len(again.fit()) == 3


CASES = {name: case for name, case in globals().items() if name.startswith("case_")}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, tmp_path: Path, ray_cluster: None) -> None:
    assert len(CASES) == 19
    CASES[name](tmp_path)
