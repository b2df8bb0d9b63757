"""An Optuna study as the searcher of a Ray Tune sweep: every outcome is told once, as it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FixedTrial, TrialState
from ray._private.dict import unflatten_dict  # Tune's own searchers take it; nothing public has it
from ray.air.constants import TRAINING_ITERATION
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from bilevel.space import Space
from studies.messages import Setting
from studies.ray.endings import Endings
from studies.ray.study import TRIAL_ID, SpaceLike, add_point, draw
from studies.ray.sweep import Sweep
from studies.ray.tell import fail, finite, prune, tell
from studies.ray.trainable import NUMBER
from studies.sampling.samplers import make_sampler

if TYPE_CHECKING:
    from ray.tune.schedulers import TrialScheduler

__all__ = ["StudySearcher"]


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
        sampler: name (see `studies.sampling.samplers.SAMPLERS`) or Optuna sampler.  Default: "tpe".
        seed: of the draws; trial by trial, so that a restored sweep repeats none.
        points_to_evaluate: configs to try first.
        evaluated_rewards: their values where they are known: then they are told and not run.
        scheduler: of the sweep, so that an end at its `max_t` is told from a stop before it.
        number_trials: whether a config has the entry "trial_number", from which
            `as_trainable` derives the trial's seed.

    Raises:
        ValueError: metric and mode that do not fit; a mode that is neither; a point outside the
            space.
        MismatchError: the study exists with other directions, another space, learner or task.
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
        if evaluated_rewards is not None and len(evaluated_rewards) != len(points_to_evaluate):
            raise ValueError(
                f"evaluated_rewards: {len(points_to_evaluate)} points, but got "
                f"{len(evaluated_rewards)} rewards."
            )
        self._sweep = Sweep(
            study_name,
            storage,
            make_sampler(sampler, seed),
            space,
            points_to_evaluate,
            evaluated_rewards,
        )
        self._endings = Endings(scheduler)
        self._number_trials = number_trials
        if metric is not None or mode is not None:
            self._aim(metric, mode)

    # What is optimized.

    def _aim(self, metric: Any, mode: Any) -> None:
        self._sweep.aim(metric, mode)
        self._tell_tune()

    def _tell_tune(self) -> None:
        """Set what `Searcher` reads: texts of a single objective, lists of several."""
        metrics, modes = self._sweep.metrics, self._sweep.modes
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
        if self._sweep.space is None:
            from ray.tune.search.optuna import OptunaSearch

            self._sweep.space = OptunaSearch.convert_search_space(config)
            return bool(self._sweep.space)
        return not domains and not grid  # domains in two places are refused by Tune

    def prepare(self, scheduler: TrialScheduler | None, setting: Setting | None) -> None:
        """Learn what else `studies.ray.tuner` knows of the sweep; see the class.

        Args:
            scheduler: of the sweep.
            setting: of a trainable of ours, whose trials are numbered; the study stores its
                learner's and its task's name.

        Raises:
            MismatchError: the study has another learner or another task.
        """
        self._endings.scheduler = scheduler or self._endings.scheduler or FIFOScheduler()  # type: ignore[no-untyped-call]
        if setting is not None:
            self._number_trials = True
            self._sweep.describe({"learner": setting.learner.name, "task": setting.task.name})

    @property
    def name(self) -> str:
        """Of the study."""
        return self._sweep.name

    @property
    def metrics(self) -> tuple[str, ...]:
        """What is optimized; empty until that is known."""
        return self._sweep.metrics

    @property
    def modes(self) -> tuple[str, ...]:
        """ "min" or "max" for each metric."""
        return self._sweep.modes

    @property
    def study(self) -> optuna.Study:
        """The study; made, or opened, at first use.

        Raises:
            RuntimeError: metric, mode or space are not known.
            MismatchError: see the class.
        """
        return self._sweep.study

    # Asking.

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """See `Searcher.suggest`; after a restore, trials that Tune forgot come first."""
        trial, space = self._sweep.ask(trial_id), self._sweep.space
        assert space is not None  # or there is no study
        if not self._sweep.frozen(trial.number).state.is_finished():
            trial.set_user_attr(TRIAL_ID, trial_id)
            returned = draw(space, trial)
        else:
            returned = draw(space, FixedTrial(trial.params))
        config = {**trial.params, **returned}
        if not isinstance(space, Space):
            config = unflatten_dict(config)
        if self._number_trials:
            config[NUMBER] = trial.number
        return config

    # Being told.

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """See `Searcher.on_trial_result`: an intermediate value of a single objective."""
        self._endings.saw(trial_id, result)
        number = self._sweep.number(trial_id)
        if number is None or len(self.metrics) > 1:
            return
        frozen, value = self._sweep.frozen(number), finite(result.get(self.metrics[0]))
        step = int(result.get(TRAINING_ITERATION, 0))
        open_ = not frozen.state.is_finished() and step not in frozen.intermediate_values
        if open_ and value is not None:
            self._sweep.trial(number).report(value, step)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """See `Searcher.on_trial_complete`; told again, it does nothing."""
        number = self._sweep.number(trial_id)
        if number is None or self._sweep.frozen(number).state.is_finished():
            return
        trial = self._sweep.trial(number)
        if error:
            fail(self.study, trial, "exception", "the trial raised; see error.txt in its folder")
            return
        if result is None:
            prune(self.study, trial, "removed by the scheduler while it was paused or pending")
            return
        stopped = self._endings.why_stopped(trial_id, result)
        tell(self.study, trial, self.metrics, result, stopped)

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
        study, space = self.study, self._sweep.space
        assert space is not None  # or there is no study
        state = TrialState.FAIL if error else TrialState.PRUNED if pruned else TrialState.COMPLETE
        add_point(study, space, self.metrics, parameters, value, state, intermediate_values or ())

    # Storing.

    def save(self, checkpoint_path: str) -> None:
        """Write the state as JSON; a study in memory is in it, one in a database stays there."""
        state = {**self._sweep.state(), "endings": self._endings.state_dict()}
        Path(checkpoint_path).write_text(json.dumps(state), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Read what `save` wrote; trials of the database that it does not know come first.

        Raises:
            ValueError: the study of another searcher.
        """
        state = json.loads(Path(checkpoint_path).read_text(encoding="utf-8"))
        self._sweep.load(state)
        self._endings.load_state_dict(state["endings"])
        if self.metrics:
            self._tell_tune()

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """See `Searcher.restore_from_dir`; also looks up which trials Tune knows."""
        super().restore_from_dir(checkpoint_dir)
        self._sweep.load_snapshot(Path(checkpoint_dir))
