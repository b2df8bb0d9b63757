"""The Optuna study of a sweep of Ray Tune: open it, draw from it, find what was lost."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FixedTrial, TrialState, create_trial

from bilevel.describe import differences
from bilevel.space import Space
from studies.runner.agreement import MismatchError
from studies.storage.all_trials import all_trials

__all__ = [
    "TRIAL_ID",
    "SpaceLike",
    "add_point",
    "agree",
    "aims",
    "draw",
    "known_to_tune",
    "open_study",
    "orphans",
]

_DIRECTIONS: Mapping[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}

TRIAL_ID = "ray_trial_id"
"""User attribute with Tune's id of a trial: what a restored sweep is reconciled by."""

SpaceLike = Space | Mapping[str, BaseDistribution] | Callable[[Any], Mapping[str, Any] | None]


def aims(metric: Any, mode: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return metrics and modes, as many of one as of the other.

    Raises:
        ValueError: they do not fit.
    """
    metrics = (metric,) if isinstance(metric, str) else tuple(metric or ())
    modes = (mode,) * len(metrics) if isinstance(mode, str) else tuple(mode or ())
    if not metrics or len(metrics) != len(modes) or not set(modes) <= {"min", "max"}:
        raise ValueError(
            "metric and mode must be names and 'min' or 'max', as many of one as of the "
            f"other, but got metric={metric!r}, mode={mode!r}."
        )
    return metrics, modes


def open_study(
    name: str,
    storage: BaseStorage,
    sampler: BaseSampler,
    space: SpaceLike,
    aim: tuple[Sequence[str], Sequence[str]],
    about: Mapping[str, str],
    points: Sequence[Mapping[str, Any]],
    rewards: Sequence[float | Sequence[float]] | None,
) -> optuna.Study:
    """Make a study with its first points, or open one that agrees.

    Args:
        name: of the study.
        storage: see `StudySearcher`.
        sampler: see `StudySearcher`.
        space: see `StudySearcher`.
        aim: metrics and modes.
        about: further user attributes of the study.
        points: configs to try first.
        rewards: their values where they are known.

    Raises:
        MismatchError: the study exists with other directions, or is about something else.
        ValueError: a point outside the space.
    """
    directions = [_DIRECTIONS[mode] for mode in aim[1]]
    study = optuna.create_study(
        study_name=name,
        storage=storage,
        sampler=sampler,
        directions=directions,
        load_if_exists=True,
    )
    old = [direction.name.lower() for direction in study.directions]
    if old != directions:
        _refuse(study, [f"direction: {old} before, {directions} now"])
    agree(study, {**about, "space": space.to_json()} if isinstance(space, Space) else about)
    if all_trials(study):
        return study
    if rewards is None:
        for point in points:
            study.enqueue_trial(dict(point))
    else:
        for point, reward in zip(points, rewards, strict=True):
            add_point(study, space, aim[0], point, reward)
    return study


def agree(study: optuna.Study, about: Mapping[str, str]) -> None:
    """Refuse a study that is about something else; store what it does not say itself.

    Args:
        study: to go on with.
        about: user attributes of it: the names of its learner and its task, its space as JSON.

    Raises:
        MismatchError: with a line for each difference.
    """
    known = study.user_attrs
    lines = []
    for name, mine in about.items():
        if name not in known:
            continue
        if name == "space":
            lines += Space.from_json(known[name]).differences(Space.from_json(mine))
        else:
            lines += differences(known[name], mine, name)
    if lines:
        _refuse(study, lines)
    for name, mine in about.items():
        if name not in known:
            study.set_user_attr(name, mine)


def _refuse(study: optuna.Study, lines: Sequence[str]) -> NoReturn:
    raise MismatchError(f"study {study.study_name!r} has other settings:\n  " + "\n  ".join(lines))


def draw(space: SpaceLike, trial: Any) -> Mapping[str, Any]:
    """Ask a trial for all params; returns what a function adds to them.

    Raises:
        TypeError: a function that returns something else than a dict.
    """
    if isinstance(space, Space):
        space.suggest(trial)
    elif isinstance(space, Mapping):
        for name, distribution in space.items():
            trial._suggest(name, distribution)
    else:
        found = space(trial)
        if found is not None and not isinstance(found, Mapping):
            raise TypeError(f"space: the function must return None or a dict, but got {found!r}.")
        return found or {}
    return {}


def add_point(
    study: optuna.Study,
    space: SpaceLike,
    metrics: Sequence[str],
    point: Mapping[str, Any],
    value: Any,
    state: TrialState = TrialState.COMPLETE,
    rungs: Sequence[float] = (),
) -> None:
    """Add a point whose value is known.

    Raises:
        ValueError: a point outside the space, or not as many values as metrics.
    """
    fixed = FixedTrial(dict(point))
    with warnings.catch_warnings():  # what is outside is refused below
        warnings.simplefilter("ignore", UserWarning)
        draw(space, fixed)
    for name, distribution in fixed.distributions.items():
        inner = distribution.to_internal_repr(fixed.params[name])
        if not distribution._contains(inner):
            raise ValueError(f"points_to_evaluate: {name}={point[name]!r} is outside the space.")
    values = [float(v) for v in (value if isinstance(value, Sequence) else [value])]
    if len(values) != len(metrics):
        raise ValueError(f"evaluated_rewards: expected {metrics}, but got {value!r}.")
    study.add_trial(
        create_trial(
            state=state,
            values=None if state is TrialState.FAIL else values,
            params=fixed.params,
            distributions=fixed.distributions,
            intermediate_values=dict(enumerate(rungs)),
            user_attrs={"imported": "evaluated_rewards"},
        )
    )


def orphans(study: optuna.Study, known: set[str]) -> list[int]:
    """Trials that were asked after Tune's last snapshot: it will ask for them again."""
    return [
        frozen.number
        for frozen in all_trials(study)
        if frozen.state is not TrialState.WAITING
        and "imported" not in frozen.user_attrs
        and frozen.user_attrs.get(TRIAL_ID) not in known
    ]


def known_to_tune(folder: Path) -> set[str] | None:
    """Ids of the trials in the last snapshot of a sweep; None where there is no snapshot."""
    states = sorted(folder.glob("experiment_state-*.json"))
    if not states:
        return None
    text = states[-1].read_text(encoding="utf-8")
    return set(re.findall(r'trial_id\\*": \\*"(\w+)', text))
