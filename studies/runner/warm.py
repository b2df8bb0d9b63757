"""Warm starts: a new trial's gradient-owned values begin where the nearest finished trial ended."""

from __future__ import annotations

import math
from typing import Any

from optuna.trial import Trial, TrialState
from torch import Tensor

from bilevel.space import Space
from studies.runner.ledger import Ledger
from studies.sampling.spaces import distance

__all__ = ["warm_values"]


def warm_values(
    ledger: Ledger, space: Space, trial: Trial, values: dict[str, Any]
) -> dict[str, Any]:
    """Return the values with those of the nearest complete trial that the gradient had tuned.

    Of the better half of those whose outer loss fell: the nearest by what the sampler chose (see
    `studies.sampling.spaces.distance`), among equals the better one.  The choice is stored in the
    trial, so that a resumed study makes no other.
    """
    known = ledger.get(trial.number).user_attrs
    if "start" not in known:
        ledger.attribute(trial, "start", _nearest(ledger, space, trial))
    source = known["start"]
    found = None if source is None else ledger.start_values(source)
    if found is None:
        return values
    fits = {n: v for n, v in found.items() if n in values and _shape(v) == _shape(values[n])}
    return {**values, **fits}


def _nearest(ledger: Ledger, space: Space, trial: Trial) -> int | None:
    sign = ledger.signs[0]
    tuned = sorted(
        (sign * other.values[0], other.number)
        for other in ledger.trials()
        if other.state is TrialState.COMPLETE
        and other.user_attrs.get("by") != "sampler"
        and other.number < trial.number
        and ledger.has_start_values(other.number)
    )
    candidates = [
        (distance(space, trial.params, ledger.get(number).params), value, number)
        for value, number in tuned[: math.ceil(len(tuned) / 2)]
    ]
    return min(candidates)[2] if candidates else None


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) else ()
