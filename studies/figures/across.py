"""Figures across trials: values against cost, the front of several objectives, importance.

Each returns None where a study has nothing to show in it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from bilevel.curves import COLORS
from studies.figures.charts import DARK, Bar, Bars, Curves, Line, Mark, Plane, short
from studies.figures.inside import MOST_NAMES, is_log
from studies.record import Kind, TrialRecord
from studies.storage.all_trials import all_trials
from studies.storage.leading import signs
from studies.views.objectives import better, leading, objectives
from studies.views.readable import Readable
from studies.views.summary import middle
from studies.views.tables import base_name

__all__ = ["front", "importance", "importances", "value_by_cost"]

COST = "cost of the study so far (equivalent training steps)"


def value_by_cost(study: Readable) -> Curves | None:
    """Value of each trial, and the best so far, against the cost of all that ended before.

    By who moved the gradient-owned hyperparameters; a plane for each objective.
    """
    spent = _spent(study)
    done = [r for r in _ended(study) if r.values]
    if not done:
        return None
    names, words = objectives(study.optuna), better(study.optuna)
    planes = []
    for i, sign in enumerate(signs(study.optuna)):
        x, y, best = [], [], math.inf
        for record in done:
            if record.state == "complete" and record.feasible:
                best = min(best, sign * record.values[i])
            if math.isfinite(best):
                x.append(spent[record.number])
                y.append(sign * best)
        lines = [
            Line(
                x=[spent[r.number] for r in mine],
                y=[r.values[i] for r in mine],
                texts=[f"trial {r.number}, {r.cost.equivalent_steps} steps" for r in mine],
                width=0.0,
                **look,
            )
            for look, mine in _groups(study, done)
        ]
        if x:
            lines.append(Line("best so far", x, y, DARK, step=True))
        values = [r.values[i] for r in done]
        log = min(values) > 0 and max(values) > 10 * min(values)
        planes.append(Plane(lines, COST, f"{names[i]} ({words[i]})", log=log))
    return Curves("Value against cost by owner", planes)


def front(study: Readable) -> Curves | None:
    """The first two of several objectives against each other, with the best compromises."""
    done = [r for r in _ended(study) if r.state == "complete"]
    if len(study.optuna.directions) < 2 or not done:
        return None
    names, words = objectives(study.optuna), better(study.optuna)
    lines = [
        Line(
            x=[r.values[0] for r in mine],
            y=[r.values[1] for r in mine],
            texts=[f"trial {r.number}" for r in mine],
            width=0.0,
            **look,
        )
        for look, mine in _groups(study, done)
    ]
    sign = signs(study.optuna)[0]
    best = sorted(leading(study), key=lambda r: sign * r.values[0])  # the steps go to worse ones
    if best:
        x, y = [r.values[0] for r in best], [r.values[1] for r in best]
        texts = [f"trial {r.number}" for r in best]
        # With a third objective a staircase would say what is not so.
        width = 1.5 if len(names) == 2 else 0.0
        lines.append(Line("front", x, y, DARK, width, step=True, mark="ring", texts=texts))
    labels = [f"{name} ({word})" for name, word in zip(names, words, strict=True)]
    return Curves("Front of the objectives", [Plane(lines, labels[0], labels[1])])


def importances(study: Readable) -> Bars | None:
    """Importance for the value (PED-ANOVA), of sampled and of gradient-owned hyperparameters.

    The gradient-owned ones enter with the values that a trial came out with, tensors with the
    median of their elements.
    """
    found = importance(study)
    if not found:
        return None
    bars = []
    for name in list(found)[:MOST_NAMES]:
        base = base_name(name)
        owner = study.space.owner(base) if base in study.space else "sampler"
        group, color = _GROUPS.get(owner, _GROUPS["sampler"])
        bars.append(Bar(short(name), found[name], group, color))
    label = "importance for the value (PED-ANOVA; sums to 1)"
    return Bars("Importance of both owners", bars, label)


_GROUPS: Mapping[str, tuple[str, str]] = {
    "grad": ("gradient-owned, as it came out", COLORS[1]),
    "sampler": ("sampler-owned", COLORS[0]),
}


def importance(study: Readable) -> dict[str, float]:
    """Return the importance of every hyperparameter that varied, largest first.

    Empty with fewer than four complete trials, for several objectives, or where nothing varied.
    """
    done = [r for r in study.trials if r.state == "complete" and len(r.values) == 1]
    table = [{**r.params, **_smooth(study, r)} for r in done]
    names = list(dict.fromkeys(n for row in table for n in row))
    columns = {n: [row[n] for row in table if n in row] for n in names}
    spaces = {n: d for n, c in columns.items() if (d := _distribution(study, n, c)) is not None}
    if len(done) < 4 or not spaces:
        return {}
    direction = study.optuna.directions[0]
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the study is of no interest to anybody
    both = optuna.create_study(direction=direction)
    optuna.logging.set_verbosity(before)
    both.add_trials(
        create_trial(
            state=TrialState.COMPLETE,
            value=record.value,
            params={n: v for n, v in row.items() if n in spaces},
            distributions={n: d for n, d in spaces.items() if n in row},
        )
        for record, row in zip(done, table, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experimental parts; they are pinned by our tests
        found = optuna.importance.get_param_importances(both)
    return {name: float(value) for name, value in found.items()}


def _smooth(study: Readable, record: TrialRecord) -> dict[str, float]:
    """Gradient-owned values that a trial came out with, of tensors the median."""
    found = {}
    for name in study.space.grad:
        if name in record.hparams:
            found[name] = middle(record.hparams[name])
    return found


def _distribution(study: Readable, name: str, column: Sequence[Any]) -> BaseDistribution | None:
    """A distribution over what a hyperparameter took; None where it never varied."""
    if len(set(column)) < 2:
        return None
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in column):
        low, high = float(min(column)), float(max(column))
        return FloatDistribution(low, high, log=is_log(study, name) and low > 0)
    return CategoricalDistribution(tuple(dict.fromkeys(column)))


def _ended(study: Readable) -> list[TrialRecord]:
    """The study's own finished trials, failed ones included, in the order in which they ended."""
    trials = [t for t in all_trials(study.optuna) if t.datetime_complete is not None]
    trials.sort(key=lambda trial: (trial.datetime_complete, trial.number))
    return [r for trial in trials if not (r := TrialRecord.of(trial)).imported]


