"""Workers that load while the command line itself still does: torch takes seconds to import."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.executors import server

__all__ = ["start_workers_early"]


def start_workers_early(given: Mapping[str, Any], file: Path | None = None) -> None:
    """Start the server of worker processes, where a study is going to have several.

    Args:
        given: arguments of `Study.run` from the command line.
        file: ``STUDY.toml``, with those that the command line leaves out.
    """
    run = {**({} if file is None else _run_table(file)), **given}
    executor = run.get("executor", "auto")
    name = executor.get("name") if isinstance(executor, Mapping) else executor
    several = isinstance(run.get("workers"), int) and run["workers"] > 1
    if name in ("pool", "Processes") or (name == "auto" and several):
        server.start("studies.commands.cli")


def _run_table(file: Path) -> dict[str, Any]:
    """How a study is run; empty for what is no table: reading it properly comes later."""
    if file.suffix != ".toml" or not file.is_file():
        return {}
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # said in a sentence by whoever needs the rest of it
        return {}
    run = table.get("run")
    return dict(run) if isinstance(run, Mapping) else {}
