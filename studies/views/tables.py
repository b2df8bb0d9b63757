"""Tables for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from studies.record import State, TrialRecord
from studies.views.objectives import leading, objectives

if TYPE_CHECKING:
    from studies.views.readable import Readable

__all__ = [
    "base_name",
    "names_table",
    "number",
    "state_word",
    "trial_cells",
    "trial_headings",
    "trials_table",
    "value_text",
]


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


def base_name(label: str) -> str:
    """The hyperparameter of a column or of a mangled name: ``wd[0]``, ``wd.min``, ``n@a=b``."""
    return label.split("@")[0].split("[")[0].split(".")[0]


def state_word(state: State) -> str:
    """A state on a screen: a trial that is stored as running may be paused, or interrupted."""
    return "open" if state == "running" else state


def trial_headings(study: Readable) -> list[str]:
    """Headings of `trial_cells`: each objective, and the same metric of the test split."""
    names = objectives(study.optuna)
    tests = [name.replace("val ", "test ", 1) for name in names if name.startswith("val ")]
    return ["trial", "", "state", *names, *tests, "cost"]


def trial_cells(study: Readable, record: TrialRecord, lead: Collection[int]) -> list[str]:
    """Number, mark, state, values and cost of a trial.

    Args:
        study: of the trial.
        record: the trial.
        lead: numbers of the trials that are marked, as the best one or as the front.
    """
    names = objectives(study.optuna)
    mark = "" if record.feasible else "violates"
    if record.number in lead:
        mark = "best" if len(names) == 1 else "front"
    tests = [name.replace("val ", "test/", 1) for name in names if name.startswith("val ")]
    return [
        str(record.number),
        mark,
        state_word(record.state),
        *([number(value) for value in record.values] or ["-"] * len(names)),
        *(number(record.metrics.get(test)) for test in tests),
        str(record.cost.equivalent_steps),
    ]


def trials_table(study: Readable, records: Sequence[TrialRecord] | None = None) -> Table:
    """One row for each trial of a study, or for some of them; the best one or the front marked."""
    lead = {record.number for record in leading(study)}
    table = Table(
        title=study.name,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for heading in trial_headings(study):
        numeric = heading not in ("", "state")
        table.add_column(heading, justify="right" if numeric else "left", no_wrap=True)
    table.add_column("chosen by the sampler", overflow="fold")
    for record in study.trials if records is None else records:
        chosen = "  ".join(f"{name}={value_text(value)}" for name, value in record.params.items())
        text = str(record.failure) if record.failure else chosen
        style = "bold" if record.number in lead else ""
        table.add_row(*trial_cells(study, record, lead), Text(text), style=style)
    return table


def names_table(rows: Mapping[str, str]) -> Table:
    """Names with one line about each."""
    table = Table(show_header=False, box=None, padding=(0, 1, 0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, line in rows.items():
        table.add_row(name, line)
    return table
