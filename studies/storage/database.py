"""Where studies are stored: one database that stock Optuna reads, one folder beside it for files.

A storage is a SQLAlchemy URL (``sqlite:///bilevel.db``, ``postgresql://...``) or a path to a
SQLite file.  SQLite runs in write-ahead mode with ``synchronous=NORMAL`` and waits 60 s for
another writer: a reader such as a dashboard never blocks a study, and a killed process leaves
the file whole.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import sqlalchemy
from sqlalchemy.engine import URL

from studies.storage.layout import DATABASE
from studies.storage.sqlite_file import BUSY_TIMEOUT, find_fault

if TYPE_CHECKING:
    from optuna.storages import RDBStorage

__all__ = [
    "StorageError",
    "check_folder",
    "default_folder",
    "disconnect",
    "masked",
    "open_storage",
    "parse_storage",
]

_DRIVERS = {"postgresql": "psycopg[binary]", "mysql": "mysqlclient", "mariadb": "mysqlclient"}
_SCHEMES = ("sqlite", *_DRIVERS)
_NETWORK = ("nfs", "cifs", "smb", "fuse.sshfs", "afs")  # how their types of file system begin
_PASSWORDS = ("password", "passwd", "sslpassword")  # options that hold one
_EXPECTED = "expected a path to a SQLite file, sqlite:///FILE or postgresql://USER@HOST/DATABASE"


class StorageError(ValueError):
    """A storage that cannot be used; the message says why in one sentence."""


def parse_storage(storage: str | os.PathLike[str]) -> URL:
    """Read a storage URL, or a path to a SQLite file, without touching it.

    Raises:
        StorageError: not a URL of a supported database, or one whose password could not be masked.
    """
    text = os.fspath(storage) if isinstance(storage, str | os.PathLike) else storage
    if not isinstance(text, str):
        raise StorageError(f"storage is a {type(storage).__name__}; {_EXPECTED}.")
    if not text:
        raise StorageError(f"storage is empty; {_EXPECTED}.")
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = sqlalchemy.engine.make_url(text)
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        # The text itself may hold a password, so the message does not repeat it.
        raise StorageError(f"storage is not a database URL; {_EXPECTED}.") from error
    if "@" in (url.host or ""):  # what follows the first @ of a password would pass for the host
        raise StorageError("storage has two @; write one of a user or password as %40.")
    if found := [name for name in url.query if name in _PASSWORDS]:
        raise StorageError(
            f"storage has the option {found[0]!r}; write a password as USER:PASSWORD@HOST, "
            "which is masked in every message."
        )
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
    import optuna
    from optuna.storages import RDBStorage

    sqlite = url.get_backend_name() == "sqlite"
    if sqlite:
        _check_sqlite(Path(str(url.database)), create)
    options: dict[str, Any] = {"connect_args": {"timeout": BUSY_TIMEOUT}}
    if not sqlite:  # servers and firewalls end connections that are idle
        options = {"pool_pre_ping": True}
    # Which driver a bare postgresql:// means depends on the version of SQLAlchemy.
    full = url.set(drivername="postgresql+psycopg") if url.drivername == "postgresql" else url
    try:
        storage = RDBStorage(full.render_as_string(hide_password=False), engine_kwargs=options)
    except (ImportError, sqlalchemy.exc.NoSuchModuleError) as error:
        raise StorageError(
            f"storage {masked(url)!r} needs a database driver that is not installed; "
            f"`pip install '{_DRIVERS[url.get_backend_name()]}'` and start the URL with "
            f"{url.get_backend_name()}://."
        ) from error
    except sqlalchemy.exc.SQLAlchemyError as error:
        raise StorageError(f"storage {masked(url)!r} does not open: {_reason(error)}.") from error
    except RuntimeError as error:
        raise StorageError(
            f"storage {masked(url)!r} has the tables of another Optuna version than "
            f"{optuna.__version__}; `optuna storage upgrade --storage URL` mends older ones."
        ) from error
    if sqlite:
        # Connections made from now on run the pragmas; the ones of the constructor are dropped.
        sqlalchemy.event.listen(storage.engine, "connect", _sqlite_pragmas)
        storage.engine.dispose()
    weakref.finalize(storage, _close, storage.scoped_session, storage.engine)
    return storage


def _close(session: Any, engine: Any) -> None:
    session.remove()
    engine.dispose()


def disconnect(storage: RDBStorage) -> None:
    """Close the connections of a storage; one that is used again connects anew."""
    _close(storage.scoped_session, storage.engine)


def _sqlite_pragmas(connection: sqlite3.Connection, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def _check_sqlite(path: Path, create: bool) -> None:
    """Refuse what SQLite would report late, unclearly, or not at all."""
    where = f"storage {str(path)!r}"
    if path.is_dir():
        raise StorageError(f"{where} is a folder; give the file, such as {str(path / DATABASE)!r}.")
    if not path.exists():
        if not create:
            raise StorageError(f"{where} does not exist.")
        if not path.parent.is_dir():
            what = "is not a folder" if path.parent.exists() else "does not exist"
            raise StorageError(f"{where}: its folder {str(path.parent)!r} {what}.")
        _check_local(path)
        check_folder(path.parent, "the storage's folder")
        return
    if create:
        _check_local(path)
    if create and not path.stat().st_size:
        return
    fault = find_fault(path)
    if fault is not None:
        raise StorageError(f"{where} {fault.what}; {fault.advice}.")
    if create:
        check_folder(path.parent, "the storage's folder")
        if not os.access(path, os.W_OK):
            raise StorageError(f"{where} is read-only.")


def _check_local(path: Path) -> None:
    """Refuse to write where locks and shared memory are not those of one host."""
    parts = [
        p for p in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(p.mountpoint)
    ]
    kind = max(parts, key=lambda part: len(part.mountpoint)).fstype if parts else ""
    if kind.startswith(_NETWORK):
        raise StorageError(
            f"storage {str(path)!r} is on a network file system ({kind}), where SQLite loses data; "
            "give a file on a local disk, or postgresql://USER@HOST/DATABASE."
        )


def _reason(error: BaseException) -> str:
    """First line of what the system or the driver said, without SQLAlchemy's link."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    inner = getattr(error, "orig", None) or error
    return str(inner).strip().splitlines()[0].rstrip(".")
