"""Workers that load while the command line itself still does: torch takes seconds to import."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studies.executors import server

__all__ = ["start_workers_early"]


def start_workers_early(source: Path, workers: int | None) -> None:
    """Start the server of worker processes, where a study is going to have several.

    Args:
        source: ``STUDY.toml``, or the ``spec.json`` of a study's folder.
        workers: those of the command line; None where it does not say.
    """
    run = {**_run_table(source), **({} if workers is None else {"workers": workers})}
    executor = run.get("executor", "auto")
    name = executor.get("name") if isinstance(executor, Mapping) else executor
    several = isinstance(run.get("workers"), int) and run["workers"] > 1
    if name in ("pool", "Processes") or (name == "auto" and several):
        server.start("studies.cli")


def _run_table(source: Path) -> dict[str, Any]:
    """How a study is run; empty for what is no table: reading it properly comes later."""
    if source.suffix not in (".toml", ".json") or not source.is_file():
        return {}
    try:
        text = source.read_text(encoding="utf-8")
        table = tomllib.loads(text) if source.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError):  # said in a sentence by whoever needs the rest of it
        return {}
    run = table.get("run")
    return dict(run) if isinstance(run, Mapping) else {}
