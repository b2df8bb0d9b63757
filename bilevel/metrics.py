"""What a learner reports: named numbers with roles, a status, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

__all__ = ["Cost", "Metrics", "Role", "RunStatus"]

Role = Literal["value", "constraint", "diagnostic"]


class RunStatus(Enum):
    """State of a learner or of a tuning run; `finished` says that no further step is possible."""

    RUNNING = "running", False
    CONVERGED = "converged", True
    MAX_ITER = "max_iter", True
    DIVERGED = "diverged", True
    LINESEARCH = "linesearch", True
    SINGULAR = "singular", True
    INFEASIBLE = "infeasible", True
    EARLY_STOPPED = "early_stopped", True
    PRUNED = "pruned", True
    INTERRUPTED = "interrupted", False

    finished: bool

    def __new__(cls, value: str, finished: bool) -> RunStatus:
        member = object.__new__(cls)
        member._value_ = value
        member.finished = finished
        return member


@dataclass(frozen=True)
class Cost:
    """Counters of work done; they add.

    Attributes:
        steps: inner training steps, the budget's unit.
        gradients: gradient evaluations, those of training steps included.
        hvps: Hessian-vector products.
        seconds: wall time.
    """

    steps: int = 0
    gradients: int = 0
    hvps: int = 0
    seconds: float = 0.0

    @property
    def equivalent_steps(self) -> int:
        """Work in units of one training step: gradients + 2 · hvps.

        An HVP is counted as two gradients although a retained graph makes it cost about one,
        so a comparison at equal `equivalent_steps` never favors hypergradients.
        """
        return self.gradients + 2 * self.hvps

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.steps + other.steps,
            self.gradients + other.gradients,
            self.hvps + other.hvps,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Metrics(Mapping[str, float]):
    """Named numbers of one step or evaluation.

    Attributes:
        entries: the numbers; ``metrics["loss"]`` reads one.
        roles: a role for names that are not plain values: "constraint" or "diagnostic".
        status: whether the learner can go on.
        cost: work done by the call that returned this.
    """

    entries: Mapping[str, float]
    roles: Mapping[str, Role] = field(default_factory=dict)
    status: RunStatus = RunStatus.RUNNING
    cost: Cost = Cost()

    def __getitem__(self, name: str) -> float:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
