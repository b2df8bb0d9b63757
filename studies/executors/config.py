"""Which executor, as data: what `Study.run` takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from studies.executors import server
from studies.executors.base import Executor
from studies.messages import Setting

__all__ = ["ExecutorConfig", "Here", "Processes", "RayActors", "executor_config"]

ExecutorName = Literal["auto", "in_process", "pool", "ray"]


class ExecutorConfig(ABC):
    """Opens an executor; a frozen dataclass."""

    can_kill = True
    """Whether a trial can be ended in the middle of a step."""

    def prepare(self) -> None:  # noqa: B027  (most have nothing to prepare)
        """Begin in the background with what `open` needs."""

    @abstractmethod
    def open(self, setting: Setting, interrupted: Callable[[], bool]) -> Executor:
        """Start the workers."""


@dataclass(frozen=True)
class Here(ExecutorConfig):
    """In this process, one trial at a time."""

    can_kill = False

    def open(self, setting: Setting, interrupted: Callable[[], bool]) -> Executor:
        """See `ExecutorConfig.open`."""
        from studies.executors.in_process import InProcess

        return InProcess(setting, interrupted)


@dataclass(frozen=True)
class Processes(ExecutorConfig):
    """A pool of processes on this host.

    Attributes:
        workers: number of processes.
        threads: of torch in each; None: those of this process, at most its share of cores.
        gpus: device numbers, dealt round robin: each worker sees one.
        memory: bytes that a worker's data may grow by; None for no limit.

    Raises:
        ValueError: a number that is not positive.
    """

    workers: int = 2
    threads: int | None = None
    gpus: tuple[int, ...] = ()
    memory: int | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "memory"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, but got {value!r}.")

    def prepare(self) -> None:
        """See `ExecutorConfig.prepare`."""
        server.start()

    def open(self, setting: Setting, interrupted: Callable[[], bool]) -> Executor:
        """See `ExecutorConfig.open`."""
        from studies.executors.pool import Pool

        return Pool(setting, self.workers, threads=self.threads, gpus=self.gpus, memory=self.memory)


@dataclass(frozen=True)
class RayActors(ExecutorConfig):
    """Actors on a Ray cluster.

    Attributes:
        workers: number of actors.
        address: of a running cluster, such as "auto"; None: the one this process is connected to,
            or a local one for the time of the run.
        resources: of each actor, such as {"CPU": 1, "GPU": 0.5}; by default one CPU.

    Raises:
        ValueError: fewer than one worker.
    """

    workers: int = 2
    address: str | None = None
    resources: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"workers must be at least 1, but got {self.workers!r}.")

    def open(self, setting: Setting, interrupted: Callable[[], bool]) -> Executor:
        """See `ExecutorConfig.open`."""
        from studies.executors.cluster import Cluster

        return Cluster(setting, self.workers, address=self.address, resources=dict(self.resources))


def executor_config(
    executor: ExecutorConfig | str, workers: int | None, killing: bool
) -> ExecutorConfig:
    """Return the executor of a name: "auto" is a pool for several workers or a time limit.

    Args:
        executor: a name or a config.
        workers: number of workers; None: that of the config, or 1.
        killing: whether trials may have to be ended in the middle of a step.

    Raises:
        ValueError: an unknown name, several workers in one process, or a time limit there.
    """
    if isinstance(executor, ExecutorConfig):
        if workers is not None and workers != getattr(executor, "workers", 1):
            raise ValueError(f"workers: {executor!r} has its own number, but got {workers!r}.")
        config = executor
    elif executor == "auto":
        config = Processes(workers or 1) if killing or (workers or 1) > 1 else Here()
    elif executor == "in_process":
        if (workers or 1) > 1:
            raise ValueError(f"workers: executor 'in_process' has one, but got {workers!r}.")
        config = Here()
    elif executor == "pool":
        config = Processes(workers or 1)
    elif executor == "ray":
        config = RayActors(workers or 1)
    else:
        raise ValueError(
            "executor must be 'auto', 'in_process', 'pool', 'ray' or a config such as "
            f"Processes(4), but got {executor!r}."
        )
    if killing and not config.can_kill:
        raise ValueError(
            "trial_seconds: a trial in this process cannot be ended from outside; use "
            "executor='pool'."
        )
    return config
