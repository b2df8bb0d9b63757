"""Trials as a table: CSV, Parquet, JSON."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from studies.record import TrialRecord
from studies.storage.all_trials import all_trials
from studies.storage.database import StorageError
from studies.views.stored import StoredStudy

__all__ = ["export_study", "rows"]


def rows(study: StoredStudy) -> list[dict[str, Any]]:
    """Return one flat row for each trial.

    Columns: ``number, state, value, seed, status, failure, started, ended``, then ``params.*``
    by Optuna's names, ``hparams.*`` at the end of the trial, the metrics, ``cost.*`` and
    ``rung.*``.  Lists and quantiles of tensors get a column each, such as ``hparams.lam[0]``.
    """
    table = []
    for trial in all_trials(study.optuna):
        record = TrialRecord.of(trial)
        row: dict[str, Any] = {
            "number": record.number,
            "state": record.state,
            "value": record.value,
            "seed": record.seed,
            "status": record.status or None,
            "failure": None if record.failure is None else str(record.failure),
            "started": trial.datetime_start and trial.datetime_start.isoformat(),
            "ended": trial.datetime_complete and trial.datetime_complete.isoformat(),
        }
        row |= {f"params.{name}": value for name, value in record.params.items()}
        for name, value in record.hparams.items():
            row |= _flat(f"hparams.{name}", value)
        row |= dict(record.metrics)
        if record.state not in ("running", "waiting"):
            row |= {f"cost.{name}": value for name, value in asdict(record.cost).items()}
        row |= {f"rung.{rung}": value for rung, value in sorted(record.rungs.items())}
        table.append(row)
    columns = dict.fromkeys(name for row in table for name in row)
    return [{name: row.get(name) for name in columns} for row in table]


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        shape = "x".join(map(str, value["shape"]))
        rest = {f"{name}.{key}": number for key, number in value.items() if key != "shape"}
        return {f"{name}.shape": shape, **rest}
    if isinstance(value, list):
        return {
            k: v for i, part in enumerate(value) for k, v in _flat(f"{name}[{i}]", part).items()
        }
    return {name: value}


def export_study(study: StoredStudy, form: str, to: Path | None) -> None:
    """Write the trials as ``csv``, ``parquet`` or ``json`` to a file or to standard output.

    Raises:
        StorageError: the file cannot be written.
        ValueError: Parquet to a terminal.
    """
    table = rows(study)
    if form == "parquet":
        _parquet(table, to)
        return
    if to is None:
        _text(table, form, sys.stdout)
        return
    try:
        with to.open("w", newline="", encoding="utf-8") as file:
            _text(table, form, file)
    except OSError as error:
        raise StorageError(f"--to: cannot write {str(to)!r}: {error.strerror}.") from error


def _text(table: list[dict[str, Any]], form: str, file: TextIO) -> None:
    if form == "json":
        json.dump(table, file, indent=1)
        file.write("\n")
        return
    writer = csv.DictWriter(file, list(table[0]) if table else ["number"])
    writer.writeheader()
    writer.writerows(table)


def _parquet(table: list[dict[str, Any]], to: Path | None) -> None:
    import pyarrow
    from pyarrow import parquet

    if to is None and sys.stdout.isatty():
        raise ValueError("parquet is not for a terminal; give a file with --to.")
    columns = list(table[0]) if table else ["number"]
    data = {name: _column([row[name] for row in table]) for name in columns}
    made = pyarrow.table(data)
    if to is None:
        parquet.write_table(made, sys.stdout.buffer)
        return
    try:
        with to.open("wb") as file:
            parquet.write_table(made, file)
    except OSError as error:
        raise StorageError(f"--to: cannot write {str(to)!r}: {error.strerror}.") from error


def _column(values: list[Any]) -> list[Any]:
    """One type in a column: options of several types become texts."""
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) <= 1 or kinds == {int, float}:
        return values
    return [None if value is None else str(value) for value in values]
