"""What is told of a trial of a Ray Tune sweep: its end, and the attributes of a `TrialRecord`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import Trial, TrialState
from ray.air.constants import TRAINING_ITERATION

from studies.ray.trainable import FAILURE, RECORD
from studies.storage.all_trials import all_trials

__all__ = ["fail", "finite", "prune", "tell"]


def tell(
    study: optuna.Study,
    trial: Trial,
    metrics: Sequence[str],
    result: Mapping[str, Any],
    stopped: str | None,
) -> None:
    """Tell what became of a trial, from its last report and who stopped it, if anybody did."""
    note(trial, result)
    if f"{FAILURE}/kind" in result:
        fail(study, trial, result[f"{FAILURE}/kind"], result[f"{FAILURE}/message"])
        return
    values = []
    for name in metrics:
        if name not in result:
            fail(study, trial, "exception", f"the last report has no metric {name!r}")
            return
        value = finite(result[name])
        if value is None:
            fail(study, trial, "not finite", f"{name} is {result[name]!r}")
            return
        values.append(value)
    if len(values) == 1:  # the last report is told here alone
        step = int(result.get(TRAINING_ITERATION, 0))
        if step not in all_trials(study)[trial.number].intermediate_values:
            trial.report(values[0], step)
    if stopped is not None:
        prune(study, trial, stopped)
        return
    study.tell(trial, values)


def note(trial: Trial, result: Mapping[str, Any]) -> None:
    """Store the constraints and attributes that a trial reported, in the form of our studies."""
    for name, value in json.loads(result.get(RECORD, "{}")).items():
        trial.set_user_attr(name, value)
    for name, value in result.items():
        if name.startswith("constraint/"):
            label, excess = name.removeprefix("constraint/"), finite(value)
            if label not in trial.constraints:
                trial.set_constraint(label, math.inf if excess is None else excess)
        elif name.startswith("attr/"):
            label = name.removeprefix("attr/")
            try:
                json.dumps(value := getattr(value, "item", lambda v=value: v)())
            except TypeError as error:
                value = f"not stored: {error}"
            trial.set_user_attr(label, value)


def fail(study: optuna.Study, trial: Trial, kind: str, message: str) -> None:
    """Tell that a trial failed, and why."""
    trial.set_user_attr("failure", {"kind": kind, "message": message})
    study.tell(trial, state=TrialState.FAIL)


def prune(study: optuna.Study, trial: Trial, reason: str) -> None:
    """Tell that a trial was stopped before its end, and by whom."""
    trial.set_user_attr("run", {**trial.user_attrs.get("run", {}), "status": reason})
    study.tell(trial, state=TrialState.PRUNED)


def finite(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
