"""Optuna trials as JSON and back: a study in memory, stored without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from optuna.distributions import distribution_to_json, json_to_distribution
from optuna.trial import FrozenTrial, TrialState, create_trial

__all__ = ["trial_from_json", "trial_to_json"]


def trial_to_json(trial: FrozenTrial) -> dict[str, Any]:
    """Return a trial, finished or not, as what `json.dumps` takes."""
    return {
        "state": trial.state.name,
        "values": trial.values,
        "params": {
            name: [distribution_to_json(d), d.to_internal_repr(trial.params[name])]
            for name, d in trial.distributions.items()
        },
        "user": trial.user_attrs,
        "system": trial.system_attrs,
        "rungs": list(trial.intermediate_values.items()),
        "start": trial.datetime_start and trial.datetime_start.isoformat(),
        "complete": trial.datetime_complete and trial.datetime_complete.isoformat(),
    }


def trial_from_json(stored: Mapping[str, Any]) -> FrozenTrial:
    """Return the trial that `trial_to_json` wrote, to be added to a study."""
    known = {name: json_to_distribution(text) for name, (text, _) in stored["params"].items()}
    trial = create_trial(
        state=TrialState[stored["state"]],
        values=stored["values"],
        params={n: known[n].to_external_repr(v) for n, (_, v) in stored["params"].items()},
        distributions=known,
        user_attrs=stored["user"],
        system_attrs=stored["system"],
        intermediate_values=dict(stored["rungs"]),
    )
    for name in ("start", "complete"):
        if stored[name] is not None:
            setattr(trial, f"datetime_{name}", datetime.fromisoformat(stored[name]))
    return trial
