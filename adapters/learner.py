"""The learner contract: what every outer loop sees of a training method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from adapters.tasks import Task
from bilevel.checks import did_you_mean
from bilevel.metrics import Metrics
from bilevel.space import Space

__all__ = ["Learner"]


class Learner(ABC):
    """A training method as an inner learner.

    Attributes:
        name: the registry name.
        space: every hyperparameter with range, default and owner.
        needs: frozen artifacts that the task makes once (such as "clean_net").
        phases: names of the phases in order; most methods have "train" only.

    Args:
        space: the class's space with other owners or ranges.

    Raises:
        ValueError: a space with other names.
    """

    name: ClassVar[str]
    space: Space
    needs: ClassVar[tuple[str, ...]] = ()
    phases: ClassVar[tuple[str, ...]] = ("train",)

    def __init__(self, space: Space | None = None) -> None:
        if space is None:
            return
        for name in space:
            if name not in self.space:
                raise ValueError(
                    f"space: {self.name} has no hyperparameter {name!r}; "
                    f"{did_you_mean(name, self.space)}"
                )
        missing = [name for name in self.space if name not in space]
        if missing:
            raise ValueError(
                f"space: {self.name} also needs {', '.join(missing)}; start from {self.name}'s own "
                "space, and fix what nobody should move with space.fix(name=value)."
            )
        self.space = space

    @abstractmethod
    def setup(self, task: Task, hparams: Mapping[str, Any], *, seed: int) -> None:
        """Build the initial state.

        Args:
            task: data, splits and metric.
            hparams: a value for each active name of the space; missing ones take their default.
            seed: decides initial weights, data order and every later random draw.

        Raises:
            ValueError: a value outside its domain, an unknown name, or a task without what the
                method needs.
        """

    @abstractmethod
    def step(self) -> Metrics:
        """Do one unit of budget; reports loss, status and cost."""

    @abstractmethod
    def evaluate(self, split: str) -> Metrics:
        """Return at least "loss" on all of "train", "val" or "test", without changing the state."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the future: tensors, numbers, strings, lists and dicts."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore after `setup` with the same task, hparams and seed; resume equals no break."""
