"""What is stored of a study while it runs: the only writer to its database and its files."""

from __future__ import annotations

import copy
import errno
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import optuna
import sqlalchemy
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from bilevel.checkpoint import load, save
from bilevel.metrics import Cost
from bilevel.space import Space
from studies.messages import Outcome, Reached
from studies.record import TrialRecord
from studies.sampling.samplers import SeededSampler
from studies.storage.all_trials import all_trials
from studies.storage.files import Files
from studies.storage.leading import best_among, signs

__all__ = ["Ledger"]

MAX_DEATHS = 10
"""Deaths of the whole process at one checkpoint of a trial before that trial is given up."""

FULL_SECONDS = 1.0
"""Wall time between two tries to write to a full disk."""

_POSTGRESQL_DISK_FULL = "53100"

_T = TypeVar("_T")


class Ledger:
    """A study's database and files, as its coordinator writes them.

    Where the disk is full, every write waits until there is room, and says so once.

    Args:
        study: Optuna's study.
        database: its storage.
        files: checkpoints and artifacts.
        sampler: of the study.
        warm: whether complete trials keep their gradient-owned values for others to start from.
        on_stall: called with the reason when the disk is full.
    """

    def __init__(
        self,
        study: optuna.Study,
        database: BaseStorage,
        files: Files,
        sampler: SeededSampler,
        warm: bool,
        on_stall: Callable[[str], None],
    ) -> None:
        self.study, self._database, self._files, self._sampler = study, database, files, sampler
        self._warm, self._on_stall = warm, on_stall
        self._open: dict[int, Trial] = {}
        self.signs = signs(study)
        self._exhausted = bool(study.user_attrs.get("exhausted"))
        self._prunes = len(self.signs) == 1 and not isinstance(study.pruner, NopPruner)
        # Nobody else writes, so what is stored is read once; only unfinished trials change.
        known = all_trials(study)
        self._left = {t.number for t in known if t.state is TrialState.RUNNING}
        self._mirror = {t.number: t if t.state.is_finished() else _own(t) for t in known}

    # Reading.

    def trials(self) -> list[FrozenTrial]:
        """Return the study's own trials in order, without those of another study."""
        return [trial for trial in self._mirror.values() if "imported" not in trial.user_attrs]

    def get(self, number: int) -> FrozenTrial:
        """Return a trial as it is stored now."""
        return self._mirror[number]

    def trial(self, frozen: FrozenTrial) -> Trial:
        """Return a trial to write to."""
        if frozen.number not in self._open:
            self._open[frozen.number] = Trial(self.study, frozen._trial_id)
        return self._open[frozen.number]

    @property
    def exhausted(self) -> bool:
        """Whether the sampler has nothing left to ask."""
        return self._exhausted

    def unfinished(self, trials: int) -> bool:
        """Whether a study of `trials` trials has any left to run."""
        known = self.trials()
        if any(trial.state is TrialState.RUNNING for trial in known):
            return True
        finished = sum(trial.state.is_finished() for trial in known)
        return finished < trials and not self.exhausted

    def spent(self, without: Collection[int]) -> Cost:
        """Return the cost of all trials but some."""
        total = Cost()
        for trial in self.trials():
            if trial.number not in without and "cost" in trial.user_attrs:
                total += Cost(**trial.user_attrs["cost"])
        return total

    def pruner_objects(self, trial: Trial) -> bool:
        """Whether the study's pruner says that a trial shall end."""
        return self._prunes and trial.should_prune()

    def has_start_values(self, number: int) -> bool:
        """Whether the final gradient-owned values of a trial were kept."""
        return self._files.hparams(number).exists()

    def start_values(self, number: int) -> dict[str, object] | None:
        """Return the final gradient-owned values of a trial; None where they were not kept."""
        path = self._files.hparams(number)
        return dict(load(path)) if path.exists() else None

    # Writing.

    def patiently(self, write: Callable[[], _T]) -> _T:
        """Do a write that may be repeated; wait while the disk is full."""
        told = False
        while True:
            try:
                return write()
            except Exception as error:
                if not _disk_full(error, self._files.study):
                    raise
                if not told:
                    self._on_stall(f"no space left on the disk of {self._files.study}")
                    told = True
                time.sleep(FULL_SECONDS)

    def ask(self, given: Mapping[str, object] | None) -> FrozenTrial:
        """Begin the next trial, with given params where nothing was enqueued before."""
        enqueued = any(trial.state is TrialState.WAITING for trial in self._mirror.values())
        if given is not None and not enqueued:
            self.patiently(lambda: self.study.enqueue_trial(dict(given)))
        # Of a database that is gone, there may be files of a trial of this number.
        waiting = [n for n, t in self._mirror.items() if t.state is TrialState.WAITING]
        number = min(waiting, default=len(self._mirror))
        for path in (self._files.checkpoint(number), self._files.hparams(number)):
            path.unlink(missing_ok=True)
        trial = self.patiently(self.study.ask)
        self._open[trial.number] = trial
        self._read(trial)
        return self.get(trial.number)

    def suggest(self, trial: Trial, space: Space) -> dict[str, Any]:
        """Ask for the values of a trial, or for those that it has already."""
        values = self.patiently(lambda: space.suggest(trial))
        self.get(trial.number).params = trial.params
        return values

    def attribute(self, trial: Trial, name: str, value: object) -> None:
        """Set an attribute of an unfinished trial."""
        self.patiently(lambda: trial.set_user_attr(name, value))
        self.get(trial.number).user_attrs[name] = value

    def report(self, trial: Trial, reached: Reached) -> bool:
        """Store a rung where it is new, and say so: a resumed trial reports its last one again."""
        known = self.get(trial.number)
        if reached.rung in known.intermediate_values:
            return False
        if reached.gain or reached.settled:
            gains = known.user_attrs.get("outlook", {}).get("gains", {})
            outlook = {
                "gains": {**gains, str(reached.rung): reached.gain},
                "settled": bool(reached.settled),
            }
            self.attribute(trial, "outlook", outlook)
        # Last: a rung that is there is not asked about again.
        if len(self.signs) == 1:
            self.patiently(lambda: trial.report(reached.values[0], reached.rung))
            known.intermediate_values[reached.rung] = reached.values[0]
        return True

    def pause(self, trial: Trial, so_far: Outcome, rung: int) -> None:
        """Store what is known of a trial that may not go on."""
        self._describe(trial, so_far)
        self.attribute(trial, "paused", rung)

    def is_described(self, trial: FrozenTrial) -> bool:
        """Whether what is stored of a trial is how it stood at its last rung."""
        at = max(trial.intermediate_values, default=0)
        return bool(trial.user_attrs.get("paused") == at)

    def finish(
        self, trial: Trial, outcome: Outcome, unfinished: Collection[int]
    ) -> tuple[TrialRecord, bool]:
        """Store a trial's end; returns its record, and whether it is the best so far.

        Attributes first: a finished trial is immutable.  Killed in between, the trial goes on from
        its last checkpoint and gets here again with the same numbers.
        """
        record = outcome.record
        if record.state != "pruned" or record.hparams:
            self._describe(trial, outcome)
        elif (known := self.get(trial.number).user_attrs.get("run")) is not None:
            self.attribute(trial, "run", {**known, "status": record.status})
        for name, excess in record.constraints.items():
            self.patiently(lambda n=name, e=excess: _constrain(trial, n, e))  # type: ignore[misc]
        complete = record.state == "complete"
        if complete and outcome.hparams and self._warm:
            path = self._files.hparams(trial.number)
            self.patiently(lambda: save(path, dict(outcome.hparams)))
        state = {
            "complete": TrialState.COMPLETE,
            "pruned": TrialState.PRUNED,
            "failed": TrialState.FAIL,
        }[record.state]
        values = list(record.values) if complete else None
        self.patiently(lambda: self._end(trial, values, state))
        self._read(trial)
        self._open.pop(trial.number, None)
        if self._sampler.exhausted and not self.exhausted:
            self.patiently(lambda: self.study.set_user_attr("exhausted", True))
            self._exhausted = True
        best = best_among(self._mirror.values(), self.signs[0])
        self._files.keep_only({*unfinished, *([] if best is None else [best.number])})
        stored = TrialRecord.of(self.get(trial.number))
        return stored, best is not None and best.number == trial.number

    def count_start(self, trial: Trial, checkpoint: Path) -> str | None:
        """Count how often a trial was left behind; says why it is given up, where it is.

        A trial in this process that takes the process with it would do so for ever.
        """
        if trial.number not in self._left:
            return None
        self._left.discard(trial.number)
        at = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        before = self.get(trial.number).user_attrs.get("starts")
        count = before["count"] if before is not None and before["at"] == at else 0
        if count >= MAX_DEATHS:
            return f"the process died {count} times at the same point"
        self.attribute(trial, "starts", {"at": at, "count": count + 1})
        return None

    def count_loss(self, trial: Trial) -> int:
        """Count a worker that died in a trial; returns how many did."""
        count = int(self.get(trial.number).user_attrs.get("losses", 0)) + 1
        self.attribute(trial, "losses", count)
        return count

    def _describe(self, trial: Trial, outcome: Outcome) -> None:
        known = self.get(trial.number).user_attrs
        for name, value in outcome.record.attributes().items():
            if known.get(name) != value:
                self.attribute(trial, name, value)
        if outcome.files:
            frozen = self.get(trial.number)
            self.patiently(lambda: self._files.upload(frozen, self._database, outcome.files))

    def _read(self, trial: Trial) -> None:
        stored = self._database.get_trial(trial._trial_id)
        self._mirror[trial.number] = stored if stored.state.is_finished() else _own(stored)

    def _end(self, trial: Trial, values: Sequence[float] | None, state: TrialState) -> None:
        self.study.tell(trial, values, state, skip_if_finished=True)


def _own(trial: FrozenTrial) -> FrozenTrial:
    """A copy that may change: the storage shares its trials."""
    return copy.deepcopy(trial)


def _constrain(trial: Trial, name: str, excess: float) -> None:
    if name not in trial.constraints:
        trial.set_constraint(name, excess)


def _disk_full(error: BaseException, folder: Path) -> bool:
    """Whether a write failed for want of space, whatever the libraries made of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if isinstance(cause, sqlalchemy.exc.OperationalError):
            if getattr(cause.orig, "sqlstate", None) == _POSTGRESQL_DISK_FULL:
                return True
            if "database or disk is full" in str(cause.orig):
                return True
        cause = cause.__cause__ or cause.__context__
    # Optuna asserts after a write that did not happen.
    storage = (AssertionError, optuna.exceptions.StorageInternalError)
    return isinstance(error, storage) and shutil.disk_usage(folder).free < 65536
