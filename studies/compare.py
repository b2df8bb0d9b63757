"""`bilevel tune TASK`: ways to choose hyperparameters, at equal cost, over several seeds.

Every way gets the same number of equivalent training steps per seed, sees the same splits, and
chooses by validation loss alone; the test split is only reported.  All of it is stored as
studies, one for each way and seed, so that an interrupted comparison goes on where it was.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from adapters import tasks
from adapters.learner import Learner
from bilevel.algorithm import OuterAlgorithm
from bilevel.budget import Budget
from bilevel.descent import Descent
from bilevel.space import Space
from hypergrad import Unrolled
from studies.events import Event
from studies.record import TrialRecord
from studies.study import Study

__all__ = ["Comparison", "Row", "Way", "compare", "ways"]

LEAST_RUNG = 60
"""Equivalent steps up to the first halving of a bracket, at least."""

METRICS = ("val/loss", "val/accuracy", "test/loss", "test/accuracy")


def _random(seed: int) -> BaseSampler:
    return RandomSampler(seed=seed)


@dataclass(frozen=True)
class _TPE:
    """Optuna's TPE after fewer random trials than its usual ten, which here is all there are."""

    startup: int

    def __call__(self, seed: int) -> BaseSampler:
        return TPESampler(seed=seed, n_startup_trials=self.startup)


@dataclass(frozen=True)
class Way:
    """One way to choose hyperparameters: one row of the table.

    Attributes:
        name: short, part of the study's name.
        title: in the table.
        space: who owns what.
        trials: of each study.
        budget: of each trial.
        cost: of all trials of a study together, in equivalent steps.
        algorithm: moves the gradient-owned values.
        sampler: seed -> what chooses the sampler-owned ones; None for a study's default.
        from_default: whether the first trial is at the defaults.
    """

    name: str
    title: str
    space: Space
    trials: int
    budget: Budget
    cost: int
    algorithm: OuterAlgorithm[Any] | None = None
    sampler: Callable[[int], BaseSampler] | None = None
    from_default: bool = False

    @property
    def halved(self) -> bool:
        """Whether trials wait for one another."""
        return self.trials > 1 and bool(self.space.grad)


