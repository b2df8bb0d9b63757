"""Phases: what each trains, resume across them, and the cache of finished ones."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from adapters import Trainer
from adapters.phases import PhaseCache
from tests.adapters.battery import numbers
from tests.adapters.methods import TASK, TwoPhases, trainer


def two_phases(cache: PhaseCache | None = None, seed: int = 0, **hparams: Any) -> Trainer:
    learner = Trainer.of(TwoPhases)(phase_cache=cache)
    learner.setup(TASK, hparams, seed=seed)
    return learner


def test_a_phase_trains_what_requires_grad_on_its_own_samples() -> None:
    learner = two_phases(first=4)
    done = [learner.step()["phase_done"] for _ in range(4)]
    assert done == [0, 0, 0, 1]
    assert learner.phase == "head"
    assert list(learner.params) == ["layers.2.bias", "layers.2.weight"]
    assert learner.optimizer_state["momentum_buffer"] is None  # a fresh optimizer
    kept = learner.method.memory["kept"]
    [batch] = learner.inner_batches(1)
    hardest = TASK.split("train")["x"][~kept].flatten(1)
    assert len(hardest) == 20
    assert torch.cdist(batch["x"].flatten(1), hardest).min() > 0


def test_the_next_phase_starts_at_the_trained_weights() -> None:
    learner, long = two_phases(first=4), two_phases(first=10)
    for _ in range(4):
        learner.step(), long.step()
    assert dict(learner.evaluate("val")) == dict(long.evaluate("val"))
    assert learner.phase != long.phase


@pytest.mark.parametrize(("saved_at", "loaded_at"), [(2, 0), (7, 0), (7, 2), (2, 7), (7, 9)])
def test_a_state_is_restored_from_and_into_any_phase(saved_at: int, loaded_at: int) -> None:
    learner = two_phases(first=4)
    for _ in range(saved_at):
        learner.step()
    buffer = io.BytesIO()
    torch.save(learner.state_dict(), buffer)
    expected = numbers(learner, 5)
    other = two_phases(first=4)
    for _ in range(loaded_at):
        other.step()
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert numbers(other, 5) == expected


def test_a_finished_phase_is_used_again() -> None:
    cache: PhaseCache = {}
    learner = two_phases(cache, first=4)
    for _ in range(4):
        learner.step()
    assert len(cache) == 1
    again = two_phases(cache, first=4, head_decay=0.5)
    assert (again.phase, again.hparams["head_decay"].item()) == ("head", 0.5)
    scratch = two_phases(first=4, head_decay=0.5)
    for _ in range(4):
        scratch.step()
    assert numbers(again, 5) == numbers(scratch, 5)


@pytest.mark.parametrize(
    "change", [{"first": 5}, {"lr": 0.2}, {"seed": 1}], ids=lambda change: str(change)
)
def test_a_phase_that_depends_on_a_change_is_trained_again(change: dict[str, Any]) -> None:
    cache: PhaseCache = {}
    learner = two_phases(cache, first=4)
    for _ in range(4):
        learner.step()
    assert two_phases(cache, **{"first": 4, **change}).phase == "body"


def test_a_phase_with_moved_hyperparameters_is_not_kept() -> None:
    cache: PhaseCache = {}
    learner = two_phases(cache, first=4)
    learner.set_hparams({"head_decay": torch.tensor(0.3)})
    for _ in range(4):
        learner.step()
    assert not cache


def test_one_phase_reports_no_end() -> None:
    from tests.adapters.methods import Focal

    assert "phase_done" not in trainer(Focal).step()
