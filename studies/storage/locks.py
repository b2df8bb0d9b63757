"""Who runs a study: a lock in its folder, and one in a database that several hosts reach."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import filelock
import sqlalchemy
from optuna.storages import RDBStorage

__all__ = ["LockedError", "coordinator_lock", "lock_holder"]

_PROGRAM = "bilevel"
_PROGRAM_KEY = 0x62696C65  # of advisory locks, apart from those of other programs
_NAME = "SELECT set_config('application_name', :me, false)"
_TRY = "SELECT pg_try_advisory_lock(:program, :key)"
_UNLOCK = "SELECT pg_advisory_unlock(:program, :key)"
_WHO = """
SELECT application_name FROM pg_locks JOIN pg_stat_activity USING (pid)
WHERE locktype = 'advisory' AND granted AND classid::bigint = :program
AND objid::bigint = :key AND pg_locks.database = (
    SELECT oid FROM pg_database WHERE datname = current_database())
"""


class LockedError(RuntimeError):
    """Another process runs the study; the message names its host and process id."""


@contextmanager
def coordinator_lock(folder: Path, study: str, database: RDBStorage) -> Iterator[None]:
    """Hold the right to run a study; the kernel gives it back however the process ends.

    Args:
        folder: folder of the study.
        study: its name.
        database: that the study is in.  A PostgreSQL server holds a lock, too: several hosts reach
            it, each with a folder of its own.

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
        with _server_lock(database, study, f"{_PROGRAM} {me['host']}:{me['pid']}"):
            yield
    finally:
        lock.release()


@contextmanager
def _server_lock(database: RDBStorage, study: str, me: str) -> Iterator[None]:
    """Hold an advisory lock of PostgreSQL, which ends with its connection; nothing elsewhere."""
    if database.engine.dialect.name != "postgresql":
        yield
        return
    key = int.from_bytes(hashlib.sha256(study.encode()).digest()[:4], "big") >> 1
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as held:
        held.execute(sqlalchemy.text(_NAME), {"me": me})
        numbers = {"program": _PROGRAM_KEY, "key": key}
        if not held.execute(sqlalchemy.text(_TRY), numbers).scalar():
            who = held.execute(sqlalchemy.text(_WHO), numbers).scalar()
            words = str(who or "another process").removeprefix(f"{_PROGRAM} ")
            raise LockedError(f"study {study!r} is being run by {words} in the same database.")
        try:
            yield
        finally:
            # Where the connection has ended, so has the lock.
            with suppress(sqlalchemy.exc.SQLAlchemyError):
                held.execute(sqlalchemy.text(_UNLOCK), numbers)


def lock_holder(folder: Path) -> str:
    """Return who holds the lock in a study's folder, in words."""
    try:
        who = json.loads((folder / "lock.json").read_text())
    except (OSError, ValueError):  # caught between its lock and its first write
        return "another process"
    return f"process {who['pid']} on {who['host']} since {who['since']}"
