"""`bilevel study best`, `show` and `compare`: one trial, its values, and studies side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from bilevel.describe import differences
from studies.record import TrialRecord
from studies.views.objectives import front_of, leading, objectives, value_texts
from studies.views.readable import best_of
from studies.views.stored import StoredStudy, study_names
from studies.views.summary import as_json, describe_values, moves
from studies.views.tables import number as digits
from studies.views.tables import state_word, value_text

__all__ = [
    "best_values",
    "compared",
    "compared_view",
    "final_values",
    "to_compare",
    "trial_data",
    "trial_view",
]


LONG = 160
"""Characters of a difference that are shown."""


def final_values(study: StoredStudy, record: TrialRecord) -> dict[str, Any]:
    """Return the hyperparameters that came out of a trial.

    A tensor that the record holds as quantiles is read from the schedule, which keeps more of
    it; where that has quantiles only, the record's summary stays.
    """
    values: dict[str, Any] = dict(record.hparams or record.params)
    large = [name for name, value in values.items() if isinstance(value, Mapping)]
    schedule = study.schedule(record.number) if large else None
    for name in large:
        if schedule is not None and name in schedule:
            row = schedule.rows(record.at or record.cost.steps) - 1
            values[name] = schedule[name][row].tolist()
    return values


def best_values(study: StoredStudy, form: str) -> str:
    """Return the best trial's hyperparameters as ``yaml``, ``json``, ``py`` or ``toml`` text."""
    values = final_values(study, study.best)
    if form == "json":
        return json.dumps(values, indent=1)
    if form == "py":
        lines = "".join(f"    {name!r}: {value!r},\n" for name, value in values.items())
        return f"hparams = {{\n{lines}}}"
    if form == "toml":
        return "\n".join(f"{name} = {_toml(v)}" for name, v in values.items() if v is not None)
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False)).rstrip("\n")


def _toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):  # 1e-05 is TOML too, and reads back equal
        return repr(value)
    return json.dumps(value, ensure_ascii=False)


def trial_data(study: StoredStudy, number: int) -> dict[str, Any]:
    """Return a trial with everything that is stored of it, as plain data."""
    trial = study.trial(number)
    record = TrialRecord.of(trial)
    times = {
        "started": trial.datetime_start and trial.datetime_start.isoformat(),
        "ended": trial.datetime_complete and trial.datetime_complete.isoformat(),
    }
    return {
        **as_json(record),
        **times,
        "versions": trial.user_attrs.get("versions"),
        "artifacts": sorted(study.artifacts(number)),
        "traceback": study.artifact("traceback.txt", number) if record.failure else None,
    }


def trial_view(study: StoredStudy, number: int) -> RenderableType:
    """The same for a screen."""
    record = TrialRecord.of(study.trial(number))
    parts: list[RenderableType] = []
    head = Table(show_header=False, box=None, pad_edge=False)
    head.add_column(style="bold")
    head.add_column()
    lead = {other.number for other in leading(study)}
    names = objectives(study.optuna)
    mark = ("best" if len(names) == 1 else "front") if record.number in lead else ""
    words = [
        state_word(record.state),
        *([mark] if mark else []),
        *value_texts(names, record.values),
    ]
    head.add_row("trial", f"{record.number} of {study.name}: {', '.join(words)}")
    if not record.feasible:
        over = {name: excess for name, excess in record.constraints.items() if excess > 0}
        head.add_row("violates", Text(describe_values(over) + " above the limit"))
    if record.failure is not None:
        head.add_row("failure", Text(str(record.failure)))
    if record.status:
        head.add_row("ended", record.status)
    if record.at is not None:
        best = f"after {record.at} of {record.cost.steps} steps: values and weights are of then"
        head.add_row("best", best)
    if record.rungs:
        at = "  ".join(f"{rung}={value:.4f}" for rung, value in sorted(record.rungs.items()))
        head.add_row("rungs", at)
    cost = record.cost
    head.add_row(
        "cost",
        f"{cost.steps} steps, {cost.gradients} gradients, {cost.hvps} Hessian-vector products, "
        f"{cost.seconds:.1f} s",
    )
    if record.seed is not None:
        head.add_row("seed", str(record.seed))
    metrics = {n: v for n, v in sorted(record.metrics.items()) if not n.startswith("cost/")}
    if metrics:
        head.add_row("metrics", Text("  ".join(f"{n}={v:.4g}" for n, v in metrics.items())))
    if files := sorted(study.artifacts(number)):
        head.add_row("artifacts", ", ".join(files))
    parts.append(head)
    parts += ["", _values_table(study, record)]
    if record.failure is not None and (trace := study.artifact("traceback.txt", number)):
        parts += ["", Text(trace.rstrip(), style="dim")]
    return Group(*parts)


def _values_table(study: StoredStudy, record: TrialRecord) -> Table:
    """Each hyperparameter, who owns it, and where it ended."""
    schedule = study.schedule(record.number)
    moved = {} if schedule is None or record.failure else moves(schedule, record.hparams)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("hyperparameter", "owner", "value"):
        table.add_column(heading)
    for name, value in (record.hparams or record.params).items():
        text = moved[name].replace("->", " → ") if name in moved else value_text(value)
        table.add_row(name, study.owner(record, name), Text(text))
    return table


