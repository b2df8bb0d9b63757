"""Studies that are killed at any instant, and disks that are full: nothing is lost or doubled."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState

from benchmarks.studies.crashes import TRIALS, forked, make, numbers
from studies.events import Event
from tests.studies.postgres import server
from tests.studies.test_executors import TASK
from tests.studies.trials import Walker

optuna.logging.set_verbosity(optuna.logging.WARNING)


def whole(folder: Path, url: str) -> tuple[float, list[object]]:
    """How long an uninterrupted study takes, and what comes out."""
    seconds = forked(lambda: make(url, folder))
    return seconds, numbers(make(url, folder))


@pytest.mark.slow
def test_a_study_killed_anywhere_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    seconds, expected = whole(tmp_path / "whole", f"sqlite:///{tmp_path}/whole.db")
    draw = random.Random(0)
    for i in range(12):
        folder, url = tmp_path / f"k{i}", f"sqlite:///{tmp_path}/k{i}.db"
        forked(lambda f=folder, u=url: make(u, f), draw.uniform(0.05, 1.0) * seconds)  # type: ignore[misc]
        assert numbers(make(url, folder)) == expected


@pytest.mark.slow
def test_a_study_killed_many_times_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    seconds, expected = whole(tmp_path / "whole", f"sqlite:///{tmp_path}/whole.db")
    draw, folder, url = random.Random(1), tmp_path / "k", f"sqlite:///{tmp_path}/k.db"
    for _ in range(8):
        forked(lambda: make(url, folder), draw.uniform(0.1, 0.5) * seconds)
    assert numbers(make(url, folder)) == expected


@pytest.mark.slow
def test_a_pool_study_that_is_killed_loses_and_doubles_nothing(tmp_path: Path) -> None:
    folder, url = tmp_path / "k", f"sqlite:///{tmp_path}/k.db"
    seconds = forked(lambda: make(f"sqlite:///{tmp_path}/w.db", tmp_path / "w", "pool", 2))
    for share in (0.5, 0.8):
        forked(lambda: make(url, folder, "pool", 2), share * seconds)
    found = make(url, folder, "pool", 2)
    assert [r.number for r in found.trials] == list(range(TRIALS))
    states = {t.state for t in found.optuna.get_trials(deepcopy=False)}
    assert states <= {TrialState.COMPLETE, TrialState.PRUNED}


@pytest.fixture(scope="module")
def postgres() -> Iterator[str]:
    with server() as url:
        yield url


@pytest.mark.slow
def test_postgresql_holds_what_sqlite_holds(postgres: str, tmp_path: Path) -> None:
    seconds, expected = whole(tmp_path / "whole", f"sqlite:///{tmp_path}/whole.db")
    assert numbers(make(postgres, tmp_path / "pg")) == expected
    draw = random.Random(2)
    for i in range(4):
        folder = tmp_path / f"k{i}"
        forked(lambda f=folder: make(postgres, f), draw.uniform(0.2, 1.0) * seconds)  # type: ignore[misc]
        assert numbers(make(postgres, folder)) == expected


FULL = """
import sys, warnings
from pathlib import Path
from studies import Study
from studies.events import Stalled, Rung
from tests.studies.trials import Walker
from tests.studies.test_executors import TASK
warnings.simplefilter("ignore")
def tell(event):
    print(type(event).__name__, getattr(event, "reason", ""), flush=True)
Study("f", Walker, TASK, Path(sys.argv[1], "f.db"), sampler="random",
      space=Walker.space.fix(pace=0.01)).run(60, 20, on_event=tell, checkpoint_seconds=0.0)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(disk)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_waited_for(small_disk: Path) -> None:
    filler = small_disk / "filler"
    process = subprocess.Popen(
        [sys.executable, "-c", FULL, str(small_disk)],
        stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout is not None
    lines, stalled = [], threading.Event()

    def fill() -> None:
        with filler.open("wb", buffering=0) as file:
            while not stalled.is_set():
                try:
                    file.write(b"x" * 4096)
                except OSError:
                    time.sleep(0.005)

    writer = threading.Thread(target=fill)
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Finished") and not writer.is_alive() and not stalled.is_set():
            writer.start()
        if line.startswith("Stalled") and not stalled.is_set():
            assert "space" in line.lower()
            stalled.set()
            writer.join()
            filler.unlink()  # the disk has room again
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert stalled.is_set(), lines[-5:]
    from studies import Study

    space = Walker.space.fix(pace=0.01)
    found = Study("f", Walker, TASK, small_disk / "f.db", sampler="random", space=space)
    assert [r.state for r in found.trials] == ["complete"] * 60
    elsewhere = Study("f", Walker, TASK, small_disk.parent / "g.db", sampler="random", space=space)
    assert [r.value for r in found.trials] == [r.value for r in elsewhere.run(60, 20).trials]


def test_a_torn_checkpoint_fails_its_trial_and_not_the_study(tmp_path: Path) -> None:
    from studies import Study

    class Stop(Exception):  # noqa: N818
        pass

    def stop(event: Event) -> None:
        if type(event).__name__ == "Rung":
            raise Stop

    def study() -> Study:
        return Study("t", Walker, TASK, tmp_path / "t.db", sampler="random",
                     space=Walker.space.fix(pace=0.0))  # fmt: skip

    with pytest.raises(Stop):
        study().run(2, 20, on_event=stop, checkpoint_seconds=0.0)
    checkpoint = next((tmp_path / "t-files").rglob("0.pt"))
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    found = study().run(2, 20)
    assert [r.state for r in found.trials] == ["failed", "complete"]
    assert "not a readable checkpoint" in str(found.trials[0].failure)
