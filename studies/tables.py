"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from studies.doctor import Finding
from studies.record import TrialRecord

if TYPE_CHECKING:
    from studies.readable import Readable

__all__ = ["findings_table", "names_table", "number", "trials_table", "value_text"]


def number(value: float | None) -> str:
    """A number in four digits, "-" for none."""
    return "-" if value is None else f"{value:.4f}"


def value_text(value: Any) -> str:
    """A stored hyperparameter value in a few characters."""
    if isinstance(value, Mapping):
        shape = "×".join(map(str, value["shape"]))
        return f"{shape} values {value['min']:.2g}…{value['max']:.2g}"
    if isinstance(value, list):
        return "[" + ", ".join(value_text(v) for v in value) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def trials_table(study: Readable, records: Sequence[TrialRecord] | None = None) -> Table:
    """One row for each trial of a study, or for some of them."""
    table = Table(title=study.name, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("trial", "state", "val loss", "test loss", "cost"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("chosen by the sampler")
    for record in study.trials if records is None else records:
        table.add_row(*_trial_row(record))
    return table


def _trial_row(record: TrialRecord) -> Sequence[str]:
    text = "  ".join(f"{name}={value_text(value)}" for name, value in record.params.items())
    return (
        str(record.number),
        record.state,
        number(record.metrics.get("val/loss")),
        number(record.metrics.get("test/loss")),
        str(record.cost.equivalent_steps),
        str(record.failure) if record.failure else text,
    )


def names_table(rows: Mapping[str, str]) -> Table:
    """Names with one line about each."""
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, line in rows.items():
        table.add_row(name, line)
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """What `bilevel doctor` found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    colors = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        mark = f"[{colors[finding.level]}]{finding.level}[/]"
        text = finding.value + (f"\n-> {finding.advice}" if finding.advice else "")
        table.add_row(mark, finding.topic, text)
    return table
