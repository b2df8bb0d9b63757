"""Where studies are stored: one database that stock Optuna reads, one folder beside it for files.

A storage is a SQLAlchemy URL (``sqlite:///bilevel.db``, ``postgresql://...``) or a path to a
SQLite file.  SQLite runs in write-ahead mode with ``synchronous=NORMAL`` and waits 60 s for
another writer: a reader such as a dashboard never blocks a study, and a killed process leaves
the file whole.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import filelock
import sqlalchemy
from sqlalchemy.engine import URL

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

__all__ = [
    "LockedError",
    "StorageError",
    "check_folder",
    "coordinator_lock",
    "default_folder",
    "disconnect",
    "lock_holder",
    "masked",
    "open_storage",
    "parse_storage",
]

BUSY_TIMEOUT = 60.0  # seconds that a SQLite connection waits for another writer
_SCHEMES = ("sqlite", "postgresql", "mysql", "mariadb")
_EXPECTED = "expected a path to a SQLite file, sqlite:///FILE or postgresql://USER@HOST/DATABASE"


class StorageError(ValueError):
    """A storage that cannot be used; the message says why in one sentence."""


class LockedError(RuntimeError):
    """Another process runs the study; the message names its host and process id."""


def parse_storage(storage: str | os.PathLike[str]) -> URL:
    """Read a storage URL, or a path to a SQLite file, without touching it.

    Raises:
        StorageError: not a URL of a supported database.
    """
    text = os.fspath(storage)
    if not text:
        raise StorageError(f"storage is empty; {_EXPECTED}.")
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = sqlalchemy.engine.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        # The text itself may hold a password, so the message does not repeat it.
        raise StorageError(f"storage is not a database URL; {_EXPECTED}.") from error
    if url.get_backend_name() not in _SCHEMES:
        raise StorageError(
            f"storage {masked(url)!r} has the unknown scheme {url.drivername!r}; {_EXPECTED}."
        )
    if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
        raise StorageError(
            f"storage {masked(url)!r} is a database in memory, which no later run could resume; "
            f"{_EXPECTED}."
        )
    return url


def masked(url: URL) -> str:
    """Return the URL with its password as ``***``, for every message and stored attribute."""
    return url.render_as_string(hide_password=True)


def default_folder(url: URL) -> Path:
    """Folder for artifacts, checkpoints and locks: ``NAME-files`` beside ``NAME.db``."""
    if url.get_backend_name() == "sqlite":
        path = Path(str(url.database))
        return path.with_name(f"{path.stem}-files")
    return Path(f"{url.database or 'bilevel'}-files")


def check_folder(folder: Path, what: str) -> None:
    """Create a folder where it is missing and check that files can be written into it.

    Args:
        folder: the folder.
        what: its name for messages, such as "output folder".

    Raises:
        StorageError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell: root passes them, read-only mounts do not show in them.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(
            f"{what} {str(folder)!r} cannot be written to: {_reason(error)}."
        ) from error


def open_storage(url: URL, *, create: bool = True) -> RDBStorage:
    """Connect to a database and return Optuna's storage on it.

    Args:
        url: from `parse_storage`.
        create: make a SQLite file where there is none.

    Raises:
        StorageError: no such file, not a database, not a database of Optuna, a folder that is
            missing or cannot be written to, a missing driver, a refused connection, or a schema
            of another Optuna version.
    """
    from optuna.storages import RDBStorage

    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        _check_sqlite(Path(str(url.database)), create)
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT}} if sqlite else {}
    try:
        storage = RDBStorage(url.render_as_string(hide_password=False), engine_kwargs=options)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise StorageError(
            f"storage {masked(url)!r} needs a database driver that is not installed "
            f"({url.drivername}); for PostgreSQL: pip install 'psycopg[binary]'."
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise StorageError(f"storage {masked(url)!r} does not open: {_reason(error)}.") from error
    except RuntimeError as error:  # Optuna: the schema is of another version
        raise StorageError(f"storage {masked(url)!r}: {error}") from error
    if sqlite:
        # Connections made from now on run the pragmas; the ones of the constructor are dropped.
        sqlalchemy.event.listen(storage.engine, "connect", _sqlite_pragmas)
        storage.engine.dispose()
    return storage


def disconnect(storage: RDBStorage) -> None:
    """Close the connections of a storage; one that is used again connects anew."""
    storage.remove_session()
    storage.engine.dispose()


def _sqlite_pragmas(connection: sqlite3.Connection, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _check_sqlite(path: Path, create: bool) -> None:
    """Refuse what SQLite would report late, unclearly, or not at all."""
    where = f"storage {str(path)!r}"
    if path.is_dir():
        raise StorageError(
            f"{where} is a folder; give the file, such as {str(path / 'bilevel.db')!r}."
        )
    if not path.exists():
        if not create:
            raise StorageError(f"{where} does not exist.")
        if not path.parent.is_dir():
            what = "is not a folder" if path.parent.exists() else "does not exist"
            raise StorageError(f"{where}: its folder {str(path.parent)!r} {what}.")
        check_folder(path.parent, "the storage's folder")
        return
    if path.stat().st_size == 0 and create:
        return
    try:
        # A connection that only reads: a file that turns out to be something else stays untouched.
        # What a killed process left in the write-ahead log can be read by a writer alone.
        mode = "rw" if create and os.access(path, os.W_OK) else "ro"
        connection = sqlite3.connect(
            f"file:{path.resolve()}?mode={mode}", uri=True, timeout=BUSY_TIMEOUT
        )
        try:
            rows = connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            tables = {name for (name,) in rows}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StorageError(f"{where} is not a SQLite database: {_reason(error)}.") from error
    if "studies" not in tables or "version_info" not in tables:
        raise StorageError(
            f"{where} is a SQLite database, but not one of Optuna: it has "
            f"{f'the tables {sorted(tables)}' if tables else 'no tables'}."
        )
    if create:
        check_folder(path.parent, "the storage's folder")
        if not os.access(path, os.W_OK):
            raise StorageError(f"{where} is read-only.")


def _reason(error: BaseException) -> str:
    """First line of what the system or the driver said, without SQLAlchemy's link."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    inner = getattr(error, "orig", None) or error
    return str(inner).strip().splitlines()[0].rstrip(".")


@contextmanager
def coordinator_lock(folder: Path, study: str) -> Iterator[None]:
    """Hold the right to run a study; the kernel gives it back however the process ends.

    Args:
        folder: folder of the study.
        study: its name, for the message.

    Raises:
        LockedError: another process, or another `Study` of this one, holds it.
    """
    lock = filelock.FileLock(folder / "lock", timeout=0)
    # The lock file itself is emptied by everyone who tries, so who holds it stands beside it.
    holder = folder / "lock.json"
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise LockedError(f"study {study!r} is being run by {lock_holder(folder)}.") from error
    try:
        since = datetime.now().astimezone().isoformat(timespec="seconds")
        me = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        holder.write_text(json.dumps(me))
        yield
    finally:
        lock.release()


def lock_holder(folder: Path) -> str:
    """Return who holds the lock in a study's folder, in words."""
    try:
        who = json.loads((folder / "lock.json").read_text())
    except (OSError, ValueError):  # caught between its lock and its first write
        return "another process"
    return f"process {who['pid']} on {who['host']} since {who['since']}"
