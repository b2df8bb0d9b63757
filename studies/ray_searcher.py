"""An Optuna study as the searcher of a Ray Tune sweep: every outcome is told once, as it was."""

from __future__ import annotations

import json
import math
import os
import re
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState, create_trial
from ray._private.dict import unflatten_dict
from ray.air.constants import TRAINING_ITERATION
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from bilevel.space import Space
from studies.agreement import MismatchError
from studies.ray_endings import Ending, Endings
from studies.ray_trainable import FAILURE, NUMBER
from studies.sampling import make_sampler
from studies.storage import open_storage, parse_storage
from studies.trials_json import trial_from_json, trial_to_json

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

__all__ = ["TRIAL_ID", "StudySearcher"]

TRIAL_ID = "ray_trial_id"
"""User attribute with Tune's id of a trial: what a restored sweep is reconciled by."""

SpaceLike = Space | Mapping[str, BaseDistribution] | Callable[[Any], Mapping[str, Any] | None]

Direction = Literal["minimize", "maximize"]

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
        metrics = (metric,) if isinstance(metric, str) else tuple(metric or ())
        modes = (mode,) * len(metrics) if isinstance(mode, str) else tuple(mode or ())
        if not metrics or len(metrics) != len(modes) or not set(modes) <= {"min", "max"}:
            raise ValueError(
                "metric and mode must be names and 'min' or 'max', as many of one as of the "
                f"other, but got metric={metric!r}, mode={mode!r}."
            )
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
        directions: list[Direction] = [
            "minimize" if mode == "min" else "maximize" for mode in self._modes
        ]
        study = optuna.create_study(
            study_name=self._name,
            storage=self._storage,
            sampler=self._sampler,
            directions=directions,
            load_if_exists=True,
        )
        self._agree(study, directions)
        if not study.get_trials(deepcopy=False):
            self._warm_up(study)
        return study

    def _agree(self, study: optuna.Study, directions: Sequence[str]) -> None:
        lines = []
        old = [direction.name.lower() for direction in study.directions]
        if old != list(directions):
            lines.append(f"direction: {old} before, {directions} now")
        mine = self._space.to_json() if isinstance(self._space, Space) else None
        stored = study.user_attrs.get("space")
        if mine is not None and stored is not None:
            lines += Space.from_json(stored).differences(Space.from_json(mine))
        if lines:
            raise MismatchError(
                f"study {study.study_name!r} has other settings:\n  " + "\n  ".join(lines)
            )
        if mine is not None and stored is None:
            study.set_user_attr("space", mine)

    def _warm_up(self, study: optuna.Study) -> None:
        if self._rewards is None:
            for point in self._points:
                study.enqueue_trial(dict(point))
            return
        for point, reward in zip(self._points, self._rewards, strict=True):
            self._add(study, point, reward)

    # Asking.

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """See `Searcher.suggest`; after a restore, trials that Tune forgot come first."""
        study = self.study
        known = self._number(trial_id)
        if known is None and self._orphans:
            known = self._orphans.pop(0)
        # A trial that a killed process asked keeps its draws; the rest of them are made again.
        trial = study.ask() if known is None else self._trial(known)
        self._numbers[trial_id] = trial.number
        if not self._frozen(trial.number).state.is_finished():
            trial.set_user_attr(TRIAL_ID, trial_id)
            returned = self._draw(trial)
        else:
            returned = self._draw(FixedTrial(trial.params))
        config = {**trial.params, **returned}
        if not isinstance(self._space, Space):
            config = unflatten_dict(config)
        if self._number_trials:
            config[NUMBER] = trial.number
        return config

    def _draw(self, trial: Any) -> Mapping[str, Any]:
        """Ask a trial for all params; returns what a function adds to them."""
        space = self._space
        if isinstance(space, Space):
            space.suggest(trial)
        elif isinstance(space, Mapping):
            for name, distribution in space.items():
                trial._suggest(name, distribution)
        elif space is not None:
            found = space(trial)
            if found is not None and not isinstance(found, Mapping):
                raise TypeError(
                    f"space: the function must return None or a dict, but got {found!r}."
                )
            return found or {}
        return {}

    # Being told.

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See `Searcher.on_trial_result`: an intermediate value of a single objective."""
        self._endings.saw(trial_id, result)
        number = self._number(trial_id)
        if number is None or len(self._metrics) > 1:
            return
        frozen, value = self._frozen(number), _finite(result.get(self._metrics[0]))
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
            self._fail(trial, "exception", "the trial raised; see error.txt in its folder")
            return
        if result is None:
            self._prune(trial, "removed by the scheduler while it was paused or pending")
            return
        self._note(trial, result)
        if f"{FAILURE}/kind" in result:
            self._fail(trial, result[f"{FAILURE}/kind"], result[f"{FAILURE}/message"])
            return
        values = []
        for name in self._metrics:
            if name not in result:
                self._fail(trial, "exception", f"the last report has no metric {name!r}")
                return
            value = _finite(result[name])
            if value is None:
                self._fail(trial, "not finite", f"{name} is {result[name]!r}")
                return
            values.append(value)
        ending, reason = self._endings.of(trial_id, result)
        if ending is Ending.STOPPED:
            if len(values) == 1:
                step = int(result.get(TRAINING_ITERATION, 0))
                if step not in self._frozen(number).intermediate_values:
                    trial.report(values[0], step)
            self._prune(trial, reason)
            return
        self.study.tell(trial, values)

    def _note(self, trial: Trial, result: Mapping[str, Any]) -> None:
        for name, value in result.items():
            if name.startswith("constraint/"):
                label, excess = name.removeprefix("constraint/"), _finite(value)
                if label not in trial.constraints:
                    trial.set_constraint(label, math.inf if excess is None else excess)
            elif name.startswith("attr/"):
                label = name.removeprefix("attr/")
                try:
                    json.dumps(value := getattr(value, "item", lambda v=value: v)())
                except TypeError as error:
                    value = f"not stored: {error}"
                trial.set_user_attr(label, value)

    def _fail(self, trial: Trial, kind: str, message: str) -> None:
        trial.set_user_attr("failure", {"kind": kind, "message": message})
        self.study.tell(trial, state=TrialState.FAIL)

    def _prune(self, trial: Trial, reason: str) -> None:
        trial.set_user_attr("status", reason)
        self.study.tell(trial, state=TrialState.PRUNED)

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
        state = TrialState.FAIL if error else TrialState.PRUNED if pruned else TrialState.COMPLETE
        self._add(self.study, parameters, value, state, intermediate_values or [])

    def _add(
        self,
        study: optuna.Study,
        point: Mapping[str, Any],
        value: Any,
        state: TrialState = TrialState.COMPLETE,
        rungs: Sequence[float] = (),
    ) -> None:
        fixed = FixedTrial(dict(point))
        with warnings.catch_warnings():  # what is outside is refused below
            warnings.simplefilter("ignore", UserWarning)
            self._draw(fixed)
        for name, distribution in fixed.distributions.items():
            inner = distribution.to_internal_repr(fixed.params[name])
            if not distribution._contains(inner):
                raise ValueError(
                    f"points_to_evaluate: {name}={point[name]!r} is outside the space."
                )
        values = [float(v) for v in (value if isinstance(value, Sequence) else [value])]
        if len(values) != len(self._metrics):
            raise ValueError(f"evaluated_rewards: expected {self._metrics}, but got {value!r}.")
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
            self._find_orphans(set(self._numbers))

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """See `Searcher.restore_from_dir`; also looks up which trials Tune knows."""
        super().restore_from_dir(checkpoint_dir)
        states = sorted(Path(checkpoint_dir).glob("experiment_state-*.json"))
        if states and self._metrics and self._space is not None:
            text = states[-1].read_text(encoding="utf-8")
            known = set(re.findall(r'trial_id\\*": \\*"(\w+)', text))
            self._find_orphans(known | set(self._numbers))

    def _find_orphans(self, known: set[str]) -> None:
        """Trials that were asked after Tune's last snapshot: it will ask for them again."""
        self._orphans = [
            frozen.number
            for frozen in self.study.get_trials(deepcopy=False)
            if frozen.state is not TrialState.WAITING
            and "imported" not in frozen.user_attrs
            and frozen.user_attrs.get(TRIAL_ID) not in known
        ]

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_study"] = None
        if self._url is not None:
            state["_storage"] = None
            state["_url"] = self._url.set(password=None) if self._url.password else self._url
        elif isinstance(self._storage, InMemoryStorage):
            state["_storage"] = None  # `save` writes its trials
        return state


def _finite(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
