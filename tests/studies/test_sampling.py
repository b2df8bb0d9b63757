"""Sampling that a restart repeats: draws depend on history, trial number and name alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optuna
import pytest
from optuna.trial import Trial

from studies.sampling.samplers import PRUNERS, SAMPLERS, derive_seed, make_pruner, make_sampler

optuna.logging.set_verbosity(optuna.logging.WARNING)


def _suggest(trial: Trial) -> dict[str, Any]:
    values: dict[str, Any] = {
        "arch": trial.suggest_categorical("arch", ["mlp", "cnn"]),
        "depth": trial.suggest_int("depth", 1, 3),
    }
    if values["arch"] == "mlp":
        values["width@arch=mlp"] = trial.suggest_int("width@arch=mlp", 1, 512, log=True)
    return values


def _value(values: dict[str, Any]) -> float:
    return abs(values["depth"] - 2) + (values.get("width@arch=mlp", 700) - 40) ** 2 / 1e5


def _continue(storage: Any, sampler: Any, trials: int, seed: int = 3) -> optuna.Study:
    """One process of a study: a new sampler object, then `trials` trials."""
    study = optuna.create_study(
        study_name="s", storage=storage, sampler=make_sampler(sampler, seed), load_if_exists=True
    )
    for _ in range(trials):
        trial = study.ask()
        study.tell(trial, _value(_suggest(trial)))
    return study


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "gp"])
def test_broken_study_draws_what_the_uninterrupted_one_draws(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        whole = _continue(optuna.storages.InMemoryStorage(), name, 15)
        storage = optuna.storages.InMemoryStorage()
        for part in (1, 4, 10):
            broken = _continue(storage, name, part)
    assert [t.params for t in broken.trials] == [t.params for t in whole.trials]


def test_broken_study_of_a_sampler_object() -> None:
    def sampler() -> optuna.samplers.BaseSampler:
        return optuna.samplers.TPESampler(n_startup_trials=4, seed=0)

    whole = _continue(optuna.storages.InMemoryStorage(), sampler(), 12)
    storage = optuna.storages.InMemoryStorage()
    for part in (3, 9):
        broken = _continue(storage, sampler(), part)
    assert [t.params for t in broken.trials] == [t.params for t in whole.trials]


def test_continued_optuna_study_repeats_points_and_ours_does_not() -> None:
    def distinct(sampler: Callable[[], optuna.samplers.BaseSampler]) -> int:
        storage = optuna.storages.InMemoryStorage()
        for _ in range(2):
            study = optuna.create_study(
                study_name="s", storage=storage, sampler=sampler(), load_if_exists=True
            )
            for _ in range(5):
                trial = study.ask()
                study.tell(trial, trial.suggest_float("x", 0, 1))
        return len({trial.params["x"] for trial in study.trials})

    assert distinct(lambda: optuna.samplers.RandomSampler(seed=3)) == 5
    assert distinct(lambda: make_sampler("random", 3)) == 10


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_trial_killed_between_two_draws_draws_the_rest_alike(name: str) -> None:
    whole = _continue(optuna.storages.InMemoryStorage(), name, 14)
    storage = optuna.storages.InMemoryStorage()
    study = _continue(storage, name, 13)
    killed = study.ask()
    killed.suggest_categorical("arch", ["mlp", "cnn"])
    study = _continue(storage, name, 0)  # a new process
    trial = Trial(study, killed._trial_id)
    study.tell(trial, _value(_suggest(trial)))
    assert study.trials[-1].params == whole.trials[-1].params


def test_study_seed_changes_the_points() -> None:
    one, two = (
        _continue(optuna.storages.InMemoryStorage(), "random", 5, seed=seed) for seed in (0, 1)
    )
    assert [t.params for t in one.trials] != [t.params for t in two.trials]


def test_enumeration_says_when_nothing_is_left() -> None:
    sampler = make_sampler("bruteforce", 0)
    study = optuna.create_study(sampler=sampler)
    seen = set()
    while not sampler.exhausted:
        trial = study.ask()
        seen.add((trial.suggest_int("a", 0, 2), trial.suggest_categorical("b", [True, False])))
        study.tell(trial, 0.0)
    assert len(seen) == len(study.trials) == 6


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_names_are_checked() -> None:
    with pytest.raises(ValueError, match=r"sampler must be one of .*'tpe'.* but got 'tpee'"):
        make_sampler("tpee", 0)
    with pytest.raises(ValueError, match=r"pruner must be one of .*'median'.* but got 'x'"):
        make_pruner("x")
    assert isinstance(make_pruner(None), optuna.pruners.NopPruner)
    more = {"percentile", "threshold", "patient"}
    for name in more:
        with pytest.raises(ValueError, match=f"pruner '{name}' needs options, so an object: "):
            make_pruner(name)
    for name in set(PRUNERS) - more:
        assert isinstance(make_pruner(name), optuna.pruners.BasePruner)


def test_derived_seeds_differ_in_every_part() -> None:
    seeds = {derive_seed(s, n, "x") for s in range(20) for n in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(1, 23) != derive_seed(12, 3)
