"""Optuna tunes each method for three trials, with a pruner."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapters import registry, tasks
from adapters.generation import denoiser
from studies import Study

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "compander": ("digits", {"n_train": 200}, {}),
    "learned_weights": ("digits", {"n_train": 200}, {}),
    "reweighted": ("digits", {"n_train": 200}, {}),
    "adawac": ("digits", {"n_train": 200}, {}),
    "apg": ("digits", {"n_train": 200}, {"steps": 5, "batch": 20}),
    "coin": ("digits_stream", {"n_train": 224, "n_val": 70}, {}),
    "bang": ("digits_robust", {"n_train": 200, "n_val": 100}, {"steps": 20}),
    "eata": ("digits_stream", {"n_train": 224, "n_val": 70}, {"batch": 32, "fisher_samples": 64}),
    "exact_augmented_lagrangian": ("hock_schittkowski", {"number": 42}, {"max_inner": 5000}),
    "ps_kd": ("digits", {"n_train": 200}, {}),
    "peft": ("descriptions", {"length": 16, "n_train": 64}, {"rank": 2, "batch": 4}),
    "sparse_ot": ("digit_clouds", {"m": 6, "n": 8}, {"cardinality": 4}),
}
CASES |= {
    name: ("digits_transfer", {"hidden": (32,), "activation": "tanh"}, {})
    for name in registry.names()
    if name not in CASES and name != "network"
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_three_trials_with_a_pruner(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denoiser, "STEPS", 20)  # how good it is does not matter here
    task, options, fixed = CASES[name]
    space = registry.get(name).space
    space = space.own(**dict.fromkeys(space.grad, "sampler")).fix(**fixed)
    study = Study(
        name, name, tasks.get(task, **options), tmp_path / "study.db", space=space, pruner="median"
    )
    study.run(trials=3, budget=24)
    assert len(study.trials) == 3
    assert study.best.value is not None
    assert "test/loss" in study.best.metrics
