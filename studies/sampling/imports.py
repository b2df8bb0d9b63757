"""Trials of an earlier study, or rows of a table, as observations that a sampler learns from."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from bilevel.checks import did_you_mean
from bilevel.domains import Choice, Int, Switch
from bilevel.space import Space

__all__ = ["Rows", "observations"]

Rows = Iterable[Mapping[str, Any]] | str | PathLike[str]


def observations(
    source: optuna.Study | Rows, space: Space, metrics: Sequence[str], name: str
) -> list[FrozenTrial]:
    """Return finished trials to add to a study.

    Args:
        source: an Optuna study, a CSV file, or rows: mappings with a value for each active sampled
            name and one for each metric.
        space: of the study; values outside it are refused.
        metrics: of the study.
        name: of the source, stored with each trial.

    Raises:
        ValueError: a missing or unknown column, a value outside its domain, or a metric that is
            not a finite number; names the row.
    """
    if isinstance(source, optuna.Study):
        done = source.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        pairs = [(dict(t.params), list(t.values), f"{name}, trial {t.number}") for t in done]
    else:
        rows = _csv(Path(source), space) if isinstance(source, str | PathLike) else list(source)
        pairs = [
            _split(dict(row), space, metrics, f"{name}, row {i}") for i, row in enumerate(rows)
        ]
    known = space.to_optuna()
    found = []
    for params, values, where in pairs:
        try:
            space.values_from_params({k: v for k, v in params.items() if k in known})
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        if len(values) != len(metrics) or not all(math.isfinite(v) for v in values):
            raise ValueError(
                f"{where}: expected a finite value of {', '.join(metrics)}, but got {values}."
            )
        mine = {label: value for label, value in params.items() if label in known}
        found.append(
            create_trial(
                state=TrialState.COMPLETE,
                values=values,
                params=mine,
                distributions={label: known[label] for label in mine},
                user_attrs={"imported": name},
            )
        )
    return found


def _split(
    row: dict[str, Any], space: Space, metrics: Sequence[str], where: str
) -> tuple[dict[str, Any], list[float], str]:
    """Return params by mangled names and the metrics of a row."""
    columns = [*space.sampled, *metrics]
    for column in row:
        if column not in columns:
            raise ValueError(f"{where}: unknown column {column!r}; {did_you_mean(column, columns)}")
    for metric in metrics:
        if metric not in row:
            raise ValueError(f"{where}: column {metric!r} is missing; got {', '.join(row)}.")
    values = [float(row.pop(metric)) for metric in metrics]
    missing = [n for n in space.sampled if n not in row and not space[n].when]
    if missing:
        raise ValueError(f"{where}: column {missing[0]!r} is missing; got {', '.join(row)}.")
    try:
        return space.to_params(row), values, where
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _csv(path: Path, space: Space) -> list[dict[str, Any]]:
    """Read a table; an empty cell is an inactive name."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(file)]
    return [{name: _read(space, name, text) for name, text in row.items()} for row in rows]


def _read(space: Space, name: str, text: str) -> Any:
    domain = space.get(name)
    if isinstance(domain, Int):
        return int(text)
    if isinstance(domain, Switch):
        return {"true": True, "false": False}.get(text.lower(), text)
    if isinstance(domain, Choice):
        by_text = {str(option): option for option in domain.values}
        return by_text.get(text, text)
    return text if domain is None else float(text)
