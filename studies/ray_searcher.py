"""An Optuna study as the searcher of a Ray Tune sweep: every outcome is told once, as it was."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState
from ray._private.dict import unflatten_dict
from ray.air.constants import TRAINING_ITERATION
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from bilevel.space import Space
from studies.ray_endings import Endings
from studies.ray_study import (
    TRIAL_ID,
    SpaceLike,
    add_point,
    aims,
    draw,
    fail,
    finite,
    known_to_tune,
    open_study,
    orphans,
    prune,
    tell,
)
from studies.ray_trainable import NUMBER
from studies.sampling import make_sampler
from studies.storage import open_storage, parse_storage
from studies.trials_json import trial_from_json, trial_to_json

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

__all__ = ["StudySearcher"]

STRICT = "TUNE_DISABLE_STRICT_METRIC_CHECKING"


class StudySearcher(Searcher):
    """An Optuna study that asks and is told, in place of `ray.tune.search.optuna.OptunaSearch`.

    A trial ends as COMPLETE at its own end, as PRUNED where a scheduler (or anybody) stopped it
    before, and as FAIL with a user attribute ``failure`` where it raised, reported a number that is
    not finite, or none.  What it reports as ``constraint/NAME`` becomes a constraint of Optuna
    (feasible at or below 0), ``attr/NAME`` a user attribute.  A restored sweep goes on with the
    trials that the study knows: none is lost, none is told twice.

    Args:
        space: a `Space`, Optuna distributions by name, or a define-by-run function of a trial.
            Default: the domains in the `param_space` of the Tuner.
        metric: what is optimized, a name or several.  Default: that of `TuneConfig`, which Tune
            passes on where `param_space` is not empty (`studies.ray.tuner` sees to it).
        mode: "min" or "max", or one for each metric.
        storage: database URL, path to a SQLite file or Optuna storage.  Default: in memory.  A
            password in the URL is not written into Tune's files; on restore the driver's own
            sources (``PGPASSWORD``, ``~/.pgpass``) have to know it.
        study_name: unique by default; the name of an existing study goes on with it.
        sampler: name (see `studies.sampling.SAMPLERS`) or Optuna sampler.  Default: "tpe".
        seed: of the draws; trial by trial, so that a restored sweep repeats none.
        points_to_evaluate: configs to try first.
        evaluated_rewards: their values where they are known: then they are told and not run.
        scheduler: of the sweep, so that an end at its `max_t` is told from a stop before it.
        number_trials: whether a config has the entry "trial_number", from which
            `as_trainable` derives the trial's seed.

    Raises:
        ValueError: metric and mode that do not fit; a mode that is neither; a point outside the
            space.
        MismatchError: the study exists with other directions or another space.
    """

    def __init__(
        self,
        space: SpaceLike | None = None,
        metric: str | Sequence[str] | None = None,
        mode: str | Sequence[str] | None = None,
        *,
        storage: BaseStorage | str | os.PathLike[str] | None = None,
        study_name: str | None = None,
        sampler: BaseSampler | str | None = None,
        seed: int = 0,
        points_to_evaluate: Sequence[Mapping[str, Any]] = (),
        evaluated_rewards: Sequence[float | Sequence[float]] | None = None,
        scheduler: TrialScheduler | None = None,
        number_trials: bool = False,
    ) -> None:
        super().__init__()
        self._space = space
        self._metrics: tuple[str, ...] = ()
        self._modes: tuple[str, ...] = ()
        self._name = study_name or f"ray-{uuid.uuid4().hex[:12]}"
        self._storage = storage if storage is None or isinstance(storage, BaseStorage) else None
        self._url = None if storage is None or self._storage else parse_storage(storage)  # type: ignore[arg-type]
        self._sampler = make_sampler(sampler, seed)
        self._points, self._rewards = list(points_to_evaluate), evaluated_rewards
        self._endings = Endings(scheduler)
        self._number_trials = number_trials
        self._numbers: dict[str, int] = {}
        self._orphans: list[int] = []
        self._study: optuna.Study | None = None
        if evaluated_rewards is not None and len(evaluated_rewards) != len(self._points):
            raise ValueError(
                f"evaluated_rewards: {len(self._points)} points, but got "
                f"{len(evaluated_rewards)} rewards."
            )
        if metric is not None or mode is not None:
            self._aim(metric, mode)

    # What is optimized.

    def _aim(self, metric: Any, mode: Any) -> None:
        metrics, modes = aims(metric, mode)
        if self._metrics and (metrics, modes) != (self._metrics, self._modes):
            raise ValueError(
                f"metric: the searcher has {self._metrics} {self._modes}, but TuneConfig has "
                f"{metrics} {modes}."
            )
        self._metrics, self._modes = metrics, modes
        several = len(metrics) > 1
        self._metric: Any = list(metrics) if several else metrics[0]
        self._mode: Any = list(modes) if several else modes[0]

    def set_search_properties(
        self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any
    ) -> bool:
        """See `Searcher.set_search_properties`: Tune's metric, mode, domains and stop rules."""
        if metric is not None:
            self._aim(metric, mode)
        self._endings.stop = spec.get("stop")
        from ray.tune.search.variant_generator import parse_spec_vars

        _, domains, grid = parse_spec_vars(config)
        if self._space is None:
            from ray.tune.search.optuna import OptunaSearch

            self._space = OptunaSearch.convert_search_space(config)
            return bool(self._space)
        return not domains and not grid  # domains in two places are refused by Tune

    def prepare(self, scheduler: TrialScheduler | None, *, number_trials: bool) -> None:
        """Learn what else `studies.ray.tuner` knows of the sweep; see the class."""
        self._endings.scheduler = scheduler or self._endings.scheduler or FIFOScheduler()  # type: ignore[no-untyped-call]
        self._number_trials = self._number_trials or number_trials

    @property
    def name(self) -> str:
        """Of the study."""
        return self._name

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is optimized; empty until that is known."""
        return self._metrics

    @property
    def modes(self) -> tuple[str, ...]:
        """ "min" or "max" for each metric."""
        return self._modes

    @property
    def study(self) -> optuna.Study:
        """The study; made, or opened, at first use.

        Raises:
            RuntimeError: metric, mode or space are not known.
            MismatchError: see the class.
        """
        if self._study is None:
            self._study = self._open()
        return self._study

    def _open(self) -> optuna.Study:
        if not self._metrics or self._space is None:
            raise RuntimeError(
                "StudySearcher needs a space, a metric and a mode: give them to it, or use "
                "studies.ray.tuner; Tune passes on those of TuneConfig only with a param_space."
            )
        # Tune would end the whole sweep where one trial forgets to report the metric.
        os.environ.setdefault(STRICT, "1")
        if self._storage is None:
            self._storage = InMemoryStorage() if self._url is None else open_storage(self._url)
        return open_study(
            self._name,
            self._storage,
            self._sampler,
            self._space,
            (self._metrics, self._modes),
            self._points,
            self._rewards,
        )

    # Asking.

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """See `Searcher.suggest`; after a restore, trials that Tune forgot come first."""
        study = self.study
        assert self._space is not None  # or there is no study
        known = self._number(trial_id)
        if known is None and self._orphans:
            known = self._orphans.pop(0)
        # A trial that a killed process asked keeps its draws; the rest of them are made again.
        trial = study.ask() if known is None else self._trial(known)
        self._numbers[trial_id] = trial.number
        if not self._frozen(trial.number).state.is_finished():
            trial.set_user_attr(TRIAL_ID, trial_id)
            returned = draw(self._space, trial)
        else:
            returned = draw(self._space, FixedTrial(trial.params))
        config = {**trial.params, **returned}
        if not isinstance(self._space, Space):
            config = unflatten_dict(config)
        if self._number_trials:
            config[NUMBER] = trial.number
        return config

    # Being told.

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See `Searcher.on_trial_result`: an intermediate value of a single objective."""
        self._endings.saw(trial_id, result)
        number = self._number(trial_id)
        if number is None or len(self._metrics) > 1:
            return
        frozen, value = self._frozen(number), finite(result.get(self._metrics[0]))
        step = int(result.get(TRAINING_ITERATION, 0))
        open_ = not frozen.state.is_finished() and step not in frozen.intermediate_values
        if open_ and value is not None:
            self._trial(number).report(value, step)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See `Searcher.on_trial_complete`; told again, it does nothing."""
        number = self._number(trial_id)
        if number is None or self._frozen(number).state.is_finished():
            return
        trial = self._trial(number)
        if error:
            fail(self.study, trial, "exception", "the trial raised; see error.txt in its folder")
            return
        if result is None:
            prune(self.study, trial, "removed by the scheduler while it was paused or pending")
            return
        tell(self.study, trial, self._metrics, result, self._endings.of(trial_id, result))

    def add_evaluated_point(
        self,
        parameters: Mapping[str, Any],
        value: float | Sequence[float],
        error: bool = False,
        pruned: bool = False,
        intermediate_values: list[float] | None = None,
    ) -> None:
        """See `Searcher.add_evaluated_point`; several objectives take a value for each.

        Raises:
            ValueError: a point outside the space, or not as many values as metrics.
        """
        study = self.study
        assert self._space is not None  # or there is no study
        state = TrialState.FAIL if error else TrialState.PRUNED if pruned else TrialState.COMPLETE
        add_point(
            study, self._space, self._metrics, parameters, value, state, intermediate_values or ()
        )

    # Trials.

    def _number(self, trial_id: str) -> int | None:
        """Number of the trial of an id; the database knows those that a snapshot does not."""
        if trial_id not in self._numbers:
            for frozen in self.study.get_trials(deepcopy=False):
                if TRIAL_ID in frozen.user_attrs:
                    self._numbers.setdefault(frozen.user_attrs[TRIAL_ID], frozen.number)
        return self._numbers.get(trial_id)

    def _frozen(self, number: int) -> FrozenTrial:
        return self.study.get_trials(deepcopy=False)[number]

    def _trial(self, number: int) -> Trial:
        return Trial(self.study, self._frozen(number)._trial_id)

    # Storing.

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON; a study in memory is in it, one in a database stays there."""
        trials = None
        if self._study is not None and isinstance(self._storage, InMemoryStorage):
            trials = [trial_to_json(t) for t in self._study.get_trials(deepcopy=False)]
        state = {
            "study": self._name,
            "metrics": self._metrics,
            "modes": self._modes,
            "numbers": self._numbers,
            "endings": self._endings.state_dict(),
            "trials": trials,
        }
        Path(checkpoint_path).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Read what `save` wrote; trials of the database that it does not know come first.

        Raises:
            ValueError: the study of another searcher.
        """
        state = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        self._name, self._study = state["study"], None
        self._metrics = self._modes = ()
        if state["metrics"]:
            self._aim(state["metrics"], state["modes"])
        self._endings.load_state_dict(state["endings"])
        if state["trials"] is not None:
            self._storage = InMemoryStorage()
            points, self._points = self._points, []
            rewards, self._rewards = self._rewards, None
            for trial in state["trials"]:
                self.study.add_trial(trial_from_json(trial))
            self._points, self._rewards = points, rewards
        self._numbers = dict(state["numbers"])
        if self._metrics and self._space is not None:
            self._orphans = orphans(self.study, set(self._numbers))

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """See `Searcher.restore_from_dir`; also looks up which trials Tune knows."""
        super().restore_from_dir(checkpoint_dir)
        known = known_to_tune(Path(checkpoint_dir))
        if known is not None and self._metrics and self._space is not None:
            self._orphans = orphans(self.study, known | set(self._numbers))

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_study"] = None
        if self._url is not None:
            state["_storage"] = None
            state["_url"] = self._url.set(password=None) if self._url.password else self._url
        elif isinstance(self._storage, InMemoryStorage):
            state["_storage"] = None  # `save` writes its trials
        return state
