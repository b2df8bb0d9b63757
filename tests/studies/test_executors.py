"""The same study in this process and in a pool; workers that die, hang, and run out of memory."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from adapters import tasks
from bilevel.metrics import Metrics
from studies import Study
from studies.events import Event, Finished, Retried
from studies.executors.base import ExecutorError
from studies.executors.config import Processes
from tests.studies.test_study import numbers, study
from tests.studies.trials import Behaving, Trivial, Walker

optuna.logging.set_verbosity(optuna.logging.WARNING)
TASK = tasks.get("digits", n_train=100)


def behaving(folder: Path, how: str, **options: Any) -> Study:
    space = Behaving.space.fix(how=how, mark="none", pace=options.pop("pace", 0.0))
    return Study("b", Behaving, TASK, folder / "b.db", space=space, sampler="random", **options)


def test_a_pool_of_one_gives_the_numbers_of_this_process(tmp_path: Path) -> None:
    here = study(tmp_path / "a").run(5, 40)
    pool = study(tmp_path / "b").run(5, 40, executor="pool")
    assert numbers(here) == numbers(pool)
    assert {r.state for r in here.trials} == {"complete", "pruned"}


def test_two_workers_lose_and_double_nothing(tmp_path: Path) -> None:
    found = Study("w", Walker, TASK, tmp_path / "w.db", sampler="random",
                  space=Walker.space.fix(pace=0.0)).run(12, 20, workers=2)  # fmt: skip
    assert [r.number for r in found.trials] == list(range(12))
    assert {r.state for r in found.trials} == {"complete"}
    alone = Study("w", Walker, TASK, tmp_path / "v.db", sampler="random",
                  space=Walker.space.fix(pace=0.0)).run(12, 20)  # fmt: skip
    assert [r.value for r in found.trials] == [r.value for r in alone.trials]


def test_a_study_goes_on_under_another_executor(tmp_path: Path) -> None:
    study(tmp_path / "a").run(2, 40, scheduler="fifo")
    parts = study(tmp_path / "a").run(4, 40, scheduler="fifo", workers=2)
    whole = study(tmp_path / "b").run(4, 40, scheduler="fifo")
    by_params = {r.number: r for r in whole.trials}
    for record in parts.trials:  # what TPE sees depends on the order, the trial itself does not
        other = by_params[record.number]
        if (record.params, record.start) == (other.params, other.start):
            assert record.value == other.value


def test_a_worker_that_dies_once_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVING_FOLDER", str(tmp_path))
    events: list[Event] = []
    found = behaving(tmp_path, "die once").run(
        2, 10, executor="pool", checkpoint_seconds=0.0, on_event=events.append
    )
    whole = Study("b", Walker, TASK, tmp_path / "v.db", sampler="random",
                  space=Walker.space.fix(pace=0.0)).run(2, 10)  # fmt: skip
    assert [r.state for r in found.trials] == ["complete"] * 2
    assert [r.value for r in found.trials] == [r.value for r in whole.trials]
    assert [e.number for e in events if isinstance(e, Retried)] == [0]


def test_a_worker_that_dies_again_fails_the_trial_and_not_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVING_FOLDER", str(tmp_path))
    found = behaving(tmp_path, "die").run(2, 10, executor="pool")
    assert [str(r.failure) for r in found.trials] == ["died: worker died (signal 9)"] * 2


HANGING = """
import os, sys, threading, time
from pathlib import Path
folder = Path(sys.argv[1])
def fork():  # what a coordinator with workers forks must not keep them alive
    while not list(folder.glob("hangs-*")):
        time.sleep(0.05)
    pid = os.fork()
    if pid == 0:
        time.sleep(120)
        os._exit(0)
    Path(folder, "new").write_text(str(pid))
    os.rename(folder / "new", folder / "forked")
if sys.argv[2:]:
    threading.Thread(target=fork).start()
from tests.studies.test_executors import behaving
behaving(folder, "hang").run(3, 10, workers=3)
"""


@pytest.mark.parametrize("forks", [[], ["fork"]])
def test_workers_end_with_a_killed_coordinator_in_the_middle_of_a_step(
    forks: list[str], tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HANGING, str(tmp_path), *forks], cwd=Path(__file__).parents[2],
        env={**os.environ, "BEHAVING_FOLDER": str(tmp_path)},
    ) as child:  # fmt: skip
        while len(list(tmp_path.glob("hangs-*"))) < 3:  # each is in a step that never returns
            assert child.poll() is None
            time.sleep(0.05)
        while forks and not (tmp_path / "forked").exists():
            time.sleep(0.05)
        family = set(psutil.Process(child.pid).children(recursive=True))
        child.kill()
    forked = {process for process in family if forks and process.pid == pid_in(tmp_path / "forked")}
    if forks:  # Python's own two helpers end with the fork: it has their pipes, too
        pids = {pid_in(file) for file in tmp_path.glob("hangs-*")}
        family = {process for process in family if process.pid in pids}
    _, alive = psutil.wait_procs(family, timeout=30)
    for process in forked:
        process.kill()
    assert not alive


def pid_in(file: Path) -> int:
    return int(file.name.partition("-")[2] or file.read_text())


PRELOADING = """
import sys
from studies import preload_workers
preload_workers("tests.studies.trials")
assert "torch" not in sys.modules or __name__ != "__main__"
from multiprocessing import forkserver
server = forkserver._forkserver._forkserver_pid
assert server is not None or __name__ != "__main__"
from pathlib import Path
from tests.studies.test_executors import behaving
if __name__ == "__main__":
    found = behaving(Path(sys.argv[1]), "fine").run(2, 10, workers=2)
    assert forkserver._forkserver._forkserver_pid == server
    print(*[record.value for record in found.trials])
