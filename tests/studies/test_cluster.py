"""The same study on Ray actors: the numbers of this process; actors and nodes that die."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest

from adapters import tasks
from bilevel.checkpoint import load
from studies import Study
from studies.events import Event, Retried, Rung
from studies.executors.base import ExecutorError
from studies.executors.config import RayActors
from tests.studies.test_study import numbers, study
from tests.studies.trials import Behaving, Walker

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]
optuna.logging.set_verbosity(optuna.logging.WARNING)
ROOT = Path(__file__).parents[2]
TASK = tasks.get("digits", n_train=100)


def walk(name: Path, pace: float = 0.0) -> Study:
    space = Walker.space.fix(pace=pace)
    return Study("w", Walker, TASK, name, sampler="random", space=space)


def actors() -> list[int]:
    """Processes below this one that Ray has named after a worker of ours."""
    found, above = [], [os.getpid()]
    while above:
        pid = above.pop()
        try:
            below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            title = Path(f"/proc/{pid}/cmdline").read_bytes()
        except FileNotFoundError:
            continue
        above += map(int, below)
        if title.startswith(b"ray::_Remote"):
            found.append(pid)
    return found


def test_one_actor_gives_the_numbers_of_this_process(tmp_path: Path, ray_cluster: None) -> None:
    here = study(tmp_path / "a").run(4, 40)
    there = study(tmp_path / "b").run(4, 40, executor="ray")
    assert numbers(here) == numbers(there)
    assert {r.state for r in here.trials} == {"complete", "pruned"}


def test_a_study_goes_on_on_two_actors(tmp_path: Path, ray_cluster: None) -> None:
    walk(tmp_path / "w.db").run(2, 20)
    found = walk(tmp_path / "w.db").run(8, 20, executor="ray", workers=2)
    alone = walk(tmp_path / "v.db").run(8, 20)
    assert [r.number for r in found.trials] == list(range(8))
    assert [r.value for r in found.trials] == [r.value for r in alone.trials]


def test_a_trial_of_a_killed_actor_goes_on(tmp_path: Path, ray_cluster: None) -> None:
    events: list[Event] = []
    stored: list[int] = []

    def hear(event: Event) -> None:
        events.append(event)
        if isinstance(event, Rung) and (event.number, event.rung) == (0, 3):
            (pid,) = actors()
            os.kill(pid, signal.SIGKILL)
        if isinstance(event, Retried):
            (file,) = tmp_path.rglob("trials/0.pt")
            stored.append(load(file)["learner"]["steps"])

    found = walk(tmp_path / "w.db", 0.05).run(
        2, 20, executor="ray", checkpoint_seconds=0.0, on_event=hear
    )
    alone = walk(tmp_path / "v.db").run(2, 20)
    assert [r.value for r in found.trials] == [r.value for r in alone.trials]
    assert [r.rungs for r in found.trials] == [r.rungs for r in alone.trials]
    assert [e.number for e in events if isinstance(e, Retried)] == [0]
    assert stored in ([6], [7])  # at its third rung, or a step later


def test_a_trial_that_hangs_is_ended_at_its_limit(tmp_path: Path, ray_cluster: None) -> None:
    space = Behaving.space.fix(how="hang", mark="none", pace=0.0)
    found = Study("b", Behaving, TASK, tmp_path / "b.db", space=space, sampler="random")
    found.run(1, 10, executor="ray", trial_seconds=1.0)
    assert [str(r.failure) for r in found.trials] == ["timeout: over its limit of 1 s"]


@pytest.mark.parametrize("resources", [{"CPU": 64.0}, {"CPU": 1.0, "GPU": 3.0}, {"rack": 1.0}])
def test_what_no_node_has_is_refused(
    resources: dict[str, float], tmp_path: Path, ray_cluster: None
) -> None:
    with pytest.raises(ExecutorError, match="resources: no node has"):
        walk(tmp_path / "w.db").run(1, 5, executor=RayActors(1, resources=resources))


LOSS = """
import sys
from pathlib import Path
from ray.cluster_utils import Cluster
from studies.events import Finished, Retried, Rung, Started
from studies.executors.config import RayActors
from tests.studies.test_cluster import walk

def main():
    out = Path(sys.argv[1])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    cluster.connect()
    live, retried, removed = set(), [], False

    def hear(event):
        nonlocal removed
        if isinstance(event, Started):
            live.add(event.number)
        if isinstance(event, Finished):
            live.remove(event.record.number)
        if isinstance(event, Retried):
            retried.append(event.number)
        if isinstance(event, Rung) and event.rung >= 3 and len(live) == 2 and not removed:
            removed = True  # each node has a trial
            cluster.remove_node(second, allow_graceful=False)

    found = walk(out / "w.db", 0.1).run(
        6, 20, executor=RayActors(2), checkpoint_seconds=0.0, on_event=hear
    )
    assert removed
    print("states", sorted({r.state for r in found.trials}), "retried", len(retried))
    import ray
    ray.shutdown()
    cluster.shutdown()

if __name__ == "__main__":
    main()
"""


def test_a_node_is_lost_and_no_trial_is(tmp_path: Path) -> None:
    program = tmp_path / "loss.py"
    program.write_text(LOSS)
    env: dict[str, Any] = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, str(program), str(tmp_path)],
        env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert "states ['complete'] retried 1" in ran.stdout.splitlines()  # among what Ray prints
    alone = walk(tmp_path / "v.db").run(6, 20)
    assert [r.value for r in walk(tmp_path / "w.db", 0.1).trials] == [r.value for r in alone.trials]
