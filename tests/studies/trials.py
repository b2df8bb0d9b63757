"""Learners that do what a test of executors asks of them, importable by worker processes."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from adapters.learner import Learner
from adapters.method import Method
from adapters.tasks import Classification, Task
from bilevel import Choice, Float, Space
from bilevel.metrics import Cost, Metrics, RunStatus

__all__ = ["Behaving", "Trivial", "Walker", "nothing"]


def nothing() -> Task:
    """A task that takes no time to make."""
    rows = {"x": torch.zeros(2, 1), "y": torch.tensor([0, 1])}
    splits = dict.fromkeys(("train", "val", "test"), rows)
    return Classification("nothing", splits, n_classes=2, corrupted=torch.zeros(2).bool())


class Trivial(Learner):
    """One step; the loss is the square of x."""

    name: ClassVar[str] = "trivial"
    space = Space(x=Float(-1.0, 1.0))

    def setup(self, task: Task, hparams: Mapping[str, Any], *, seed: int) -> None:
        """Remember x."""
        self.x, self.steps = float(hparams["x"]), 0

    def step(self) -> Metrics:
        """Be finished."""
        self.steps += 1
        cost = Cost(steps=1, gradients=1)
        return Metrics({"loss": self.x**2}, status=RunStatus.CONVERGED, cost=cost)

    def evaluate(self, split: str) -> Metrics:
        """x²."""
        return Metrics({"loss": self.x**2, "size": abs(self.x)})

    def state_dict(self) -> dict[str, Any]:
        """The number of steps."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The number of steps."""
        self.steps = state["steps"]


class Walker(Learner):
    """A random walk: every step draws a number, so that a lost or repeated step shows."""

    name: ClassVar[str] = "walker"
    space = Space(x=Float(-1.0, 1.0), pace=Float(0.0, 1.0, default=0.0))

    def setup(self, task: Task, hparams: Mapping[str, Any], *, seed: int) -> None:
        """Start at x."""
        self.at = torch.tensor(float(hparams["x"]), dtype=torch.float64)
        self.pace, self.steps = float(hparams["pace"]), 0
        self.generator = torch.Generator().manual_seed(seed)

    def step(self) -> Metrics:
        """Take a normal step."""
        time.sleep(self.pace)
        self.at = self.at + torch.randn((), generator=self.generator, dtype=torch.float64)
        self.steps += 1
        return Metrics({"loss": float(self.at**2)}, cost=Cost(steps=1, gradients=1))

    def evaluate(self, split: str) -> Metrics:
        """The square of the place."""
        return Metrics({"loss": float(self.at**2)})

    def state_dict(self) -> dict[str, Any]:
        """Place, steps and generator."""
        return {"at": self.at, "steps": self.steps, "rng": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Place, steps and generator."""
        self.at, self.steps = state["at"], state["steps"]
        self.generator.set_state(state["rng"])


ODD: dict[str, tuple[str, Any]] = {
    "inf": ("loss", math.inf),
    "text": ("loss", "0.5"),
    "scalar": ("loss", torch.tensor(0.5)),
    "array": ("loss", np.array([0.5, 0.5])),
    "scalar beside": ("size", np.float32(0.5)),
    "tensor beside": ("size", torch.ones(2)),
    "set beside": ("size", {0.5}),
}
"""What a metric is from step 5 on, by what `Behaving` is told."""


class Behaving(Walker):
    """Does at step 5 what `how` says; what is to happen once happens where a file is missing."""

    name: ClassVar[str] = "behaving"
    space = Space(
        x=Float(-1.0, 1.0),
        pace=Float(0.0, 1.0, default=0.0),
        how=Choice("fine", "hang", "die once", "die", "memory", "nan", "raise", *ODD),
        mark=Choice("none", "other"),
    )
    folder: ClassVar[str] = os.environ.get("BEHAVING_FOLDER", "")

    def setup(self, task: Task, hparams: Mapping[str, Any], *, seed: int) -> None:
        """Remember how."""
        super().setup(task, hparams, seed=seed)
        self.how = hparams["how"]

    def step(self) -> Metrics:
        """Walk, and behave."""
        found = super().step()
        if self.steps != 5:
            return found
        folder = os.environ.get("BEHAVING_FOLDER", self.folder)
        mark = Path(folder, "died")
        if self.how == "die" or (self.how == "die once" and not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            if folder:
                Path(folder, f"hangs-{os.getpid()}").touch()
            time.sleep(3600)
        if self.how == "memory":
            torch.ones(1 << 31, dtype=torch.uint8)
        if self.how == "nan":
            self.at = self.at * float("nan")
        if self.how == "raise":
            raise RuntimeError("out of luck")
        return found

    def evaluate(self, split: str) -> Metrics:
        """The place, and what is no number."""
        found = super().evaluate(split)
        if self.how not in ODD or self.steps < 5:
            return found
        name, value = ODD[self.how]
        return Metrics({**found, name: value})


class Nameless(Method):
    """A method that lacks what it needs."""
