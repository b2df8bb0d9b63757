"""Bad inputs as cases: what is done, in Python or at the command line, and how it must end."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from bilevel import Domain, Space
from studies import MismatchError, StorageError, Study
from studies.storage.database import disconnect
from studies.views.stored import StoredStudy
from tests.studies.console import Ended, console
from tests.studies.test_executors import TASK
from tests.studies.trials import Behaving

Case = Callable[[Path], None]

FINE = Behaving.space.fix(how="fine", mark="none", pace=0.0)

TOML = """
learner = "tests.studies.trials:Behaving"
task = { name = "digits", n_train = 100 }
sampler = "random"
[space]
how = "fine"
mark = "none"
pace = 0.0
[run]
trials = 2
budget = 10
"""

optuna.logging.set_verbosity(optuna.logging.WARNING)


def opened(folder: Path, space: Space = FINE, name: str = "small", **options: Any) -> Study:
    """The study that `TOML` describes, in ``out`` as the command line has it."""
    (folder / "out").mkdir(exist_ok=True)
    place = {"storage": folder / "out" / "study.db", "folder": folder / "out", **options}
    return Study(name, Behaving, TASK, space=space, sampler="random", **place)


def ran(folder: Path) -> None:
    """A first trial of it."""
    opened(folder).run(1, 10)


def bilevel_run(folder: Path, text: str = TOML, *args: object) -> Ended:
    (folder / "small.toml").write_text(text)
    return console("study", "run", "small.toml", "--out", "out", *args, cwd=folder)


def one_sentence(text: str, said: str) -> None:
    assert "\n" not in text
    assert text.endswith("."), text
    assert re.search(r"[.!?] +[A-Z]", text) is None, text
    assert re.search(said, text), text


def kept(folder: Path) -> dict[str, object]:
    """The number of trials in each database, the bytes of what is none."""
    found: dict[str, object] = {}
    for path in folder.rglob("*.db"):
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
                found[str(path)] = connection.execute("SELECT COUNT(*) FROM trials").fetchone()[0]
        except sqlite3.Error:
            found[str(path)] = path.read_bytes()
    return found


@contextmanager
def no_trial_begins(folder: Path) -> Iterator[None]:
    before = kept(folder)
    yield
    after = kept(folder)
    assert after == {**dict.fromkeys(after, 0), **before}


def nothing(folder: Path) -> None:
    """What was there before: no study."""


@dataclass(frozen=True)
class Refused:
    """In Python: raises, and no trial begins."""

    do: Callable[[Path], object]
    said: str
    kind: type[Exception] = ValueError
    given: Callable[[Path], object] = nothing

    def __call__(self, folder: Path) -> None:
        self.given(folder)
        with no_trial_begins(folder), pytest.raises(self.kind) as caught:
            self.do(folder)
        one_sentence(str(caught.value), self.said)


@dataclass(frozen=True)
class RefusedAtConsole:
    """At the command line: an exit code, a line, and no trial begins."""

    said: str
    change: tuple[str, str] = ("", "")
    args: tuple[object, ...] = ()
    code: int = 2
    given: Callable[[Path], object] = nothing

    def __call__(self, folder: Path) -> None:
        self.given(folder)
        with no_trial_begins(folder):
            done = bilevel_run(folder, TOML.replace(*self.change, 1), *self.args)
        assert (done.code, done.out) == (self.code, "")
        assert done.err.startswith("bilevel: ")
        one_sentence(done.err.removeprefix("bilevel: ").removesuffix("\n"), self.said)


@dataclass(frozen=True)
class Fails:
    """In Python: every trial fails with a kind and a reason, and the study goes on."""

    how: str
    kind: str
    said: str
    run: dict[str, Any] = field(default_factory=dict)

    def __call__(self, folder: Path) -> None:
        space = Behaving.space.fix(how=self.how, mark="none", pace=0.0)
        opened(folder, space).run(2, 10, **self.run)
        failures = [record.failure for record in StoredStudy(folder / "out" / "study.db").trials]
        assert len(failures) == 2
        for failure in failures:
            assert failure is not None
            assert failure.kind == self.kind
            assert re.fullmatch(self.said, failure.message), failure.message


@dataclass(frozen=True)
class FailsAtConsole:
    """At the command line: a line for each trial, the kinds counted, exit code 1."""

    how: str
    kind: str
    said: str

    def __call__(self, folder: Path) -> None:
        done = bilevel_run(folder, TOML.replace("fine", self.how))
        assert done.code == 1
        first, second, last = done.err.splitlines()
        assert re.fullmatch(rf"trial 0  FAILED    {self.kind}: {self.said}", first), first
        assert second.startswith("trial 1  FAILED")
        assert done.out.startswith(f"done: 2 trials (2 failed: 2 {self.kind})")
        one_sentence(last, "no trial is complete; `bilevel study show out 0` says why")
        status = console("study", "status", "out", "--json", cwd=folder)
        assert status.json["failures"] == {self.kind: 2}
        shown = console("study", "show", "out", "0", cwd=folder).out
        assert re.search(self.said, " ".join(shown.split()))


def within(domain: Callable[[], Domain]) -> Callable[[Path], object]:
    """A study whose space has a domain for x."""
    return lambda folder: opened(folder, FINE.without("x") | {"x": domain()}).run(1, 10)


def in_space(change: str) -> tuple[str, str]:
    return "[space]", f"[space]\n{change}"


# Files that are no database, or no whole one.


def journal(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A journal of stock Optuna with two trials, damaged."""

    def make(folder: Path) -> None:
        path = folder / "x.db"
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(study_name="small", storage=storage)
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        path.write_bytes(damage(path.read_bytes()))

    return make


