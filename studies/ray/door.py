"""The door to Ray Tune: a trainable, a searcher, and a `Tuner` with settings that hold.

trainable = as_trainable("network", "digits", space, Descent(Unrolled(steps=5)), budget=400)
searcher = StudySearcher(space, storage="study.db", study_name="sweep")
results = tuner(trainable, searcher, trials=20, workers=2, out="out").fit()
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bilevel.checks import integer
from studies.executors.hosts import check_hosts
from studies.ray.policies import Within, bounds, mutations, policy_schedules
from studies.ray.searcher import StudySearcher
from studies.ray.sweep import STRICT
from studies.ray.trainable import BilevelTrainable, as_trainable

if TYPE_CHECKING:
    from ray.tune import Tuner
    from ray.tune.schedulers import TrialScheduler

__all__ = [
    "StudySearcher",
    "Within",
    "as_trainable",
    "bounds",
    "mutations",
    "policy_schedules",
    "tuner",
]

SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV, JSON and TensorBoard files of every trial
    "TUNE_GLOBAL_CHECKPOINT_S": "1",  # a killed driver loses a second, not ten
    STRICT: "1",  # one bad trial does not end the sweep
}
"""Environment variables that `tuner` sets where they are not set; `fit` reads them."""


def tuner(
    trainable: Any,
    searcher: StudySearcher | None = None,
    *,
    trials: int,
    workers: int,
    out: str | os.PathLike[str],
    name: str = "sweep",
    metric: str | None = None,
    mode: str = "min",
    scheduler: TrialScheduler | None = None,
    param_space: Mapping[str, Any] | None = None,
    stop: Any = None,
    checkpoint_every: int = 0,
    resources: Mapping[str, float] | None = None,
) -> Tuner:
    """Return a Tuner: reused actors, no loggers, a snapshot each second, one retry.

    Start Ray first (``ray.init(num_cpus=2)``, ``ray.init("auto")``); where it does not run,
    `Tuner.fit` starts it on this machine.  ``Tuner.restore(f"{out}/{name}", trainable)`` goes on
    with a sweep whose driver died.

    Args:
        trainable: from `as_trainable`, or any trainable of Tune.
        searcher: the study; None where Tune draws the configs itself, as PBT and PB2 want it.
        trials: of the sweep in total.
        workers: trials at a time; with HyperBand, PBT and PB2 what the cluster has resources for.
        out: folder for the sweep; on a cluster one that every node sees, or a URL such as ``s3://``.
        name: folder of the sweep inside `out`.
        metric: what schedulers compare, and a searcher without metric optimizes.  Default: the
            searcher's, or the trainable's.
        mode: "min" or "max".
        scheduler: such as `ray.tune.schedulers.ASHAScheduler`, without metric and mode.
        param_space: constants, and domains where there is no searcher.  Default: the space of a
            trainable of ours.
        stop: rule of Tune that ends a trial.
        checkpoint_every: iterations between two checkpoints; 0 for one at the end only, from which
            a trial of a lost worker starts anew.
        resources: of a trial, such as ``{"cpu": 1, "gpu": 0.5}``.  Default: one CPU.

    Raises:
        ValueError: a number out of its range.
        ExecutorError: Ray runs on several hosts without token authentication.
        MismatchError: the study of the searcher has another learner or another task.
    """
    import ray
    from ray import tune
    from ray.tune.schedulers import HyperBandScheduler, PopulationBasedTraining

    integer("trials", trials, minimum=1)
    integer("workers", workers, minimum=1)
    for variable, value in SETTINGS.items():
        os.environ.setdefault(variable, value)
    # Without its result files, Tune complains about each trial that they are missing.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    if ray.is_initialized():
        check_hosts()
    ours = isinstance(trainable, type) and issubclass(trainable, BilevelTrainable)
    space = dict(param_space or {})
    if searcher is None and param_space is None and ours:
        space = trainable.setting.space.to_ray()
    if searcher is not None:
        searcher.prepare(scheduler, trainable.setting if ours else None)
        space.setdefault("study", searcher.name)  # Tune passes metric and mode on with a space only
    known = () if searcher is None else searcher.metrics
    if metric is None and not known and ours:
        metric = trainable.setting.metrics[0]
    if metric is None and len(known) == 1:
        metric, mode = known[0], searcher.modes[0]  # type: ignore[union-attr]
    runs = tune.with_resources(trainable, dict(resources)) if resources else trainable
    path = str(out)
    # They compare trials with others that are paused, and Tune's limit counts paused ones.
    pauses = isinstance(scheduler, HyperBandScheduler | PopulationBasedTraining)
    return tune.Tuner(
        runs,
        param_space=space,
        tune_config=tune.TuneConfig(
            metric=metric,
            mode=None if metric is None else mode,
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=trials,
            max_concurrent_trials=trials if pauses else workers,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=name,
            storage_path=path if "://" in path else str(Path(path).absolute()),
            stop=stop,
            failure_config=tune.FailureConfig(max_failures=1),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_frequency=checkpoint_every, checkpoint_at_end=True if ours else None
            ),
            verbose=0,
        ),
    )
