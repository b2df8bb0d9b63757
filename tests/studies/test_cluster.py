"""The same study on Ray actors: the numbers of this process; actors that die."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from adapters import tasks
from bilevel.checkpoint import load
from studies import Study
from studies.events import Event, Retried, Rung
from studies.executors.base import ExecutorError
from studies.executors.config import RayActors
from studies.executors.ray_connect import daemon
from tests.studies.test_study import numbers, study
from tests.studies.trials import Behaving, Walker

pytest.importorskip("ray")
pytestmark = [
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
]
optuna.logging.set_verbosity(optuna.logging.WARNING)
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
            stored.append(load(file)["progress"]["learner"]["steps"])

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


def test_a_daemon_that_has_ended_is_refused() -> None:
    def listed(host: str, port: int) -> Any:
        node = {"NodeID": "a", "NodeManagerAddress": host, "NodeManagerPort": port}
        me = SimpleNamespace(get_node_id=lambda: "a")
        return SimpleNamespace(nodes=lambda: [node], get_runtime_context=lambda: me)

    with socket.create_server(("127.0.0.1", 0)) as alive:
        port = alive.getsockname()[1]
        assert daemon(listed("127.0.0.1", port)) == f"127.0.0.1:{port}"
    with pytest.raises(ExecutorError, match="has ended, and the cluster has not noticed yet"):
        daemon(listed("127.0.0.1", port))
    assert daemon(listed("203.0.113.1", port)) is None  # a client outside of the cluster


@pytest.mark.parametrize("resources", [{"CPU": 64.0}, {"CPU": 1.0, "GPU": 3.0}, {"rack": 1.0}])
def test_what_no_node_has_is_refused(
    resources: dict[str, float], tmp_path: Path, ray_cluster: None
) -> None:
    with pytest.raises(ExecutorError, match="resources: no node has"):
        walk(tmp_path / "w.db").run(1, 5, executor=RayActors(1, resources=resources))
