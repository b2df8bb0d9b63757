"""Environments of the peers: one small folder each, on top of the packages of this one."""

from __future__ import annotations

import importlib.util
import os
import pkgutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from benchmarks.hypergrad import peers
from benchmarks.hypergrad.library import Library
from benchmarks.hypergrad.worker import load

__all__ = ["PEERS", "ROOT", "Environment", "cache_folder", "environment", "set_up"]

PEERS = sorted(module.name for module in pkgutil.iter_modules(peers.__path__))
ROOT = Path(__file__).parents[2]


def cache_folder() -> Path:
    """Return where references and environments are kept, unless told otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "bilevel-benchmarks").expanduser()


@dataclass(frozen=True)
class Environment:
    """How to run a worker of a library.

    Attributes:
        python: the interpreter.
        first: folder that goes before ours on the path: some peers are named `hypergrad` too.
        missing: why it cannot run, and what to do; None if it can.
    """

    python: str
    first: Path | None = None
    missing: str | None = None

    def variables(self) -> dict[str, str]:
        """Return the environment variables: one thread everywhere, our folder on the path."""
        path = [str(p) for p in (self.first, ROOT) if p is not None]
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
        return {
            **os.environ,
            **threads,
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONWARNINGS": "ignore",
            "NPROC": "1",  # threads of JAX
            "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
        }


def environment(name: str, cache: Path, sources: dict[str, Path]) -> Environment:
    """Return how to run a library, or why it cannot run."""
    library = load(name)
    if library.source:
        if library.source not in sources:
            option = f"--{library.source} PATH"
            return Environment(sys.executable, missing=f"not installed: fetch it, give {option}")
        return Environment(sys.executable, sources[library.source])
    if library.requirements:
        packages, python = _folder(name, cache)
        if not python.exists():
            command = f"python -m benchmarks.hypergrad --setup {name}"
            return Environment("", missing=f"not installed: {command}")
        return Environment(str(python), packages)
    absent = [m for m in library.modules if importlib.util.find_spec(m) is None]
    if absent:
        return Environment("", missing=f"not installed: pip install {' '.join(absent)}")
    return Environment(sys.executable)


def set_up(library: Library, cache: Path) -> None:
    """Create the environment of a peer; it sees the packages of this one, torch among them.

    Raises:
        subprocess.CalledProcessError: an installation failed.
    """
    if not library.requirements:
        return
    packages, python = _folder(library.name, cache)
    folder = packages.parents[2]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", "--clear", folder], check=True)
    (packages / "zz_shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # Without dependencies: these libraries ask for old versions of what we have.
    options = ["--quiet", "--no-deps", "--ignore-requires-python", "--ignore-installed"]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", *options]
    subprocess.run([*pip, *library.requirements], check=True)


def _folder(name: str, cache: Path) -> tuple[Path, Path]:
    """Return where packages go, and the interpreter."""
    folder = cache / "env" / name
    variables = {"base": str(folder), "platbase": str(folder)}
    return (
        Path(sysconfig.get_path("purelib", "venv", variables)),
        Path(sysconfig.get_path("scripts", "venv", variables)) / "python",
    )