def _spent(study: Readable) -> dict[int, int]:
    """What a study had cost when each trial ended."""
    total, spent = 0, {}
    for record in _ended(study):
        total += record.cost.equivalent_steps
        spent[record.number] = total
    return spent


def _groups(
    study: Readable, records: Sequence[TrialRecord]
) -> list[tuple[dict[str, Any], list[TrialRecord]]]:
    """Trials with the look of their points: by owner, and by how they ended."""
    found: dict[tuple[str, str], list[TrialRecord]] = {}
    for record in records:
        ending: str = record.state if record.feasible else "violates a constraint"
        found.setdefault((_owner(study, record), ending), []).append(record)
    owners = list(dict.fromkeys(owner for owner, _ in found))
    marks: dict[str, Mark] = {"complete": "dot", "pruned": "cross"}
    looks = []
    for (owner, ending), mine in sorted(found.items(), key=lambda item: item[0][1] != "complete"):
        look = {
            "label": owner if ending == "complete" else f"{owner}, {ending}",
            "color": COLORS[owners.index(owner)],
            "mark": marks.get(ending, "ring"),
        }
        looks.append((look, mine))
    return looks


_OWNERS: Mapping[Kind, str] = {
    "gradient": "gradient",
    "both": "gradient, from sampled values",
    "sampler": "sampler (at sampled values)",
}


def _owner(study: Readable, record: TrialRecord) -> str:
    if not study.space.grad:
        return "sampler"
    return _OWNERS[record.by]
