"""What a learner reports: named numbers with roles, a status, and what they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

__all__ = ["Cost", "Metrics", "Role", "RunStatus"]

Role = Literal["value", "constraint", "diagnostic"]


class RunStatus(Enum):
    """State of a learner or of a tuning run."""

    RUNNING = "running"
    CONVERGED = "converged"
    MAX_ITER = "max_iter"
    DIVERGED = "diverged"
    LINESEARCH = "linesearch"
    SINGULAR = "singular"
    INFEASIBLE = "infeasible"
    EARLY_STOPPED = "early_stopped"
    PRUNED = "pruned"
    INTERRUPTED = "interrupted"

    @property
    def finished(self) -> bool:
        """Whether no further step is possible."""
        return self not in (RunStatus.RUNNING, RunStatus.INTERRUPTED)


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
    cost: Cost = field(default_factory=Cost)

    def __getitem__(self, name: str) -> float:
        return self.entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)
