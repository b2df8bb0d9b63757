"""`bilevel study` on a PostgreSQL server: from the first trial to the report, and wrong URLs."""

from __future__ import annotations

import json
import os
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from studies.storage.database import open_storage, parse_storage
from studies.storage.locks import LockedError, coordinator_lock
from studies.views.stored import STORAGE_VARIABLE
from tests.studies.bad import one_sentence
from tests.studies.console import STUDY, Ended, console, interrupted_run, study_file
from tests.studies.postgres import server

PASSWORD = "geheim"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A server that asks for a password."""
    with server() as open_to_all:
        import psycopg

        with psycopg.connect(open_to_all, autocommit=True) as connection:
            connection.execute(f"ALTER USER test PASSWORD '{PASSWORD}'")
            rules = connection.execute("SHOW hba_file").fetchone()
            assert rules is not None
            connection.execute(
                f"COPY (SELECT 'host all all 127.0.0.1/32 scram-sha-256') TO '{rules[0]}'"
            )
            connection.execute("SELECT pg_reload_conf()")
        yield open_to_all.replace("test@", f"test:{PASSWORD}@")


@pytest.fixture(autouse=True)
def storage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORAGE_VARIABLE, url)


def named(name: str) -> str:
    return STUDY.replace('"small"', f'"{name}"')


def masked(done: Ended, code: int = 0) -> Ended:
    assert done.code == code, done.err
    assert PASSWORD not in done.out + done.err
    return done


def test_from_the_first_trial_to_the_report(tmp_path: Path) -> None:
    study_file(tmp_path, named("whole").replace("budget = 40", "budget = 200"))
    ended = masked(interrupted_run(tmp_path), 130)
    assert "`bilevel study resume out` goes on" in ended.err

    def study(*args: object) -> Ended:
        return masked(console("study", *args, cwd=tmp_path))

    assert study("status", "out", "--json").json["state"] in ("interrupted", "idle")
    assert study("resume", "out", "--json", "--quiet").json["complete"] == 3
    assert study("status", "out", "--json").json["state"] == "complete"
    assert "3 of 3 finished" in study("status", "out").out
    best = study("best", "out", "--json").json
    assert tomllib.loads(study("best", "out", "--as", "toml").out) == best["hparams"]
    assert "of whole: complete" in study("show", "out", "0").out
    assert len(study("show", "out", "--json").json) == 3
    assert len(study("export", "out", "csv").out.splitlines()) == 4
    assert "out/report/report.html" in study("report", "out").out
    assert {found["level"] for found in study("doctor", "out", "--json").json} == {"ok"}
    assert study("gc", "out", "--json").json["files"] == []
    place = json.loads((tmp_path / "out" / "spec.json").read_text())["storage"]
    assert place.startswith("postgresql://test:***@127.0.0.1:")
    assert (tmp_path / "out" / "report" / "report.html").stat().st_size > 0
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or PASSWORD.encode() not in path.read_bytes(), path
    assert not list(tmp_path.rglob("*.db"))
    beside = console("study", "run", "small.toml", "--out", "beside", "--json", "--quiet",
                     "--storage", tmp_path / "beside.db", cwd=tmp_path)  # fmt: skip
    assert beside.json["best"]["value"] == best["value"]  # the numbers of SQLite


def test_two_studies_in_one_database(url: str, tmp_path: Path) -> None:
    for name in ("one", "other"):
        study_file(tmp_path, named(name))
        masked(console("study", "run", "small.toml", "--out", name, "--quiet", cwd=tmp_path))
    for name in ("one", "other"):
        assert (
            masked(console("study", "status", name, "--json", cwd=tmp_path)).json["study"] == name
        )
        best = masked(console("study", "best", url, "--study", name, "--json", cwd=tmp_path))
        assert best.json["state"] == "complete"
        masked(console("study", "gc", name, "--delete", cwd=tmp_path))
        masked(console("study", "doctor", name, cwd=tmp_path))
    ambiguous = masked(console("study", "status", url, cwd=tmp_path), 2)
    one_sentence(
        ambiguous.err.strip(), "holds . studies; choose one with --study: .*'one', 'other'"
    )
    listed = masked(console("show", url, "--json", cwd=tmp_path)).json
    assert {"one", "other"} <= {row["study"] for row in listed}
    found = masked(console("study", "compare", "one", "other", "--json", cwd=tmp_path)).json
    assert [row["complete"] for row in found["studies"]] == [3, 3]


def test_a_folder_stays_with_its_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study_file(tmp_path, named("stays"))
    run = ("study", "run", "small.toml", "--out", "out", "--trials", "1", "--quiet")
    masked(console(*run, cwd=tmp_path))
    monkeypatch.delenv(STORAGE_VARIABLE)
    elsewhere = masked(console(*run, cwd=tmp_path), 2)
    one_sentence(
        elsewhere.err.strip(), r"'out' belongs to the study 'stays' in postgresql://.*:\*\*\*"
    )
    assert not (tmp_path / "out" / "study.db").exists()
    for command in (("resume", "out"), ("status", "out")):
        done = masked(console("study", *command, cwd=tmp_path), 2)
        one_sentence(done.err.strip(), "password in the environment variable BILEVEL_STORAGE")


def test_a_typo_that_shows_late_leaves_no_study_behind(tmp_path: Path) -> None:
    study_file(tmp_path, 'metric = "los"' + named("typo"))
    run = ("study", "run", "small.toml", "--out", "out", "--trials", "1", "--quiet")
    done = masked(console(*run, cwd=tmp_path), 2)
    one_sentence(done.err.strip(), r"metric must be one of \['accuracy', 'loss'\], but got 'los'")
    study_file(tmp_path, named("typo"))
    masked(console(*run, cwd=tmp_path))


WRONG = {
    "password": ((f":{PASSWORD}@", f":not{PASSWORD}@"), "password authentication failed"),
    "server": (("@127.0.0.1:", "@127.0.0.1:1"), "Connection refused|invalid port"),
    "database": (("/postgres", "/nosuch"), 'database "nosuch" does not exist'),
    "driver": (("postgresql://", "postgresql+pg8000://"), r"`pip install 'psycopg\[binary\]'`"),
}  # fmt: skip


@pytest.fixture(scope="module")
def made(url: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of one trial."""
    folder = tmp_path_factory.mktemp("made")
    study_file(folder, named("made"))
    run = ("study", "run", "small.toml", "--out", "out", "--trials", "1", "--quiet")
    masked(console(*run, "--storage", url, cwd=folder))
    return folder


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_url_is_one_sentence(
    what: str, made: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, said = WRONG[what]
    monkeypatch.setenv(STORAGE_VARIABLE, url.replace(*change))
    (made / "new.toml").write_text(named("new"))
    for command in (
        ("run", "new.toml", "--out", "new"),
        ("resume", "out"),
        ("status", "out"),
        ("best", "out"),
        ("export", "out", "csv"),
        ("gc", "out"),
    ):
        done = masked(console("study", *command, cwd=made), 2)
        assert done.out == ""
        one_sentence(done.err.removeprefix("bilevel: ").strip(), said)
    assert not (made / "new" / "spec.json").exists()
    examined = masked(console("study", "doctor", "out", "--json", cwd=made), 1)
    (trouble,) = [found for found in examined.json if found["level"] == "error"]
    one_sentence(trouble["value"], said)
    assert "BILEVEL_STORAGE" in trouble["advice"]


def test_a_second_folder_does_not_run_the_study_too(url: str, tmp_path: Path) -> None:
    """Hosts with folders of their own share the server only."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    database, again = (open_storage(parse_storage(url)) for _ in range(2))
    with (
        coordinator_lock(tmp_path / "a", "held", database),
        coordinator_lock(tmp_path / "c", "other", again),
        pytest.raises(LockedError) as caught,
        coordinator_lock(tmp_path / "b", "held", again),
    ):
        pass
    here = f"{socket.gethostname()}:{os.getpid()}"
    one_sentence(str(caught.value), f"study 'held' is being run by {here} in the same database")
    with coordinator_lock(tmp_path / "b", "held", again):  # given back
        pass
