"""`bilevel study doctor` and `gc`: what is wrong in a study's folder, and what may go."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.artifacts import get_all_artifact_meta
from optuna.study import Study as OptunaStudy
from optuna.trial import FrozenTrial, TrialState

from bilevel.checkpoint import load
from studies.commands.doctor import Finding, Level
from studies.storage.all_trials import all_trials
from studies.storage.database import StorageError
from studies.storage.layout import DATABASE, SPEC
from studies.storage.leading import best_trial
from studies.storage.locks import coordinator_lock
from studies.storage.sqlite_file import find_fault
from studies.storage.versions import versions
from studies.views.stored import STORAGE_VARIABLE, StoredStudy, read_spec

__all__ = ["Trouble", "collect", "examine_study", "mend"]


@dataclass(frozen=True)
class Trouble(Finding):
    """A finding about a study, and what mends it.

    Attributes:
        fix: mends it without losing anything that is still of use; None where a person decides.
    """

    fix: Callable[[], None] | None = None


def examine_study(folder: Path) -> list[Trouble]:
    """Look at everything in a study's folder; no finding raises.

    Raises:
        StorageError: there is no such folder.
    """
    if not folder.is_dir():
        raise StorageError(f"there is no folder {str(folder)!r}.")
    found: list[Trouble] = []
    try:
        spec = read_spec(folder)
    except StorageError as error:
        return [Trouble(SPEC, str(error), "error", "is this the right folder?")]
    found.append(Trouble(SPEC, f"study {spec['study']!r}, format {spec['format']}"))
    if spec["storage"] is None:
        found += _sqlite(folder / DATABASE)
    if found[-1].level == "error":  # what else is said would be about ruins
        return found
    try:
        study = StoredStudy(folder)
        trials = all_trials(study.optuna)
    except (StorageError, OSError) as error:
        advice = "restore it from a copy"
        if spec["storage"] is not None:
            advice = f"is its server up, and the URL in {STORAGE_VARIABLE} right?"
        return [*found, Trouble("database", str(error), "error", advice)]
    found.append(Trouble("database", f"{len(trials)} trials, schema of this Optuna version"))
    found += [_lock(study), _orphans(study, trials), *_versions(study)]
    found += [*_checkpoints(study, trials), *_artifacts(study, trials), *_leftovers(study)]
    return found


def mend(folder: Path, troubles: list[Trouble]) -> list[Trouble]:
    """Apply all fixes; return what is found afterwards.

    Raises:
        LockedError: the study is being run.
    """
    study = StoredStudy(folder)
    with coordinator_lock(study.files.study, study.name, study.database):
        for trouble in troubles:
            if trouble.fix is not None:
                trouble.fix()
    return examine_study(folder)


def _sqlite(path: Path) -> Iterator[Trouble]:
    """Whether the file is whole, and in write-ahead mode."""
    if not path.exists():
        return
    fault = find_fault(path)
    if fault is not None:
        yield Trouble("sqlite", f"{path.name} {fault.what}", "error", fault.advice)
        return
    with closing(sqlite3.connect(f"file:{path.resolve()}?mode=ro", uri=True)) as connection:
        mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
    wal = path.with_name(f"{path.name}-wal")
    size = wal.stat().st_size if wal.exists() else 0
    level: Level = "ok" if mode == "wal" else "warning"
    advice = "" if mode == "wal" else "readers may block the study; resume sets it back to wal"
    yield Trouble("sqlite", f"whole; journal mode {mode}, {size >> 10} KiB to merge", level, advice)


def _lock(study: StoredStudy) -> Trouble:
    holder = study.holder()
    if holder is not None:
        return Trouble("lock", f"held by {holder}")
    note = study.files.study / "lock.json"
    if not note.exists():
        return Trouble("lock", "free")
    try:
        who = json.loads(note.read_text())
        last = f"last held by process {who['pid']} on {who['host']}"
    except (ValueError, KeyError):
        return Trouble(
            "lock", "free; lock.json is torn", "warning", "--fix removes it", note.unlink
        )
    return Trouble("lock", f"free; {last}")


def _orphans(study: StoredStudy, trials: list[FrozenTrial]) -> Trouble:
    left = [t.number for t in trials if t.state is TrialState.RUNNING]
    if not left or study.holder() is not None:
        return Trouble("open trials", f"{len(left)}")
    where = ", ".join(map(str, left[:8])) + (", ..." if len(left) > 8 else "")
    return Trouble(
        "open trials",
        f"{len(left)} without a process: {where}",
        "warning",
        f"`bilevel study resume {study.folder}` goes on with them",
    )


def _versions(study: StoredStudy) -> Iterator[Trouble]:
    before, now = study.optuna.user_attrs.get("versions", {}), versions()
    changed = [f"{k} {before[k]} -> {now.get(k)}" for k in before if before[k] != now.get(k)]
    if changed:
        text = ", ".join(changed)
        yield Trouble("versions", text, "warning", "a resumed trial may differ in its last digits")


def _checkpoints(study: StoredStudy, trials: list[FrozenTrial]) -> Iterator[Trouble]:
    """Checkpoints that do not load, and open trials that have none."""
    files = study.files
    for trial in trials:
        number, open_ = trial.number, trial.state is TrialState.RUNNING
        path = files.checkpoint(number)
        if not path.exists() and open_ and study.holder() is None:
            text = f"trial {number} has none yet"
            yield Trouble("checkpoint", text, advice="it starts over from its first step")
        lost = "the trial starts over from its first step" if open_ else "its weights are lost"
        if _torn(path):
            yield _aside("checkpoint", f"that of trial {number} is torn", lost, path)
        if _torn(values := files.hparams(number)):
            text = f"those of trial {number} are torn"
            yield _aside("final values", text, "no other trial starts from them", values)


def _torn(path: Path) -> bool:
    """Whether there is a file that does not load."""
    try:
        if path.exists():
            load(path)
    except ValueError:
        return True
    return False


def _aside(topic: str, text: str, lost: str, path: Path) -> Trouble:
    return Trouble(topic, text, "error", f"--fix sets it aside; {lost}", lambda: _set_aside(path))


def _set_aside(path: Path) -> None:
    path.replace(path.with_name(f"{path.name}.torn"))


def _artifacts(study: StoredStudy, trials: list[FrozenTrial]) -> Iterator[Trouble]:
    """Artifacts that the database names and the folder has not, or that lie outside of it."""
    folder, count = study.files.artifacts, 0
    missing: list[str] = []
    foreign: list[str] = []
    items: list[OptunaStudy | FrozenTrial] = [study.optuna, *trials]
    for item in items:
        for meta in get_all_artifact_meta(item, storage=study.database):
            count += 1
            who = "the study" if isinstance(item, OptunaStudy) else f"trial {item.number}"
            if Path(meta.artifact_id).name != meta.artifact_id:
                foreign.append(f"{meta.artifact_id!r} of {who}")
            elif not (folder / meta.artifact_id).exists():
                missing.append(f"{meta.filename} of {who}")
    if foreign:
        text = f"{', '.join(foreign[:4])} outside of the folder artifacts"
        yield Trouble("artifacts", text, "error", "they are not read; who wrote to the database?")
    if missing:
        more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
        text = f"{', '.join(missing[:4])}{more} missing of {count}"
        yield Trouble("artifacts", text, "error", "restore the folder artifacts from a copy")
    if not foreign and not missing:
        yield Trouble("artifacts", f"{count}, all there")


def _leftovers(study: StoredStudy) -> Iterator[Trouble]:
    """Temporary files of a process that was killed while it wrote."""
    if study.holder() is not None:
        return
    left = _temporary(study)
    if left:
        names = ", ".join(str(path.relative_to(study.folder)) for path in left[:4])
        yield Trouble(
            "temporary files",
            f"{len(left)} left by killed processes: {names}",
            "warning",
            "--fix removes them",
            lambda: _remove(left),
        )


def _temporary(study: StoredStudy) -> list[Path]:
    inside = study.files.study.rglob("*") if study.files.study.exists() else iter(())
    files = [p for p in (*study.folder.glob("*"), *inside) if p.name.startswith(".")]
    files = [p for p in files if p.suffix in (".tmp", ".probe")]
    # Folders of tempfile.mkdtemp, in which artifacts are made.
    folders = [p for p in study.files.study.glob("tmp*") if p.is_dir()]
    return sorted({*files, *folders})


# Removing.


def collect(folder: Path, delete: bool) -> dict[str, Any]:
    """List, or remove, what no command needs any more: path, size and reason of each.

    Checkpoints of finished trials but for the best, whose weights `Study.trained` gives;
    torn checkpoints that were set aside; artifacts that no trial of the database names;
    temporary files of killed processes.

    Raises:
        LockedError: to be removed while the study is being run.
    """
    study = StoredStudy(folder)
    with (
        coordinator_lock(study.files.study, study.name, study.database) if delete else nullcontext()
    ):
        found = _removable(study)
        files = [{"path": str(p), "bytes": _size(p), "why": why} for p, why in found]
        if delete:
            _remove([path for path, _ in found])
    return {"files": files, "bytes": sum(file["bytes"] for file in files), "removed": delete}


def _removable(study: StoredStudy) -> list[tuple[Path, str]]:
    trials = all_trials(study.optuna)
    best = best_trial(study.optuna)
    found = [(path, "temporary file") for path in _temporary(study)]
    for trial in trials:
        path = study.files.checkpoint(trial.number)
        aside = path.with_name(f"{path.name}.torn")
        if aside.exists():
            found.append((aside, "torn checkpoint"))
        if (
            trial.state.is_finished()
            and path.exists()
            and (best is None or trial.number != best.number)
        ):
            found.append((path, f"checkpoint of the finished trial {trial.number}"))
    known = _known_artifacts(study)
    for path in sorted(study.files.artifacts.iterdir()):
        if path.name not in known:
            found.append((path, "artifact that no trial has"))
    return found


def _known_artifacts(study: StoredStudy) -> set[str]:
    """Ids of all artifacts of the database, those of other studies included."""
    import optuna

    known = set()
    for name in optuna.get_all_study_names(study.database):
        other = optuna.load_study(study_name=name, storage=study.database)
        items: list[OptunaStudy | FrozenTrial] = [other, *all_trials(other)]
        for item in items:
            metas = get_all_artifact_meta(item, storage=study.database)
            known |= {meta.artifact_id for meta in metas}
    return known


def _size(path: Path) -> int:
    parts = path.rglob("*") if path.is_dir() else (path,)
    return sum(part.stat().st_size for part in parts if part.is_file())


def _remove(paths: list[Path]) -> None:
    """Remove files and folders; one that is gone already is no error."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
