"""Trials in spawned processes of this host that live as long as the study runs."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import cloudpickle
import torch

from studies.executors.base import Executor, ExecutorError
from studies.messages import Assignment, Decision, Lost, Message, Outcome, Paused, Setting
from studies.record import Failure

__all__ = ["Pool"]

_READY = "ready"
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class _Limits:
    """What a worker process sets for itself before anything else."""

    parent: int
    threads: int
    memory: int | None


class _Process:
    """A worker process, its pipe and its trial."""

    def __init__(self, process: SpawnProcess, pipe: Connection, gpu: int | None) -> None:
        self.process, self.pipe, self.gpu = process, pipe, gpu
        self.ready = False
        self.number: int | None = None


class Pool(Executor):
    """Persistent spawned processes, each with torch imported once.

    A worker dies with the coordinator, ignores Ctrl-C (the coordinator passes it on), and is
    replaced when it dies.  A trial whose worker is gone is `Lost`, and can go on elsewhere.

    Args:
        setting: of the study; pickled once for each worker.
        workers: number of processes.
        threads: of torch in each; by default those of this process, at most its share of cores.
        gpus: device numbers, dealt round robin: a worker sees one, as ``cuda:0``.
        memory: largest growth of a worker's data segment in bytes; a trial that exceeds it fails
            as "out of memory".

    Raises:
        ExecutorError: the setting cannot be pickled.
    """

    def __init__(
        self,
        setting: Setting,
        workers: int,
        *,
        threads: int | None = None,
        gpus: Sequence[int] = (),
        memory: int | None = None,
    ) -> None:
        try:
            payload = cloudpickle.dumps(setting)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ExecutorError(
                f"workers: learner or task cannot be sent to other processes ({error}); use "
                "executor='in_process'."
            ) from error
        # A file, not an argument: `Process.start` would wait until the child has read it.
        self._file = tempfile.NamedTemporaryFile(prefix="bilevel-")  # noqa: SIM115
        self._file.write(payload)
        self._file.flush()
        if threads is None:  # one worker computes as this process would, to the last bit
            threads = min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // workers))
        self._limits = _Limits(os.getpid(), threads, memory)
        self._context = multiprocessing.get_context("spawn")
        dealt = [gpus[i % len(gpus)] if gpus else None for i in range(workers)]
        self._processes: list[_Process] = []
        try:
            self._processes = [self._spawn(gpu) for gpu in dealt]
        except BaseException:
            self.close()
            raise
        self._news: list[Message] = []

    @property
    def free(self) -> int:
        """See `Executor.free`."""
        return sum(worker.ready and worker.number is None for worker in self._processes)

    def start(self, trial: Assignment) -> None:
        """See `Executor.start`."""
        worker = next(w for w in self._processes if w.ready and w.number is None)
        worker.number = trial.number
        self._send(worker, trial)

    def answer(self, number: int, decision: Decision) -> None:
        """See `Executor.answer`."""
        self._send(self._of(number), decision)

    def wait(self, seconds: float | None) -> Message | None:
        """See `Executor.wait`."""
        if self._news:
            return self._news.pop(0)
        by_handle: dict[Any, _Process] = {}
        for worker in self._processes:
            by_handle[worker.pipe] = by_handle[worker.process.sentinel] = worker
        found = wait(list(by_handle), seconds)
        for handle in sorted(found, key=lambda handle: isinstance(handle, int)):
            worker = by_handle[handle]
            if worker not in self._processes:
                continue  # replaced a moment ago
            message = self._receive(worker)
            if message is not None:
                self._news.append(message)
        return self._news.pop(0) if self._news else None

    def interrupt(self) -> None:
        """See `Executor.interrupt`."""
        for worker in self._processes:
            if worker.number is not None and worker.ready and worker.process.pid is not None:
                os.kill(worker.process.pid, signal.SIGUSR1)

    def kill(self, number: int) -> None:
        """See `Executor.kill`."""
        self._replace(self._of(number))

    def pids(self) -> dict[int, int | None]:
        """Return the process of each running trial, by its number."""
        return {w.number: w.process.pid for w in self._processes if w.number is not None}

    def close(self) -> None:
        """See `Executor.close`."""
        for worker in self._processes:
            if worker.number is None and worker.process.is_alive():
                self._send(worker, None)
            else:
                worker.process.kill()
        for worker in self._processes:
            worker.process.join(2.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
            worker.pipe.close()
        self._processes = []
        self._file.close()

    def _of(self, number: int) -> _Process:
        return next(worker for worker in self._processes if worker.number == number)

    def _spawn(self, gpu: int | None) -> _Process:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._file.name, self._limits), daemon=True
        )
        variables = {"OMP_NUM_THREADS": str(self._limits.threads)}
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = str(gpu)
        with _environment(variables):  # read while torch is imported
            process.start()
        theirs.close()
        return _Process(process, ours, gpu)

    def _replace(self, worker: _Process) -> None:
        worker.process.kill()
        worker.process.join()
        worker.process.close()
        worker.pipe.close()
        self._processes[self._processes.index(worker)] = self._spawn(worker.gpu)

    def _send(self, worker: _Process, what: Any) -> None:
        with contextlib.suppress(OSError):  # it died: `wait` will see its sentinel
            worker.pipe.send(what)

    def _receive(self, worker: _Process) -> Message | None:
        try:
            message = worker.pipe.recv() if worker.pipe.poll() else None
        except (EOFError, OSError):
            message = None
        if message == _READY:
            worker.ready = True
            return None
        if message is not None:
            if isinstance(message, Outcome | Paused):
                worker.number = None
            found: Message = message
            return found
        worker.process.join(1.0)  # the pipe may close before the process is gone
        code, number = worker.process.exitcode, worker.number
        if code is None:
            return None
        if not worker.ready:
            raise ExecutorError(
                f"workers: a worker process ended before it was ready ({_ending(code)}); a script "
                "that runs a study with workers must do so below `if __name__ == '__main__':`."
            )
        self._replace(worker)
        return None if number is None else Lost(number, Failure("died", f"worker {_ending(code)}"))


def _ending(code: int) -> str:
    return f"died (signal {-code})" if code < 0 else f"ended with exit code {code}"


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(pipe: Connection, path: str, limits: _Limits) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(limits.parent)
    from studies.worker import Worker

    torch.set_num_threads(limits.threads)
    with open(path, "rb") as file:  # written by our own parent
        worker = Worker(pickle.load(file))
    signal.signal(signal.SIGUSR1, lambda *_: worker.interrupt())
    if limits.memory is not None:
        most = _data_segment() + limits.memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    pipe.send(_READY)
    while (what := pipe.recv()) is not None:
        pipe.send(worker.start(what) if isinstance(what, Assignment) else worker.answer(what))


def _die_with(parent: int) -> None:
    """Have the kernel end this process when its parent ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)


def _data_segment() -> int:
    """Bytes that count against RLIMIT_DATA."""
    with open("/proc/self/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmData"].split()[0]) * 1024
