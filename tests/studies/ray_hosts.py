"""Ray started by ``ray start``, as on a cluster: on this host, or in network namespaces."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from bilevel.metrics import Metrics
from tests.studies.trials import Walker

__all__ = ["ROOT", "Gated", "Host", "free_port", "new_token", "two_hosts"]

ROOT = Path(__file__).parents[2]


def new_token() -> str:
    return secrets.token_hex(32)


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


class Gated(Walker):
    """Stands after step 8 until the file that GATE names exists, however slow its host is."""

    name: ClassVar[str] = "gated"

    def step(self) -> Metrics:
        """Walk, or wait at the gate."""
        while self.steps == 8 and "GATE" in os.environ and not Path(os.environ["GATE"]).exists():
            time.sleep(0.05)
        return super().step()


@dataclass
class Host:
    """A host, or a namespace that looks like one; `environment` is that of its daemons."""

    folder: Path
    environment: dict[str, str]
    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.environment = {"GATE": str(self.folder / "open"), **self.environment}

    def open_gate(self) -> None:
        """Let trials of `Gated` go on; all hosts of a folder have the same gate."""
        (self.folder / "open").touch()

    def start(self, *where: str) -> None:
        """``ray start`` with one CPU; `where` is ``--head --port=N`` or ``--address=...``."""
        # Sockets below it: their paths have at most 107 characters.
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", *where]
        command += ["--num-cpus=1", f"--node-ip-address={self.address}", "--disable-usage-stats"]
        if "--head" in where:
            command += ["--include-dashboard=false", f"--temp-dir={self.folder}"]
        environment = {
            **os.environ, "RAY_AUTH_MODE": "token", **self.environment,
            "PYTHONPATH": str(ROOT), "RAY_HOST_OF_TEST": self.mark,
        }  # fmt: skip
        # Not a pipe: the daemons would keep it open.
        with (self.folder / f"{self.mark}.log").open("w+") as log:
            ended = subprocess.run(
                [*self.prefix, *command], env=environment, stdout=log, stderr=log, timeout=120
            )
            log.seek(0)
            assert ended.returncode == 0, log.read()

    def processes(self) -> set[int]:
        """Ray's daemons on it and all below them (a worker hides its environment)."""
        found: set[int] = set()
        above = [pid for pid in _all() if self.mark.encode() in _read(pid, "environ")]
        while above:
            pid = above.pop()
            if pid not in found:
                found.add(pid)
                above += map(int, _read(pid, f"task/{pid}/children").split())
        return found

    def kill_daemon(self, name: str) -> None:
        """End one daemon of Ray on it ("raylet", "gcs_server"); the others are left to see it."""
        paths = {pid: _read(pid, "cmdline").split(b"\0")[0] for pid in self.processes()}
        (daemon,) = (pid for pid, path in paths.items() if path.endswith(f"/{name}".encode()))
        os.kill(daemon, signal.SIGKILL)

    def kill(self) -> None:
        """End Ray on it at once."""
        while alive := self.processes():
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)

    def bilevel(self, *args: object, **environment: str) -> subprocess.Popen[str]:
        """``bilevel ARGS`` on it, with its token, in its folder."""
        return subprocess.Popen(
            [*self.prefix, sys.executable, "-m", "bilevel", *map(str, args)],
            env={**os.environ, **self.environment, **environment, "PYTHONPATH": str(ROOT)},
            cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip


@contextlib.contextmanager
def two_hosts(folder: Path, environment: dict[str, str]) -> Iterator[tuple[Host, Host]]:
    """Two network namespaces joined by a cable; skips where that is not allowed."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    tag = uuid.uuid4().hex[:6]
    names = [f"bi-{tag}-{i}" for i in range(2)]
    hosts = [
        Host(folder, environment, ("ip", "netns", "exec", name), f"10.77.0.{i + 1}")
        for i, name in enumerate(names)
    ]
    try:
        for name in names:
            made = _ip("netns", "add", name)
            if made.returncode != 0:
                pytest.skip(f"network namespaces are not allowed: {made.stderr.strip()}")
        ends = [f"bi{tag}{i}" for i in range(2)]
        steps = [["link", "add", ends[0], "type", "veth", "peer", "name", ends[1]]]
        for name, end, host in zip(names, ends, hosts, strict=True):
            steps += [
                ["link", "set", end, "netns", name],
                ["-n", name, "addr", "add", f"{host.address}/24", "dev", end],
                ["-n", name, "link", "set", end, "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ]
        for step in steps:
            done = _ip(*step)
            assert done.returncode == 0, f"ip {' '.join(step)}: {done.stderr}"
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.kill()
        for name in names:
            _ip("netns", "del", name)


def _ip(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=False)


def _all() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
