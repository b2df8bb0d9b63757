"""What a study optimizes: names, directions, and which of its trials lead."""

from __future__ import annotations

from collections.abc import Sequence

import optuna

from studies.record import TrialRecord
from studies.storage.leading import front_trials, signs
from studies.views.readable import Readable, best_of

__all__ = ["better", "front_of", "leading", "objectives", "ranked", "value_texts"]


def objectives(study: optuna.Study) -> tuple[str, ...]:
    """Return the name of each objective; "value" for a study that another program made."""
    settings = study.user_attrs.get("settings")
    count = len(study.directions)
    if settings is None:
        return ("value",) if count == 1 else tuple(f"value {i}" for i in range(count))
    return tuple(f"val {metric}" for metric in settings["metric"])


def better(study: optuna.Study) -> tuple[str, ...]:
    """Return "lower is better" or "higher is better" for each objective."""
    words = {1: "lower is better", -1: "higher is better"}
    return tuple(words[sign] for sign in signs(study))


def leading(study: Readable) -> list[TrialRecord]:
    """Return the best trial, or the front of several objectives; none before one is complete."""
    best = best_of(study.optuna)
    return front_of(study.optuna) if best is None else [best]


def front_of(study: optuna.Study) -> list[TrialRecord]:
    """Return the study's own best compromises in order; none with one objective."""
    if len(study.directions) == 1:
        return []
    return [TrialRecord.of(trial) for trial in front_trials(study)]


def ranked(study: Readable) -> list[TrialRecord]:
    """Return the study's own complete and pruned trials, best first.

    The leading ones come first, then complete ones by their first objective, those that violate a
    constraint after the others, and pruned ones last: their values are of fewer steps.
    """
    ended = [
        record
        for record in study.trials
        if record.value is not None
        and record.state in ("complete", "pruned")
        and not record.imported
    ]
    lead = {record.number for record in leading(study)}
    sign = signs(study.optuna)[0]

    def key(record: TrialRecord) -> tuple[bool, bool, bool, float]:
        return (
            record.number not in lead,
            record.state != "complete",
            not record.feasible,
            sign * float(record.value or 0.0),
        )

    return sorted(ended, key=key)


def value_texts(names: Sequence[str], values: Sequence[float]) -> list[str]:
    """``val loss 0.3021`` for each objective; nothing for a trial without values."""
    return (
        []
        if not values
        else [f"{name} {value:.4f}" for name, value in zip(names, values, strict=True)]
    )