@dataclass(frozen=True)
class Row:
    """What a way reached: its best trial by validation loss, for each seed.

    Attributes:
        way: the way.
        best: best trial of each seed.
        costs: equivalent steps spent, for each seed.
        seconds: wall time of all trials, for each seed.
    """

    way: Way
    best: tuple[TrialRecord, ...]
    costs: tuple[int, ...]
    seconds: tuple[float, ...]

    def mean(self, metric: str) -> float:
        """Mean of a metric over seeds."""
        return statistics.fmean(record.metrics[metric] for record in self.best)

    def text(self, metric: str) -> str:
        """Mean ± sample standard deviation over seeds; one seed has none."""
        values = [record.metrics[metric] for record in self.best]
        mean = f"{self.mean(metric):.3f}"
        return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        task: name of the task.
        options: of the task, but for the seed.
        learner: name of the learner.
        seeds: of task, weights and samplers.
        budget: equivalent training steps of each way and seed.
        rows: the ways.
        studies: study of each way (by name) at the first seed.
    """

    task: str
    options: dict[str, Any]
    learner: str
    seeds: tuple[int, ...]
    budget: int
    rows: tuple[Row, ...]
    studies: dict[str, Study]

    def explain(self) -> str:
        """What is compared, in full sentences; goes under the table."""
        by_name = {row.way.name: row.way for row in self.rows}
        smooth = list(by_name["gradient"].space.grad)
        sentences = [
            "Chosen by validation loss, test only reported; every trial keeps its best rung of ten "
            "(early stopping).",
            "Cost: equivalent training steps per seed, gradients + 2 · Hessian-vector products; "
            "the first row takes one trial's share.",
            f"Both searches and the gradient choose the same {len(smooth)} hyperparameters.",
        ]
        if len(self.seeds) > 1:
            sentences.insert(
                0,
                "Mean ± standard deviation over seeds; each has its own split, wrong labels and "
                "weights.",
            )
        if "hybrid" in by_name:
            rest = [n for n in by_name["hybrid"].space.sampled if n not in smooth]
            sentences.append(
                f"The hybrid is a study as `Study.run` does it by default: TPE adds "
                f"{', '.join(rest)}, and bad trials end early."
            )
        return " ".join(sentences)

    def as_json(self) -> dict[str, Any]:
        """The table as plain data."""
        return {
            "task": self.task,
            "options": self.options,
            "learner": self.learner,
            "seeds": list(self.seeds),
            "budget_equivalent_steps": self.budget,
            "rows": [
                {
                    "name": row.way.name,
                    "trials": row.way.trials,
                    "equivalent_steps": list(row.costs),
                    "seconds": list(row.seconds),
                    **{
                        metric: [record.metrics[metric] for record in row.best]
                        for metric in METRICS
                    },
                    "hparams": row.best[0].hparams,
                }
                for row in self.rows
            ],
        }


def ways(space: Space, budget: int, trials: int) -> list[Way]:
    """Return the rows of the comparison.

    Both searches and the gradient choose the same hyperparameters, the smooth ones; only the
    hybrid also chooses the rest.  It is run in brackets of nine trials, or one of three, about as
    many trials as those of a search.

    Args:
        space: of the learner, with its own owners.
        budget: equivalent training steps of each way.
        trials: of a search; each has an equal share of the budget.

    Raises:
        ValueError: a budget too small for the trials.
    """
    share = budget // trials
    halvings = 1 if trials < 8 else 2
    width = 3**halvings
    brackets = max(1, (trials + 1) // 9)
    shares = brackets * (1 + halvings * 2 / 3)  # cost of the hybrid, in budgets of a trial
    least = max(50 * trials, math.ceil(LEAST_RUNG * shares * width))
    if budget < least:
        raise ValueError(
            f"budget: {budget} equivalent steps are too few for {trials} trials; "
            f"give at least {least}."
        )
    smooth = list(space.grad)
    rest = [name for name in space if name not in smooth and space.owner(name) != "fixed"]
    fixed = space.own(**dict.fromkeys([*smooth, *rest], "fixed"))
    sampled = fixed.own(**dict.fromkeys(smooth, "sampler"))
    by_gradient = space.own(**dict.fromkeys(rest, "fixed"))
    descent = Descent(Unrolled(steps=10), lr=0.1)
    each = Budget(equivalent_steps=share)
    whole = Budget(equivalent_steps=budget)
    searched = Way("random", "random search", sampled, trials, each, budget, None, _random, True)
    found = [
        Way("default", "defaults", fixed, 1, each, share),
        Way("default-long", "defaults, longer", fixed, 1, whole, budget),
        searched,
        replace(searched, name="tpe", title="TPE (Optuna)", sampler=_TPE(trials // 2)),
        Way("gradient", "gradient-tuned", by_gradient, 1, whole, budget, descent),
    ]
    if rest:
        part = Budget(equivalent_steps=int(budget / shares))
        found.append(Way("hybrid", "hybrid", space, brackets * width, part, budget, descent))
    return found


def compare(
    task: str,
    learner: type[Learner],
    storage: str | Path,
    *,
    seeds: Sequence[int],
    budget: int,
    trials: int,
    options: dict[str, Any],
    on_event: Callable[[str, int, Event], None] = lambda name, seed, event: None,
) -> Comparison:
    """Run every way at every seed; studies that are finished already are read only.

    Args:
        task: registry name.
        learner: its class; needs smooth hyperparameters.
        storage: database URL or path.
        seeds: each decides a split, wrong labels, weights and samplers.
        budget: equivalent training steps of each way and seed.
        trials: of each search.
        options: of the task.
        on_event: called with the way's name, the seed, and what happened.

    Raises:
        ValueError: a learner without smooth hyperparameters; see `ways` and `Study`.
        RuntimeError: no trial of a way was complete.
    """
    if not learner.space.grad:
        raise ValueError(f"learner: {learner.name} has no smooth hyperparameter to tune.")
    plan = ways(learner.space, budget, trials)
    done: dict[str, list[Study]] = {way.name: [] for way in plan}
    for seed in seeds:
        data = tasks.get(task, seed=seed, **options)
        for way in plan:
            study = Study(
                f"{task} / {learner.name} / {way.name} / seed {seed}",
                learner,
                data,
                storage,
                space=way.space,
                algorithm=way.algorithm,
                sampler=None if way.sampler is None else way.sampler(seed),
                seed=seed,
            )
            if way.from_default and not study.trials:
                study.enqueue({})
            study.run(
                way.trials,
                way.budget,
                total=Budget(equivalent_steps=way.cost) if way.halved else None,
                on_event=lambda event, way=way, seed=seed: on_event(way.name, seed, event),  # type: ignore[misc]
            )
            done[way.name].append(study)
    rows = tuple(_row(way, done[way.name]) for way in plan)
    first = {name: studies[0] for name, studies in done.items()}
    return Comparison(task, options, learner.name, tuple(seeds), budget, rows, first)


def _row(way: Way, studies: Sequence[Study]) -> Row:
    for study in studies:
        if not any(record.state == "complete" for record in study.trials):
            reasons = {str(record.failure) for record in study.trials if record.failure}
            raise RuntimeError(f"no trial of {study.name!r} is complete: {'; '.join(reasons)}")
    return Row(
        way,
        tuple(study.best for study in studies),
        tuple(sum(r.cost.equivalent_steps for r in study.trials) for study in studies),
        tuple(sum(r.cost.seconds for r in study.trials) for study in studies),
    )
