"""What decides the numbers of a study, stored with it, and compared when it is opened again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optuna

from adapters.tasks import Task
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.describe import describe, differences
from bilevel.space import Space
from studies.versions import versions

__all__ = ["MismatchError", "agree", "agree_on_run", "settings"]


class MismatchError(ValueError):
    """The stored study has other settings; the message lists what differs."""


def settings(
    learner: str,
    task: Task,
    space: Space,
    algorithm: OuterAlgorithm[Any] | None,
    metric: str,
    seed: int,
) -> dict[str, Any]:
    """Return the settings of a study as plain data."""
    return {
        "learner": learner,
        "task": {
            "name": task.name,
            "options": describe(task.options),
            "data": task.fingerprint,
        },
        "space": space.to_json(),
        "algorithm": describe(algorithm),
        "metric": metric,
        "seed": seed,
    }


def agree(study: optuna.Study, storage: str, direction: str, mine: Mapping[str, Any]) -> None:
    """Store the settings of a new study; compare them with those of an existing one.

    Raises:
        MismatchError: they differ, or another program made the study.
    """
    attributes = study.user_attrs
    if "settings" not in attributes:
        if study.get_trials(deepcopy=False):
            raise MismatchError(
                f"study {study.study_name!r} in {storage} has trials, but was not made by bilevel; "
                "use another name."
            )
        study.set_user_attr("settings", dict(mine))
        study.set_user_attr("versions", versions())
        attributes = study.user_attrs
    stored = attributes["settings"]
    lines = []
    if (old := study.direction.name.lower()) != direction:
        lines.append(f"direction: {old!r} before, {direction!r} now")
    for key in ("learner", "task", "metric", "seed", "algorithm"):
        lines += differences(stored[key], mine[key], key)
    before, now = Space.from_json(stored["space"]), Space.from_json(mine["space"])
    lines += [f"space: {line}" for line in before.differences(now)]
    _refuse(study, storage, lines)


def agree_on_run(study: optuna.Study, storage: str, budget: Budget, rungs: int) -> None:
    """Store what a trial is in a new study; compare it with that of an existing one.

    Raises:
        MismatchError: trials of another budget are not comparable.
    """
    mine = {"budget": describe(budget), "rungs": rungs}
    stored = study.user_attrs.get("run")
    if stored is None:
        study.set_user_attr("run", mine)
        return
    lines = [line for key in mine for line in differences(stored[key], mine[key], key)]
    _refuse(study, storage, lines)


def _refuse(study: optuna.Study, storage: str, lines: list[str]) -> None:
    if lines:
        raise MismatchError(
            f"study {study.study_name!r} in {storage} has other settings:\n  "
            + "\n  ".join(lines)
            + "\nUse the same settings to go on with it, or another name."
        )
