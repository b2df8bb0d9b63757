"""A study as its folder or database holds it: read without its learner, its task or its lock."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import optuna
from sqlalchemy.engine import URL

from bilevel.checks import did_you_mean
from bilevel.space import Space
from studies.storage.database import (
    StorageError,
    default_folder,
    masked,
    open_storage,
    parse_storage,
)
from studies.storage.files import Files
from studies.storage.layout import DATABASE, SPEC
from studies.storage.locks import lock_holder
from studies.views.readable import Readable

__all__ = [
    "STORAGE_VARIABLE",
    "StoredStudy",
    "read_spec",
    "study_names",
]

STORAGE_VARIABLE = "BILEVEL_STORAGE"
"""Environment variable with the URL of a database whose password stands nowhere else."""


class StoredStudy(Readable):
    """A study opened for reading, while it runs or afterwards.

    Args:
        target: folder that `bilevel study run` made, SQLite file, or database URL.
        name: of the study, where the database holds several.

    Attributes:
        name: of the study.
        folder: with its files.
        spec: what ``spec.json`` holds; empty without one.

    Raises:
        StorageError: there is nothing, or no study, at the target.
    """

    def __init__(self, target: str | PathLike[str], name: str | None = None) -> None:
        self.spec, self.folder, self.url = _found(target)
        self.database = open_storage(self.url, create=False)
        self.name = self._choose(name or self.spec.get("study"))
        self.files = Files(self.folder, self.name)

    def _choose(self, name: str | None) -> str:
        names = sorted(optuna.get_all_study_names(self.database))
        where = masked(self.url)
        if name is None and len(names) != 1:
            raise StorageError(
                f"{where} holds {len(names)} studies; choose one with --study"
                f"{': ' + ', '.join(map(repr, names)) if names else ''}."
                if names
                else f"{where} holds no study."
            )
        if name is not None and name not in names:
            raise StorageError(f"{where} has no study {name!r}; {did_you_mean(name, names)}")
        return names[0] if name is None else name

    @cached_property
    def optuna(self) -> optuna.Study:
        """The study as Optuna's object."""
        return optuna.load_study(study_name=self.name, storage=self.database)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides its numbers; empty for a study that another program made."""
        return dict(self.optuna.user_attrs.get("settings", {}))

    @property
    def ours(self) -> bool:
        """Whether `bilevel` made it."""
        return bool(self.settings)

    @cached_property
    def space(self) -> Space:
        """The hyperparameters and their owners; that of a Tune sweep stands by itself."""
        stored = self.settings.get("space") or self.optuna.user_attrs.get("space")
        return Space() if stored is None else Space.from_json(stored)

    @property
    def learner_name(self) -> str:
        """Name of the learner, "-" where it is not known."""
        return str(self._about.get("learner", "-"))

    @property
    def task_name(self) -> str:
        """Name of the task, "-" where it is not known."""
        return str(self._about.get("task", "-"))

    @cached_property
    def _about(self) -> Mapping[str, str]:
        """Names of learner and task; a Tune sweep has them as attributes, and no settings."""
        if self.ours:
            return {"learner": self.settings["learner"], "task": self.settings["task"]["name"]}
        return self.optuna.user_attrs

    @property
    def planned(self) -> int | None:
        """Trials that it is to have in total, where that is known."""
        return self.spec.get("trials")

    def holder(self) -> str | None:
        """Return who runs the study, in words; None where nobody does."""
        lock = self.files.study / "lock"
        try:
            with lock.open("rb") as file:
                # Shared, and given back at once: only a coordinator holds it exclusively.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
        except FileNotFoundError:
            return None
        except BlockingIOError:
            return lock_holder(self.files.study)


def study_names(target: str | PathLike[str]) -> list[str]:
    """Return the names of all studies of a database, perhaps that of a study's folder.

    Raises:
        StorageError: there is no database at the target.
    """
    return sorted(optuna.get_all_study_names(open_storage(_found(target)[2], create=False)))


def _found(target: str | PathLike[str]) -> tuple[dict[str, Any], Path, URL]:
    """Return what a folder says about its study, the folder, and the address of the database."""
    path = Path(target)
    if "://" not in str(target) and not path.exists():
        raise StorageError(f"there is no folder or database {str(target)!r}.")
    if path.is_dir():
        spec = read_spec(path)
        return spec, path, parse_storage(_place(spec, path))
    url = parse_storage(target)
    return {}, default_folder(url), url


def read_spec(folder: Path) -> dict[str, Any]:
    """Return what a study's folder says about it.

    Raises:
        StorageError: it is not the folder of a study.
    """
    path = folder / SPEC
    if not path.exists():
        raise StorageError(
            f"{str(folder)!r} is not a study: it has no {SPEC}; "
            f"`bilevel study run FILE --out {folder}` makes one."
        )
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if spec["format"] != 1 or not isinstance(spec["study"], str):
            raise ValueError(f"format {spec['format']!r}")
        if missing := {"storage", "plan", "overrides"} - set(spec):
            raise ValueError(f"{', '.join(sorted(missing))} missing")
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{str(path)!r} is not readable: {error}.") from error
    return dict(spec)


def _place(spec: Mapping[str, Any], folder: Path) -> str:
    """Path or URL of the database; a password is not in the folder but in the environment."""
    if spec["storage"] is None:
        return str(folder / DATABASE)
    if "***" not in spec["storage"]:
        return str(spec["storage"])
    given = os.environ.get(STORAGE_VARIABLE)
    if not given:
        raise StorageError(
            f"the study is stored in {spec['storage']}; give the URL with its password in the "
            f"environment variable {STORAGE_VARIABLE}."
        )
    return given