def to_compare(targets: Sequence[str], names: Sequence[str]) -> dict[str, StoredStudy]:
    """Return the studies at the targets, or those of one database, by what a table calls them.

    Raises:
        ValueError: fewer than two studies, one of them twice, or names and several targets.
        StorageError: there is nothing, or no study of this name, at a target.
    """
    if len(targets) == 1:
        names = names or study_names(targets[0])
        found = {name: StoredStudy(targets[0], name) for name in names}
    elif names:
        raise ValueError(f"--study chooses among the studies of one database, but got {targets}.")
    else:
        found = {target: StoredStudy(target) for target in targets}
    if len(found) < max(2, len(targets), len(names)):
        given = ", ".join(map(repr, names or targets))
        raise ValueError(f"compare needs at least two studies, each once, but got {given}.")
    return found


def compared(studies: Mapping[str, StoredStudy]) -> dict[str, Any]:
    """Return studies side by side as plain data; differences are to the first one."""
    rows, lines = [], []
    first = next(iter(studies.values()))
    for target, study in studies.items():
        records = study.trials
        best = best_of(study.optuna)
        rows.append(
            {
                "target": target,
                "study": study.name,
                "learner": study.learner_name,
                "task": study.task_name,
                "objectives": list(objectives(study.optuna)),
                "directions": [d.name.lower() for d in study.optuna.directions],
                "trials": len(records),
                "complete": sum(r.state == "complete" for r in records),
                "equivalent_steps": sum(r.cost.equivalent_steps for r in records),
                "seconds": sum(r.cost.seconds for r in records),
                "best": None if best is None else as_json(best),
                "front": [as_json(record) for record in front_of(study.optuna)],
            }
        )
        if study is not first:
            for line in _settings_differences(first, study):
                lines.append(f"{target}: {line if len(line) < LONG else line[:LONG] + ' ...'}")
    return {"studies": rows, "differences": lines}


def _settings_differences(first: StoredStudy, other: StoredStudy) -> Iterator[str]:
    """What differs in the settings, the budget and the space."""
    mine, its = (
        {**study.settings, **study.optuna.user_attrs.get("search", {}),
         "run": study.optuna.user_attrs.get("run")}
        for study in (first, other)
    )  # fmt: skip
    for key in dict.fromkeys([*mine, *its]):
        if key != "space":
            for line in differences(mine.get(key), its.get(key), key):
                yield line.replace(" before, ", " first, ").replace(" now", " here")
    yield from (f"space: {line}" for line in first.space.differences(other.space))


def compared_view(found: Mapping[str, Any]) -> list[RenderableType]:
    """The same for a screen.

    A row for each study, of several objectives one for each trial of the front; the best value is
    bold where all studies have the same objective and direction.
    """
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for heading in ("study", "learner", "task"):
        table.add_column(heading, overflow="fold")
    studies = found["studies"]
    goals = list(dict.fromkeys(tuple(row["objectives"]) for row in studies))
    values = list(goals[0]) if len(goals) == 1 else ["value"]
    for heading in ("complete", "cost", "seconds", "best", *values, "test loss"):
        table.add_column(heading, justify="right", no_wrap=True)
    winner = _winner(studies)
    for row in studies:
        shown = row["front"] or [row["best"]]
        for place, trial in enumerate(shown):
            first = [
                row["target"],
                row["learner"],
                row["task"],
                f"{row['complete']}/{row['trials']}",
                str(row["equivalent_steps"]),
                f"{row['seconds']:.1f}",
            ]
            cells = first if place == 0 else [""] * len(first)
            table.add_row(*cells, *_trial_cells(trial, row, len(values), winner))
    notes = [f"{row['target']}: {', '.join(_goals(row))}" for row in studies]
    if len({tuple(_goals(row)) for row in studies}) == 1:
        notes = [", ".join(_goals(studies[0]))]
    table.caption = "\n".join(notes)
    table.caption_justify = "left"
    if not found["differences"]:
        return [table, "no settings differ"]
    return [table, "settings that differ:\n  " + "\n  ".join(found["differences"])]


def _goals(row: Mapping[str, Any]) -> list[str]:
    """``val loss is minimized`` for each objective."""
    pairs = zip(row["objectives"], row["directions"], strict=True)
    return [f"{name} is {direction}d" for name, direction in pairs]


def _winner(studies: Sequence[Mapping[str, Any]]) -> float | None:
    """The best value of all studies; None where they are after different things."""
    if len({tuple(_goals(row)) for row in studies}) > 1:
        return None
    values = [float(row["best"]["value"]) for row in studies if row["best"]]
    best = max if studies[0]["directions"] == ["maximize"] else min
    return best(values, default=None)


def _trial_cells(
    trial: Mapping[str, Any] | None, row: Mapping[str, Any], width: int, winner: float | None
) -> list[str]:
    """Number, values and test loss of a study's best trial, or of one of its front."""
    if trial is None:
        return ["-"] * (width + 2)
    values = [digits(value) for value in trial["values"]]
    if width != len(values):  # objectives of several kinds: one column for all of them
        values = [" / ".join(values)]
    if not row["front"] and trial["value"] == winner:
        values = [f"[bold]{value}[/]" for value in values]
    return [str(trial["number"]), *values, digits(trial["metrics"].get("test/loss"))]
