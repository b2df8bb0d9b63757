"""Solvers and samplers as learners: one line each, every check on every line."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from adapters import Learner, registry, tasks
from adapters.generation import denoiser
from adapters.iteration import Iterated, Iteration, Progress
from adapters.tasks import Regression
from bilevel import Float, RunStatus, Space


@dataclass(frozen=True)
class Case:
    """A solver or sampler by name, on a small task."""

    name: str
    task: str
    options: Mapping[str, Any]
    hparams: Mapping[str, Any] = field(default_factory=dict)
    seeded: bool = True

    def set_up(self, seed: int = 0, **hparams: Any) -> Learner:
        learner = registry.get(self.name)()
        task = tasks.get(self.task, **self.options)
        learner.setup(task, {**self.hparams, **hparams}, seed=seed)
        return learner


ITERATIONS = {
    "apg": Case("apg", "digits", {"n_train": 200}, {"steps": 6, "batch": 30}),
    "exact_augmented_lagrangian": Case(
        "exact_augmented_lagrangian", "hock_schittkowski", {"number": 42}
    ),
    "sparse_ot": Case("sparse_ot", "digit_clouds", {"m": 6, "n": 8, "problems": 1}, seeded=False),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """These checks do not care how good the denoiser is."""
    monkeypatch.setattr(denoiser, "STEPS", 20)


PARAMETRIZE = pytest.mark.parametrize("case", ITERATIONS.values(), ids=list(ITERATIONS))


def numbers(learner: Learner, steps: int) -> list[dict[str, float]]:
    found = [dict(learner.step()) for _ in range(steps)]
    return [*found, *(dict(learner.evaluate(split)) for split in ("train", "val", "test"))]


@PARAMETRIZE
def test_steps_evaluations_and_seeds(case: Case) -> None:
    learner = case.set_up()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = numbers(learner, 3)
    assert torch.equal(torch.rand(3), expected)
    assert all(math.isfinite(entries["loss"]) for entries in first)
    assert first == numbers(case.set_up(), 3)
    assert dict(learner.evaluate("val")) == dict(learner.evaluate("val"))
    if case.seeded and case.name != "apg":  # another seed would train another denoiser
        assert first != numbers(case.set_up(seed=1), 3)


@PARAMETRIZE
def test_resume_equals_no_break(case: Case) -> None:
    learner = case.set_up()
    learner.step()
    buffer = io.BytesIO()
    torch.save(learner.state_dict(), buffer)
    uninterrupted = numbers(learner, 2)
    buffer.seek(0)
    again = case.set_up()
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert numbers(again, 2) == uninterrupted


@PARAMETRIZE
def test_bad_inputs_raise(case: Case) -> None:
    learner = registry.get(case.name)()
    with pytest.raises(RuntimeError, match="call setup"):
        learner.step()
    with pytest.raises(ValueError, match="needs a task of type"):
        learner.setup(tasks.get("diabetes"), {}, seed=0)
    with pytest.raises(ValueError, match="unknown name 'no_such_name'"):
        case.set_up(no_such_name=1)
    with pytest.raises(ValueError, match="seed"):
        case.set_up(seed=-1)
    with pytest.raises(ValueError, match="split"):
        case.set_up().evaluate("no_such_split")


class Doubling(Iteration):
    """x ← 2x, which ends in infinity."""

    name = "doubling"
    task_type = Regression
    space = Space(start=Float(1.0, 1e300, log=True, default=1e300))

    def start(self) -> dict[str, Any]:
        return {"x": self.setting.constants["start"]}

    def iterate(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
        x = 2 * state["x"]
        return {"x": x}, Progress({"loss": x})

    def measure(self, state: Mapping[str, Any], split: str) -> Mapping[str, float]:
        return {"loss": state["x"]}


def test_divergence_is_a_status_at_the_last_finite_state() -> None:
    learner = Iterated.of(Doubling)()
    learner.setup(tasks.get("diabetes"), {}, seed=0)
    statuses = [learner.step().status for _ in range(40)]
    assert statuses[-1] is RunStatus.DIVERGED
    assert math.isfinite(learner.evaluate("val")["loss"])
    assert learner.step().cost.steps == 0
    again = Iterated.of(Doubling)()
    again.setup(tasks.get("diabetes"), {}, seed=0)
    again.load_state_dict(learner.state_dict())
    assert again.step().status is RunStatus.DIVERGED
    again.setup(tasks.get("diabetes"), {"start": 2.0}, seed=0)
    with pytest.raises(ValueError, match="another run"):
        again.load_state_dict(learner.state_dict())


def test_predictions_that_are_not_finite_end_a_sampler() -> None:
    learner = ITERATIONS["apg"].set_up()
    assert isinstance(learner, Iterated)
    broken = learner.iteration.setting.artifacts["denoiser"]
    with torch.no_grad():
        broken.last.bias.fill_(math.nan)
    assert learner.step().status is RunStatus.DIVERGED
    assert math.isfinite(learner.evaluate("val")["loss"])
