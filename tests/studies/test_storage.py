"""Storages: what is refused and how, WAL mode, the lock, reading by stock Optuna."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest

from studies.storage.database import (
    StorageError,
    check_folder,
    default_folder,
    masked,
    open_storage,
    parse_storage,
)
from studies.storage.locks import LockedError, coordinator_lock


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("", "empty"),
        ("ftp://host/x", "unknown scheme 'ftp'"),
        ("redis://localhost", "unknown scheme 'redis'"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("postgresql://user:pw@host:port/x", "not a database URL"),
    ],
)
def test_unusable_urls_are_refused_in_one_sentence(storage: str, message: str) -> None:
    with pytest.raises(StorageError, match=re.escape(message)) as error:
        parse_storage(storage)
    assert "\n" not in str(error.value)
    assert "pw" not in str(error.value)


def test_a_path_is_a_sqlite_file() -> None:
    assert parse_storage("a/b.db") == parse_storage("sqlite:///a/b.db")
    assert parse_storage(Path("/a/b.db")) == parse_storage("sqlite:////a/b.db")


def test_password_is_masked() -> None:
    url = parse_storage("postgresql://me:secret@host/studies")
    assert "secret" not in masked(url)
    assert masked(url) == "postgresql://me:***@host/studies"


def test_password_stays_out_of_connection_errors() -> None:
    url = parse_storage("postgresql://me:secret@127.0.0.1:1/studies")
    with pytest.raises(StorageError) as error:
        open_storage(url)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_missing_or_in_place_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="does not exist"):
        open_storage(parse_storage(tmp_path / "no" / "x.db"))
    with pytest.raises(StorageError, match="is a folder"):
        open_storage(parse_storage(tmp_path))
    with pytest.raises(StorageError, match="does not exist"):
        open_storage(parse_storage(tmp_path / "x.db"), create=False)
    assert not (tmp_path / "x.db").exists()


def test_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    # /proc refuses new files even for root, as a read-only mount does.
    with pytest.raises(StorageError, match="output folder '/proc' cannot be written to"):
        check_folder(Path("/proc"), "output folder")
    with pytest.raises(StorageError, match="cannot be written to"):
        open_storage(parse_storage("/proc/bilevel.db"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written to"):
        check_folder(tmp_path / "file" / "below", "output folder")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes through permission bits")
def test_folder_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        check_folder(tmp_path, "output folder")


def test_sqlite_runs_in_wal_mode_and_waits(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    storage = open_storage(parse_storage(path))
    with storage.engine.connect() as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "busy_timeout")
        }
    assert pragma == {"journal_mode": "wal", "synchronous": 1, "busy_timeout": 60_000}


def test_stock_optuna_reads_and_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    study = optuna.create_study(study_name="s", storage=open_storage(parse_storage(path)))
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    again = optuna.load_study(study_name="s", storage=f"sqlite:///{path}")
    again.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=1)
    assert len(study.get_trials()) == 3


def test_files_stand_beside_the_database() -> None:
    assert default_folder(parse_storage("sqlite:///a/b.db")) == Path("a/b-files")
    assert default_folder(parse_storage("postgresql://h/team")) == Path("team-files")


def test_lock_excludes_a_second_study_of_the_same_process(tmp_path: Path) -> None:
    database = open_storage(parse_storage(tmp_path / "x.db"))
    with (
        coordinator_lock(tmp_path, "s", database),
        pytest.raises(LockedError, match=f"process {os.getpid()} "),
        coordinator_lock(tmp_path, "s", database),
    ):
        pass


def test_sqlite_is_not_written_to_over_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_storage(parse_storage(tmp_path / "x.db"))
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"),
              SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")]  # fmt: skip
    monkeypatch.setattr("psutil.disk_partitions", lambda all: mounts)
    for name in ("x.db", "new.db"):
        with pytest.raises(StorageError, match=r"network file system \(nfs4\), where SQLite loses"):
            open_storage(parse_storage(tmp_path / name))
    open_storage(parse_storage(tmp_path / "x.db"), create=False)  # may be looked at
    mounts[1].fstype = "xfs"
    open_storage(parse_storage(tmp_path / "new.db"))
