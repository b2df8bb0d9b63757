"""`bilevel study status`: who runs a study, how far it is, what its open trials do."""

from __future__ import annotations

import time
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from studies.record import TrialRecord
from studies.storage.all_trials import all_trials
from studies.views.stored import StoredStudy
from studies.views.summary import describe_values, done_line, summary

__all__ = ["status_of", "status_view", "watch_status"]

EVERY = 2.0
"""Seconds between two looks of `watch_status`."""


def status_of(study: StoredStudy) -> dict[str, Any]:
    """Return the state of a study as plain data.

    ``state`` is "running"; "interrupted", where trials are unfinished and nobody runs them;
    "complete", where it has the trials that it is to have; else "idle".
    """
    trials = all_trials(study.optuna)
    records = [TrialRecord.of(trial) for trial in trials]
    holder = study.holder()
    open_ = [
        {
            "number": record.number,
            "rung": max(record.rungs, default=0),
            "value": record.rungs.get(max(record.rungs, default=0)),
            "params": dict(record.params),
            "since": _iso(trial.datetime_start),
        }
        for trial, record in zip(trials, records, strict=True)
        if record.state == "running"
    ]
    finished = sum(r.state in ("complete", "pruned", "failed") for r in records)
    if holder is not None:
        state = "running"
    elif open_:
        state = "interrupted"
    else:
        state = "complete" if study.planned is not None and finished >= study.planned else "idle"
    return {
        "state": state,
        "holder": holder,
        "learner": study.learner_name,
        "task": study.task_name,
        "planned": study.planned,
        "finished": finished,
        **summary(study.optuna, records),
        "open": open_,
    }


def status_view(study: StoredStudy, found: dict[str, Any]) -> RenderableType:
    """The same for a screen."""
    head = Table(show_header=False, box=None, pad_edge=False)
    head.add_column(style="bold")
    head.add_column()
    state = found["state"] + (f" by {found['holder']}" if found["holder"] else "")
    if found["state"] == "interrupted":
        state += f"; `bilevel study resume {study.folder}` goes on"
    of = "" if found["planned"] is None else f" of {found['planned']}"
    head.add_row("study", f"{study.name}: {study.learner_name} on {study.task_name}")
    head.add_row("state", state)
    head.add_row("trials", f"{found['finished']}{of} finished; {done_line(found)}")
    head.add_row("cost", f"{found['equivalent_steps']} equivalent steps, {found['seconds']:.1f} s")
    if not found["open"]:
        return head
    table = Table(box=None, pad_edge=False)
    for heading in ("open trial", "rung", "value"):
        table.add_column(heading, justify="right")
    table.add_column("chosen by the sampler")
    for trial in found["open"]:
        value = "-" if trial["value"] is None else f"{trial['value']:.4f}"
        chosen = describe_values(trial["params"])
        table.add_row(str(trial["number"]), str(trial["rung"]), value, Text(chosen))
    return Group(head, "", table)


def watch_status(study: StoredStudy) -> None:
    """Show the status again and again until nobody runs the study; Ctrl-C ends the watch only."""
    console = Console()
    if not console.is_terminal:
        while study.holder() is not None:
            time.sleep(EVERY)
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            found = status_of(study)
            live.update(status_view(study, found), refresh=True)
            if found["holder"] is None:
                return
            time.sleep(EVERY)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat(timespec="seconds")
