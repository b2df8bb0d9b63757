"""The trainer on tasks that are no classification: it learns, in both precisions, and resumes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from adapters import Method, Task, Trainer, tasks
from adapters.tasks import Regression, Segmentation, Sequences
from bilevel import Float, Space


class Line(Method):
    """Linear regression."""

    name = "line"
    space = Space(lr=Float(1e-3, 1.0, log=True, default=0.05))
    task_type = Regression

    def network(self) -> nn.Module:
        task = cast(Regression, self.setting.task)
        return nn.Linear(task.input_shape[0], task.n_targets)


class Characters(Method):
    """Each character predicted from the one before."""

    name = "characters"
    space = Space(lr=Float(1e-3, 10.0, log=True, default=2.0))
    task_type = Sequences

    def network(self) -> nn.Module:
        n = cast(Sequences, self.setting.task).n_tokens
        return nn.Embedding(n, n)


class Pixels(Method):
    """A mask from one convolution."""

    name = "pixels"
    space = Space(lr=Float(1e-3, 10.0, log=True, default=0.5))
    task_type = Segmentation

    def network(self) -> nn.Module:
        return nn.Conv2d(1, 1, 3, padding=1)


def bright_pixels() -> Segmentation:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 1, 6, 6, generator=generator)
    split = {"x": x, "y": (x[:, 0] > 0.6).float()}
    return Segmentation("bright", {"train": split, "val": split, "test": split})


CASES: dict[type[Method], Any] = {
    Line: lambda: tasks.get("diabetes"),
    Characters: lambda: tasks.get("descriptions"),
    Pixels: bright_pixels,
}


@pytest.mark.parametrize("method", CASES, ids=lambda method: method.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_learns_and_resumes(method: type[Method], dtype: torch.dtype) -> None:
    task: Task = CASES[method]().to(dtype)

    def set_up() -> Trainer:
        learner = Trainer.of(method)()
        learner.setup(task, {}, seed=0)
        return learner

    learner = set_up()
    assert all(value.dtype == dtype for value in learner.params.values())
    before = learner.evaluate("val")["loss"]
    for _ in range(60):
        learner.step()
    assert learner.evaluate("val")["loss"] < 0.9 * before
    again = set_up()
    again.load_state_dict(learner.state_dict())
    assert dict(again.step()) == dict(learner.step())
    with pytest.raises(ValueError, match="needs a task of type"):
        Trainer.of(method)().setup(tasks.get("breast_cancer"), {}, seed=0)