"""


def test_a_script_may_start_the_server_of_workers_before_it_imports_torch(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRELOADING)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, script, tmp_path], env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (tmp_path / "alone").mkdir()
    alone = behaving(tmp_path / "alone", "fine").run(2, 10)
    assert list(map(float, done.stdout.split())) == [record.value for record in alone.trials]


def test_a_worker_has_the_environment_of_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server of workers is older."""
    for how in ("first", "second"):
        (tmp_path / how).mkdir()
        monkeypatch.setenv("BEHAVING_FOLDER", str(tmp_path / how))
        behaving(tmp_path / how, "die once").run(1, 10, executor="pool")
        assert (tmp_path / how / "died").exists()


def test_a_trial_that_hangs_is_ended_at_its_limit(tmp_path: Path) -> None:
    found = behaving(tmp_path, "hang").run(2, 10, trial_seconds=1.0)
    assert [str(r.failure) for r in found.trials] == ["timeout: over its limit of 1 s"] * 2


@pytest.mark.parametrize("how", ["raise", "hang", "die"])
def test_a_failed_trial_has_cost_what_its_rungs_did(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BEHAVING_FOLDER", str(tmp_path))
    limit = 1.0 if how == "hang" else None
    found = behaving(tmp_path, how).run(1, 10, executor="pool", trial_seconds=limit, retries=0)
    (record,) = found.trials
    assert record.failure is not None
    assert record.cost.steps == max(record.rungs) == 4


def test_a_trial_that_takes_too_much_memory_fails(tmp_path: Path) -> None:
    found = behaving(tmp_path, "memory").run(1, 10, executor=Processes(1, memory=1 << 30))
    failure = found.trials[0].failure
    assert failure is not None
    assert failure.kind == "out of memory"


def test_a_time_limit_needs_processes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be ended from outside"):
        behaving(tmp_path, "fine").run(1, 10, executor="in_process", trial_seconds=1.0)
    with pytest.raises(ValueError, match="executor must be"):
        behaving(tmp_path, "fine").run(1, 10, executor="cloud")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="workers: executor 'in_process' has one"):
        behaving(tmp_path, "fine").run(1, 10, executor="in_process", workers=2)


def test_a_learner_that_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    class Locked(Trivial):
        """Holds something that no pickle can."""

        lock = threading.Lock()

    with pytest.raises(ExecutorError, match="cannot be sent to other processes"):
        Study("l", Locked, TASK, tmp_path / "l.db").run(2, 1, workers=2)


def test_a_learner_of_a_function_can_be_sent(tmp_path: Path) -> None:
    class Local(Trivial):
        """Defined here."""

    found = Study("l", Local, TASK, tmp_path / "l.db").run(3, 1, workers=2)
    assert {r.state for r in found.trials} == {"complete"}


def test_events_come_in_order(tmp_path: Path) -> None:
    events: list[Event] = []
    Study("t", Trivial, TASK, tmp_path / "t.db").run(3, 1, on_event=events.append)
    assert [type(e).__name__ for e in events] == ["Started", "Rung", "Finished"] * 3
    assert [e.record.number for e in events if isinstance(e, Finished)] == [0, 1, 2]


class Loading(Walker):
    """A learner whose data come from processes of its own."""

    def step(self) -> Metrics:
        """Walk, and load."""
        rows = torch.arange(4)
        loader = DataLoader(TensorDataset(rows), num_workers=1)
        assert [int(row) for (row,) in loader] == rows.tolist()
        return super().step()


def test_a_learner_in_a_pool_may_have_processes_of_its_own(tmp_path: Path) -> None:
    space = Walker.space.fix(pace=0.0)
    found = Study("l", Loading, TASK, tmp_path / "l.db", space=space, sampler="random")
    found.run(1, 2, rungs=1, executor="pool")
    assert [str(record.failure or "") for record in found.trials] == [""]


def test_an_idle_worker_that_dies_is_replaced(tmp_path: Path) -> None:
    """Also where its replacement dies before it is ready, as under the kernel's OOM killer."""
    from studies.executors.pool import Pool

    spawned: list[Any] = []
    original = Pool._spawn

    def spawn(self: Pool, gpu: int | None) -> Any:
        worker = original(self, gpu)
        spawned.append(worker)
        if len(spawned) == 3:  # the first replacement
            worker.process.kill()
        return worker

    def kill_first(event: Event) -> None:
        if isinstance(event, Finished) and event.record.number == 0:
            spawned[0].process.kill()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pool, "_spawn", spawn)
        space = Walker.space.fix(pace=0.01)
        found = Study("i", Walker, TASK, tmp_path / "i.db", space=space, sampler="random")
        found.run(6, 20, workers=2, on_event=kill_first, retries=2)
    assert {record.state for record in found.trials} == {"complete"}
    assert len(spawned) >= 4
