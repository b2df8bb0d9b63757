"""Schedulers of Ray Tune, a killed driver and a lost node, on small real sweeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import optuna
import pytest

from adapters import registry, tasks
from bilevel import Descent
from bilevel.checkpoint import load
from bilevel.schedule import Schedule
from hypergrad import Unrolled

pytest.importorskip("ray")
from ray.tune.schedulers import (
    ASHAScheduler,
    HyperBandScheduler,
    PopulationBasedTraining,
)
from ray.tune.schedulers.pb2 import PB2

from studies.ray import (
    StudySearcher,
    Within,
    as_trainable,
    bounds,
    mutations,
    policy_schedules,
    tuner,
)
from tests.studies.test_ray_trainable import same

pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]
ROOT = Path(__file__).parents[2]
SPACE = (
    registry.get("network")
    .space.own(lr="sampler", momentum="grad")
    .fix(width=16, depth=1, activation="relu", optimizer="sgd")
)


def make() -> Any:
    task = tasks.get("digits", noise=0.2, n_train=100)
    return as_trainable("network", task, SPACE, Descent(Unrolled(steps=5), lr=0.1), budget=40)


@pytest.mark.parametrize(
    "scheduler",
    [
        ASHAScheduler(max_t=8, grace_period=1, reduction_factor=2),
        HyperBandScheduler(max_t=8, reduction_factor=2),
    ],
    ids=["asha", "hyperband"],
)
def test_halving_schedulers(scheduler: Any, tmp_path: Path, ray_cluster: None) -> None:
    found = StudySearcher(SPACE, "loss", "min")
    results = tuner(make(), found, trials=8, workers=2, out=tmp_path, scheduler=scheduler).fit()
    assert results.num_errors == 0
    states = [trial.state.name for trial in found.study.trials]
    assert len(states) == 8
    assert set(states) == {"COMPLETE", "PRUNED"}


def watched(folder: Path) -> Any:
    """A trainable that says of every checkpoint that it takes what became of it."""
    parent = make()

    class Watched(parent):  # type: ignore[misc]
        def load_checkpoint(self, checkpoint: Any) -> None:
            saved = load(Path(checkpoint) / "state.pt")
            parent.load_checkpoint(self, checkpoint)
            taken = self._stored()
            constants = [
                s["progress"]["run"]["inner"]["run"].pop("constants") for s in (saved, taken)
            ]
            said = {
                "exploit": saved["seed"] != self._own_seed,
                "same": same(saved, taken),
                "config": sorted(self.config),
                "changed": [n for n in constants[0] if constants[0][n] != constants[1][n]],
                "keys": sorted(saved["progress"]["run"]),
            }
            (folder / f"{uuid.uuid4().hex}.json").write_text(json.dumps(said))

    return Watched


@pytest.mark.parametrize("kind", ["pbt", "pb2"])
def test_population_based_training(kind: str, tmp_path: Path, ray_cluster: None) -> None:
    common: dict[str, Any] = {
        "time_attr": "training_iteration",
        "perturbation_interval": 2,
        "custom_explore_fn": Within(SPACE),
        "synch": True,  # otherwise it depends on the machine whether a trial meets a better one
    }
    if kind == "pbt":
        scheduler = PopulationBasedTraining(hyperparam_mutations=mutations(SPACE), **common)
    else:
        scheduler = PB2(hyperparam_bounds=bounds(SPACE), **common)
    (tmp_path / "loads").mkdir()
    results = tuner(
        watched(tmp_path / "loads"),
        trials=4, workers=2, out=tmp_path, scheduler=scheduler, checkpoint_every=2,
    ).fit()  # fmt: skip
    assert results.num_errors == 0
    assert all(r.metrics["steps"] == 40 for r in results)
    # An exploit takes all of the donor but what the sampler owns, and only that is explored.
    loads = [json.loads(path.read_text()) for path in (tmp_path / "loads").iterdir()]
    exploits = [said for said in loads if said["exploit"]]
    assert exploits
    assert all(said["same"] and said["config"] == ["lr"] for said in loads)
    assert {name for said in exploits for name in said["changed"]} == {"lr"}
    assert {"hparams", "inner", "algorithm"} <= set(exploits[0]["keys"])
    # A policy ends with the values that its trial had at the end, and is stored as a schedule.
    schedules = policy_schedules(tmp_path / "sweep", steps_per_report=5)
    assert schedules
    last = {r.metrics["trial_id"]: r.config["lr"] for r in results}
    for trial, schedule in schedules.items():
        assert set(schedule.names) == {"lr"}
        assert float(schedule["lr"][-1]) == pytest.approx(last[trial])
        stored = Schedule.from_json((tmp_path / "sweep" / f"schedule_{trial}.json").read_text())
        assert stored["lr"].tolist() == schedule["lr"].tolist()


SWEEP = """
import sys, time, os
os.environ["RAY_AUTH_MODE"] = "token"
import ray
from ray import tune
from bilevel import Float, Space
from studies.ray import StudySearcher, tuner

def slow(config):
    for i in range(4):
        time.sleep(0.3)
        tune.report({"loss": config["x"] ** 2})

out, command = sys.argv[1:]
ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
if command == "run":
    space = Space(x=Float(-1.0, 1.0))
    searcher = StudySearcher(space, "loss", "min", storage=out + "/s.db", study_name="s")
    tuner(slow, searcher, trials=8, workers=2, out=out).fit()
else:
    for variable in ("TUNE_DISABLE_STRICT_METRIC_CHECKING", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"):
        os.environ[variable] = "1"
    print(len(tune.Tuner.restore(out + "/sweep", slow).fit()))
"""


def test_a_killed_driver_loses_and_doubles_nothing(tmp_path: Path) -> None:
    program = tmp_path / "sweep.py"
    program.write_text(SWEEP)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(program), str(tmp_path)]
    url = f"sqlite:///{tmp_path / 's.db'}"
    with subprocess.Popen([*command, "run"], env=env, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            time.sleep(0.2)
            if (tmp_path / "s.db").exists():
                names = optuna.get_all_study_names(url)
                done = [
                    t
                    for name in names
                    for t in optuna.load_study(study_name=name, storage=url).trials
                    if t.state.is_finished()
                ]
                if len(done) >= 3:
                    break
        os.killpg(process.pid, signal.SIGKILL)
    before = {t.number: (t.params, t.value) for t in done}
    again = subprocess.run(
        [*command, "restore"], env=env, capture_output=True, text=True, check=True, timeout=180
    )
    assert again.stdout.strip().splitlines()[-1] == "8"
    trials = optuna.load_study(study_name="s", storage=url).trials
    assert [t.state.name for t in trials] == ["COMPLETE"] * 8
    assert len({t.params["x"] for t in trials}) == 8
    assert all((trials[n].params, trials[n].value) == old for n, old in before.items())
