"""What decides the numbers of a study, stored with it, and compared when it is opened again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from sqlalchemy.engine import URL

from bilevel.budget import Budget
from bilevel.describe import describe, differences
from bilevel.space import Space
from studies.messages import Keep
from studies.runner.schedulers import Ladder, Scheduler
from studies.storage.all_trials import all_trials
from studies.storage.versions import versions

if TYPE_CHECKING:
    from studies.study import Study

__all__ = ["MismatchError", "agree", "agree_on_run", "settings"]


class MismatchError(ValueError):
    """The stored study has other settings; the message lists what differs."""


def settings(study: Study, url: URL) -> dict[str, Any]:
    """Return the settings of a study as plain data.

    For a SQLite file its folder, too, as seen from there: with another one it would have neither
    its lock nor its checkpoints.
    """
    found = {
        "learner": study.learner.name,
        "task": {
            "name": study.task.name,
            "options": describe(study.task.options),
            "data": study.task.fingerprint,
        },
        "space": study.space.to_json(),
        "algorithm": describe(study.algorithm),
        "metric": list(study.metrics),
        "constraints": describe(study.constraints),
        "seed": study.seed,
    }
    if url.get_backend_name() == "sqlite":
        found["folder"] = os.path.relpath(study.files.root, Path(str(url.database)).parent)
    return found


def agree(
    study: optuna.Study, storage: str, directions: Sequence[str], mine: Mapping[str, Any]
) -> None:
    """Store the settings of a new study; compare them with those of an existing one.

    Raises:
        MismatchError: they differ, or another program made the study.
    """
    stored = study.user_attrs.get("settings")
    if stored is None and all_trials(study):
        raise MismatchError(
            f"study {study.study_name!r} in {storage} has trials, but was not made by bilevel; "
            "use another name."
        )
    lines = []
    old = [direction.name.lower() for direction in study.directions]
    if old != list(directions):
        lines.append(f"direction: {', '.join(old)!r} before, {', '.join(directions)!r} now")
    if stored is None:
        _refuse(study, storage, lines)
        study.set_user_attr("settings", dict(mine))
        study.set_user_attr("versions", versions())
        return
    for key in ("learner", "task", "metric", "constraints", "seed", "algorithm", "folder"):
        lines += differences(stored.get(key), mine.get(key), key)
    before, now = Space.from_json(stored["space"]), Space.from_json(mine["space"])
    lines += [f"space: {line}" for line in before.differences(now)]
    _refuse(study, storage, lines)


def agree_on_run(
    study: optuna.Study,
    storage: str,
    budget: Budget,
    rungs: int,
    scheduler: Scheduler,
    ladder: Ladder,
    keep: Keep,
) -> Ladder:
    """Store what a trial is in a new study; compare it with that of an existing one.

    Who asks may change: the sampler and the pruner are noted, for `bilevel study compare`.

    Returns:
        The rungs that were stored first: they may depend on the number of trials.

    Raises:
        MismatchError: trials of another budget are not comparable.
    """
    mine = {
        "budget": describe(budget),
        "reports": rungs,
        "scheduler": describe(scheduler),
        "keep": keep,
    }
    stored = study.user_attrs.get("run")
    search = {"sampler": str(study.sampler), "pruner": type(study.pruner).__name__}
    if study.user_attrs.get("search") != search:
        study.set_user_attr("search", search)
    if stored is None:
        study.set_user_attr("run", {**mine, **asdict(ladder)})
        return ladder
    lines = [line for key in mine for line in differences(stored.get(key), mine[key], key)]
    _refuse(study, storage, lines)
    return Ladder(tuple(stored["rungs"]), tuple(stored["levels"]), stored["width"])


def _refuse(study: optuna.Study, storage: str, lines: list[str]) -> None:
    if lines:
        raise MismatchError(
            f"study {study.study_name!r} in {storage} has other settings: {'; '.join(lines)}; "
            "go on with the same ones, or make another study, which may learn from this one."
        )
