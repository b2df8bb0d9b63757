"""Samplers and pruners by name, and sampling that a restart repeats exactly."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

__all__ = ["PRUNERS", "SAMPLERS", "SeededSampler", "derive_seed", "make_pruner", "make_sampler"]

SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed),
    "qmc": lambda seed: optuna.samplers.QMCSampler(seed=seed, scramble=True),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "bruteforce": lambda seed: optuna.samplers.BruteForceSampler(seed=seed),
}
"""Optuna's samplers by name; those that need more than a seed are given as objects."""

PRUNERS: dict[str, type[BasePruner]] = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
    "hyperband": optuna.pruners.HyperbandPruner,
    "wilcoxon": optuna.pruners.WilcoxonPruner,
    "percentile": optuna.pruners.PercentilePruner,
    "threshold": optuna.pruners.ThresholdPruner,
    "patient": optuna.pruners.PatientPruner,
}
"""Optuna's pruners by name; the last three need options: an object, or a table of a study file."""


def make_sampler(sampler: BaseSampler | str | None, seed: int) -> SeededSampler:
    """Return the named sampler (default "tpe"), or the given one, seeded trial by trial.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(sampler, BaseSampler):
        return SeededSampler(sampler, seed)
    name = sampler or "tpe"
    if name not in SAMPLERS:
        raise ValueError(
            f"sampler must be one of {sorted(SAMPLERS)} or an object, but got {name!r}."
        )
    with _experiments():
        return SeededSampler(SAMPLERS[name](seed), seed)


@contextlib.contextmanager
def _experiments() -> Iterator[None]:
    """Who asks for one by name need not hear that Optuna may change it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def make_pruner(pruner: BasePruner | str | None) -> BasePruner:
    """Return the named pruner (default "none"), or the given one.

    Raises:
        ValueError: an unknown name, or that of a pruner that needs options.
    """
    if isinstance(pruner, BasePruner):
        return pruner
    name = pruner or "none"
    if name not in PRUNERS:
        raise ValueError(f"pruner must be one of {sorted(PRUNERS)} or an object, but got {name!r}.")
    try:
        with _experiments():
            return PRUNERS[name]()
    except (TypeError, ValueError) as error:
        raise ValueError(f"pruner {name!r} needs options, so an object: {error}") from error


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2³¹) that depends on every part: one stream per (study seed, trial, name)."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


class SeededSampler(BaseSampler):
    """A sampler whose draws depend only on the history, the trial number and the name.

    An Optuna sampler draws from one stream for the whole study: a seeded study that is
    continued starts that stream again and repeats its first points.  Here the stream is
    seeded anew before each draw, so a continued study draws what an uninterrupted one would
    have drawn, even when it was killed between two draws of one trial.

    Attributes:
        enumerates: whether the sampler goes through all values (grid, brute force).
        exhausted: whether a sampler that enumerates has nothing left.

    Args:
        sampler: any Optuna sampler; one whose generators are not Optuna's keeps its own stream.
        seed: the study's seed.
    """

    def __init__(self, sampler: BaseSampler, seed: int) -> None:
        self._sampler = sampler
        self._seed = seed
        enumerating = (optuna.samplers.BruteForceSampler, optuna.samplers.GridSampler)
        self.enumerates = isinstance(sampler, enumerating)
        self.exhausted = False
        self._generators = list(_generators(sampler, set()))

    def __str__(self) -> str:
        return type(self._sampler).__name__

    def _reseed(self, *parts: int | str) -> None:
        seed = derive_seed(self._seed, "sampler", *parts)
        for generator in self._generators:
            generator.seed(seed)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """As the wrapped sampler."""
        return self._sampler.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As the wrapped sampler, from the stream of this trial."""
        self._reseed(trial.number)
        return self._sampler.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """As the wrapped sampler, from the stream of this trial and name."""
        self._reseed(trial.number, param_name)
        return self._sampler.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """As the wrapped sampler, from a stream of this trial."""
        self._reseed(trial.number, "before")
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Any) -> None:
        """As the wrapped sampler, from a stream of this trial."""
        self._reseed(trial.number, "after")
        asked = _Asked(study)
        self._sampler.after_trial(cast(Study, asked), trial, state, values)
        self.exhausted = asked.stopped
        if self.exhausted and not study.user_attrs.get("exhausted"):
            study.set_user_attr("exhausted", True)  # before the trial is stored


class _Asked:
    """A study as `after_trial` sees it: `Study.stop` is refused by Optuna outside `optimize`."""

    def __init__(self, study: Study) -> None:
        self._study = study
        self.stopped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def stop(self) -> None:
        self.stopped = True


def _generators(sampler: object, seen: set[int]) -> Iterator[np.random.RandomState]:
    """Every Optuna generator inside a sampler and the samplers and strategies it holds."""
    if id(sampler) in seen:
        return
    seen.add(id(sampler))
    for value in vars(sampler).values():
        if isinstance(getattr(value, "rng", None), np.random.RandomState):
            yield value.rng
        elif type(value).__module__.startswith("optuna.samplers") and hasattr(value, "__dict__"):
            yield from _generators(value, seen)
