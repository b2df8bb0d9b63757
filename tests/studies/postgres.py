"""A PostgreSQL server for tests: its own cluster on a free port of the loopback interface."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["server"]


@contextmanager
def server() -> Iterator[str]:
    """Yield the URL of an empty database; skips where there is no PostgreSQL or no driver."""
    pytest.importorskip("psycopg", reason="psycopg is not installed")
    found = shutil.which("initdb") or next(
        iter(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb"))), None
    )
    if found is None:
        pytest.skip("PostgreSQL is not installed")
    programs = Path(found).resolve().parent
    user = _user()
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        data = Path(folder, "data")
        if user is not None:  # PostgreSQL refuses to run as root
            os.chmod(folder, 0o755)
            data.mkdir()
            shutil.chown(data, user.pw_name)

        def run(*command: str) -> None:
            subprocess.run(
                command, check=True, capture_output=True, cwd="/",
                user=None if user is None else user.pw_uid,
                group=None if user is None else user.pw_gid,
                extra_groups=None if user is None else [],
            )  # fmt: skip

        run(str(programs / "initdb"), "-D", str(data), "-U", "test", "-A", "trust")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={data}"
        control = str(programs / "pg_ctl")
        log = str(data / "log")
        run(control, "-D", str(data), "-l", log, "-w", "-o", options, "start")
        try:
            yield f"postgresql://test@127.0.0.1:{port}/postgres"
        finally:
            run(control, "-D", str(data), "-m", "immediate", "stop")


def _user() -> pwd.struct_passwd | None:
    """Whom to run as: another one than root."""
    if os.getuid() != 0:
        return None
    names = [entry.pw_name for entry in pwd.getpwall()]
    return pwd.getpwnam("postgres" if "postgres" in names else "nobody")
