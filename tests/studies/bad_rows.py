"""Rows of bad inputs that are more than one call: budgets, scalars, writers, artifacts."""

from __future__ import annotations

import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from studies import LockedError, TooManyFailuresError
from studies.views.stored import StoredStudy
from tests.studies.bad import TOML, bilevel_run, no_trial_begins, one_sentence, opened
from tests.studies.console import console
from tests.studies.trials import Behaving

ROOT = Path(__file__).parents[2]


def stops_at_a_failure_budget(folder: Path) -> None:
    space = Behaving.space.fix(how="raise", mark="none", pace=0.0)
    with pytest.raises(TooManyFailuresError) as caught:
        opened(folder, space).run(30, 10)
    one_sentence(str(caught.value), "10 of 10 trials failed, more than 50%: 10 × exception: .*luck")
    assert len(opened(folder, space).trials) == 10
    again = folder / "again"
    again.mkdir()
    done = bilevel_run(again, TOML.replace("fine", "raise"), "--trials", 30, "--quiet")
    assert (done.code, done.out) == (1, "")
    one_sentence(done.err.strip(), "10 of 10 trials failed")


def scalars_are_converted(folder: Path) -> None:
    space = Behaving.space.fix(mark="none", pace=0.0)
    study = opened(folder, space)
    for how in ("scalar", "scalar beside"):
        study.enqueue({"x": torch.tensor(0.25), "how": how})
    study.run(2, 10, rungs=1)
    one, other = StoredStudy(folder / "out" / "study.db").trials
    assert (one.state, one.value, one.params["x"]) == ("complete", 0.5, 0.25)
    assert (other.state, other.metrics["val/size"]) == ("complete", 0.5)


@contextmanager
def child_that_says(word: str, code: str, folder: Path) -> Iterator[int]:
    """Python code in another process, from when it says a word; yields its id."""
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == f"{word}\n"
        yield child.pid
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


@contextmanager
def running_elsewhere(folder: Path) -> Iterator[int]:
    """Another process in the middle of the first trial of the study; yields its id."""
    code = (
        "import sys; from pathlib import Path; from tests.studies.bad import *\n"
        "space = Behaving.space.fix(how='hang', mark='none', pace=0.0)\n"
        "tell = lambda event: print(type(event).__name__, flush=True)\n"
        "opened(Path(sys.argv[1]), space).run(1, 10, on_event=tell)"
    )
    with child_that_says("Started", code, folder) as pid:
        yield pid


def second_writer_is_refused(folder: Path) -> None:
    space = Behaving.space.fix(how="hang", mark="none", pace=0.0)
    with running_elsewhere(folder) as pid:
        holder = rf"study 'small' is being run by process {pid} on {socket.gethostname()} since "
        for _ in range(2):  # a refused attempt does not erase who holds it
            with no_trial_begins(folder), pytest.raises(LockedError) as caught:
                opened(folder, space).run(1, 10)
            one_sentence(str(caught.value), holder)


def second_writer_is_refused_at_console(folder: Path) -> None:
    assert bilevel_run(folder, TOML, "--trials", 1, "--quiet").code == 0
    with running_elsewhere_at_console(folder) as pid:
        (folder / "small.toml").write_text(TOML)
        for args in (
            ("run", "small.toml", "--out", "out", "--trials", 3),
            ("resume", "out", "--trials", 3),
            ("gc", "out", "--delete"),
        ):
            with no_trial_begins(folder):
                done = console("study", *args, cwd=folder)
            assert (done.code, done.out) == (3, "")
            one_sentence(done.err.strip(), rf"process {pid} on {socket.gethostname()} since ")


@contextmanager
def running_elsewhere_at_console(folder: Path) -> Iterator[int]:
    """Another process that holds the lock of the study in ``out``."""
    code = (
        "import sys, time; from studies.storage.locks import coordinator_lock\n"
        "from studies.views.stored import StoredStudy\n"
        "study = StoredStudy(sys.argv[1])\n"
        "with coordinator_lock(study.files.study, study.name, study.database):\n"
        "    print('held', flush=True); time.sleep(600)"
    )
    with child_that_says("held", code, folder / "out") as pid:
        yield pid


def artifacts_outside_are_not_read(folder: Path) -> None:
    """The database says that a traceback is in ``../../etc/passwd``, and there is such a file."""
    assert bilevel_run(folder, TOML.replace("fine", "raise"), "--quiet").code == 1
    (folder / "etc").mkdir()
    (folder / "etc" / "passwd").write_text("root:secret")
    study = StoredStudy(folder / "out")
    before, outside = study.artifacts(0)["traceback.txt"], "../../etc/passwd"
    with closing(sqlite3.connect(folder / "out" / "study.db")) as connection, connection:
        connection.execute(
            "UPDATE trial_system_attributes SET key = replace(key, ?, ?), "
            "value_json = replace(value_json, ?, ?)",
            (before, outside, before, outside),
        )
    assert (study.files.artifacts / outside).read_text() == "root:secret"
    said = f"artifact id must be a file name, but got '{outside}'"
    with pytest.raises(ValueError, match=said):
        StoredStudy(folder / "out").artifact("traceback.txt", 0)
    shown = console("study", "show", "out", "0", cwd=folder)
    assert shown.code == 2
    one_sentence(shown.err.strip(), said)
    examined = console("study", "doctor", "out", "--json", cwd=folder)
    assert examined.code == 1
    (trouble,) = [found for found in examined.json if found["level"] == "error"]
    assert trouble["value"] == f"{outside!r} of trial 0 outside of the folder artifacts"