def without_a_trial(data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    created = next(i for i, line in enumerate(lines) if b'"op_code":4' in line)
    return b"".join(lines[:created] + lines[created + 1 :])


def database(damage: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """A whole database with its study, damaged."""

    def make(folder: Path) -> None:
        study = opened(folder, storage=folder / "x.db")
        study.run(3, 10)
        disconnect(study.database)
        data = (folder / "x.db").read_bytes()
        assert int.from_bytes(data[28:32], "big") * 4096 == len(data)
        (folder / "x.db").write_bytes(damage(data))

    return make


def overwritten(data: bytes) -> bytes:
    return data[:4096] + b"\xa5" * 8192 + data[12288:]


def notes(folder: Path) -> None:
    (folder / "x.db").write_text("milk, bread\n" * 100)


def shop(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "x.db")) as connection, connection:
        connection.execute("CREATE TABLE customers (name TEXT)")


def another_program(folder: Path) -> None:
    study = optuna.create_study(study_name="small", storage=f"sqlite:///{folder / 'x.db'}")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)


def file(given: Callable[[Path], object], said: str, code: int = 2) -> list[Case]:
    """A file in place of the database, in Python and at the command line."""

    def open_it(folder: Path) -> Study:
        return opened(folder, storage=folder / "x.db")

    return [
        Refused(open_it, said, MismatchError if code == 4 else StorageError, given=given),
        RefusedAtConsole(said, args=("--storage", "x.db"), code=code, given=given),
    ]


def bad_journal(damage: Callable[[bytes], bytes]) -> list[Case]:
    said = (
        r"x\.db' is a journal of Optuna's JournalStorage.*; expected a SQLite database that Optuna"
    )
    return file(journal(damage), said)


def other_storage(storage: Any, said: str) -> Refused:
    return Refused(lambda folder: opened(folder, storage=storage), said, StorageError)


def another_space(change: dict[str, Domain], said: str) -> Refused:
    """A study that goes on with another space."""
    space = FINE.without(*change) | change
    return Refused(lambda f: opened(f, space).run(2, 10), said, MismatchError, given=ran)
