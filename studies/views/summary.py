"""A study and its trials in a few words and as plain data: for screens, pipes and logs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import optuna

from bilevel.schedule import Schedule
from studies.record import State, TrialRecord
from studies.storage.all_trials import all_trials
from studies.views.objectives import front_of, value_texts
from studies.views.readable import best_of
from studies.views.tables import base_name, state_word, value_text

__all__ = [
    "action_line",
    "as_json",
    "counts",
    "describe_values",
    "done_line",
    "middle",
    "moves",
    "summary",
    "trial_line",
]

STATES: tuple[State, ...] = ("complete", "pruned", "failed", "running", "waiting")


def counts(records: Sequence[TrialRecord]) -> dict[str, int]:
    """Return the number of trials in each state."""
    found: Counter[str] = Counter(record.state for record in records)
    return {state: found[state] for state in STATES}


def failures(records: Sequence[TrialRecord]) -> dict[str, int]:
    """Return the number of failed trials by kind of failure."""
    kinds = [r.failure.kind if r.failure else "unknown" for r in records if r.state == "failed"]
    return dict(Counter(kinds).most_common())


def as_json(record: TrialRecord) -> dict[str, Any]:
    """Return a trial as plain data."""
    return {
        **asdict(record),
        "value": record.value,
        "rungs": {str(k): v for k, v in record.rungs.items()},
    }


def summary(study: optuna.Study, records: Sequence[TrialRecord] | None = None) -> dict[str, Any]:
    """Return a study as plain data.

    ``best`` is None without a best trial, and for several objectives, which have a ``front``.

    Args:
        study: the study.
        records: its trials, where they have been read.
    """
    if records is None:
        records = [TrialRecord.of(trial) for trial in all_trials(study)]
    best = best_of(study)
    return {
        "study": study.study_name,
        "trials": len(records),
        **counts(records),
        "failures": failures(records),
        "equivalent_steps": sum(r.cost.equivalent_steps for r in records),
        "seconds": sum(r.cost.seconds for r in records),
        "best": None if best is None else as_json(best),
        "front": [record.number for record in front_of(study)],
    }


def done_line(found: Mapping[str, Any]) -> str:
    """A `summary` in a line.

    ``27 trials (21 complete, 4 pruned, 2 failed: 1 timeout, 1 died)  best 0.3021 (trial 3)``
    """
    parts = [f"{found[state]} {state_word(state)}" for state in STATES if found[state]]
    kinds = ", ".join(f"{n} {kind}" for kind, n in found["failures"].items())
    parts = [f"{part}: {kinds}" if part.endswith("failed") else part for part in parts]
    trials = f"{found['trials']} trial{'s' if found['trials'] != 1 else ''}"
    text = f"{trials} ({', '.join(parts)})" if parts else trials
    best, front = found["best"], found["front"]
    if best is not None:
        return f"{text}  best {best['value']:.4f} (trial {best['number']})"
    if front:
        return f"{text}  front: trial{'s' if len(front) > 1 else ''} {', '.join(map(str, front))}"
    limits = " within the constraints" if found["complete"] else ""
    return f"{text}  no complete trial{limits}"


def action_line(number: int, action: str, text: str) -> str:
    """What happens to a trial, on one line, its columns below those of `trial_line`."""
    return f"trial {number}  {action:<8}  {text}"


def trial_line(
    record: TrialRecord, names: Sequence[str], schedule: Schedule | None = None, note: str = ""
) -> str:
    """One finished trial on one line, the shortest parts first: a screen may cut it.

    ``trial 12  COMPLETE  val loss 0.3127  18 steps  6.3 s  width=64 | lam 0.01->0.00034 (20)``

    Args:
        record: the trial.
        names: of the objectives.
        schedule: of its gradient-owned values, where it has one.
        note: after the values.
    """
    if record.failure is not None:
        return action_line(record.number, record.state.upper(), str(record.failure))
    parts = value_texts(names, record.values)
    parts += [note] if note else []
    parts += [f"{record.cost.steps} steps", f"{record.cost.seconds:.1f} s"]
    first, last = (record.metrics.get(f"g/norm_{end}") for end in ("first", "last"))
    if first is not None and last is not None:
        parts.append(f"|g| {first:.1e}->{last:.1e}")
    # Where the gradient began is in its moves.
    known = () if schedule is None else schedule.names
    chosen = " ".join(
        f"{k}={value_text(v)}" for k, v in record.params.items() if base_name(k) not in known
    )
    moved = "" if schedule is None else _some_moves(moves(schedule, record.hparams))
    parts.append(" | ".join(text for text in (chosen, moved) if text))
    return action_line(record.number, record.state.upper(), "  ".join(parts)).rstrip()


MOST_MOVES = 4
"""Gradient-owned names that a line has room for."""


def _some_moves(found: Mapping[str, str]) -> str:
    shown = [f"{name} {move}" for name, move in list(found.items())[:MOST_MOVES]]
    rest = len(found) - len(shown)
    return "  ".join([*shown, f"+{rest}"] if rest else shown)


def moves(schedule: Schedule, hparams: Mapping[str, Any]) -> dict[str, str]:
    """Return where gradient-owned values began and ended, by name; of a tensor the median.

    Args:
        schedule: its first row has the beginning.
        hparams: of the record: what the weights were trained with last.  (The last row of a
            schedule may be what would have come next.)
    """
    found = {}
    for name in schedule.names:
        size = schedule.size(name)
        start = schedule.summary(name)[0, 2]
        elements = f" ({size})" if size > 1 else ""
        found[name] = f"{start:.3g}->{middle(hparams[name]):.3g}{elements}"
    return found


def middle(value: Any) -> float:
    """Return a stored value as a number, of a tensor the median."""
    if isinstance(value, Mapping):
        return float(value["median"])
    return float(np.median(np.asarray(value, dtype=np.float64)))


def describe_values(values: Mapping[str, Any]) -> str:
    """``width=64 lr=0.1``."""
    return " ".join(f"{name}={value_text(value)}" for name, value in values.items())
