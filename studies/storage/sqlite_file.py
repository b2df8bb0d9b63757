"""SQLite files: what is wrong with one, where SQLite says it late, unclearly, or not at all."""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BUSY_TIMEOUT", "Fault", "find_fault"]

BUSY_TIMEOUT = 60.0
"""Seconds that a connection waits for another writer."""

_EXPECTED = "expected a SQLite database that Optuna made"
_COPY = "restore it from a copy"


@dataclass(frozen=True)
class Fault:
    """Why a file cannot be used.

    Attributes:
        what: the end of a sentence that begins with the file.
        advice: what to do about it.
    """

    what: str
    advice: str


def find_fault(path: Path) -> Fault | None:
    """Return what is wrong with a file, None for a whole database of Optuna; changes nothing.

    Reads all of the file: 0.1 s for 100 MB.
    """
    try:
        with path.open("rb") as file:
            head = file.read(65536)
    except OSError as error:
        return Fault(f"cannot be read: {error.strerror}", "check its permissions")
    found = _of_head(path, head)
    if found is not None:
        return found
    try:
        # What a killed process left in the write-ahead log can be read by a writer alone.
        mode = "rw" if os.access(path, os.W_OK) else "ro"
        where = f"file:{path.resolve()}?mode={mode}"
        connection = sqlite3.connect(where, uri=True, timeout=BUSY_TIMEOUT)
        try:
            rows = connection.execute("SELECT name FROM sqlite_master WHERE type='table'")
            tables = {name for (name,) in rows}
            check = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        finally:
            connection.close()
    except sqlite3.OperationalError as error:
        return Fault(f"cannot be read: {error}", "is it in use, or its folder read-only?")
    except sqlite3.DatabaseError as error:
        return Fault(f"is damaged: {error}", _COPY)
    if check != "ok":
        return Fault(f"is damaged: {check.splitlines()[-1]}", _COPY)
    if "studies" not in tables or "version_info" not in tables:
        has = f"the tables {sorted(tables)}" if tables else "no tables"
        return Fault(f"is a SQLite database, but not one of Optuna: it has {has}", _EXPECTED)
    return None


def _of_head(path: Path, head: bytes) -> Fault | None:
    """A file that does not begin as a SQLite database does, or whose end is missing."""
    if not head:
        return Fault("is empty", _EXPECTED)
    if not head.startswith(b"SQLite format 3\0"):
        if b'"op_code"' not in head:
            return Fault("is not a SQLite database", _EXPECTED)
        journal = "a journal of Optuna's JournalStorage, which a torn line makes unreadable"
        return Fault(f"is {journal}", _EXPECTED)
    page, pages = int.from_bytes(head[16:18], "big"), int.from_bytes(head[28:32], "big")
    whole = pages * (65536 if page == 1 else page)
    # What is not merged yet stands in a log.  It is looked for before the size: the last process
    # merges first, and removes the log then.
    logs = [path.with_name(f"{path.name}-{end}") for end in ("wal", "journal")]
    if any(log.exists() and log.stat().st_size for log in logs):
        return None
    size = path.stat().st_size
    return Fault(f"is torn: {size} of its {whole} bytes are left", _COPY) if size < whole else None
