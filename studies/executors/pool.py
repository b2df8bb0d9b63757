"""Trials in processes of this host that live as long as the study runs."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import cloudpickle
import torch

from studies.executors import server
from studies.executors.base import Executor, ExecutorError
from studies.messages import Assignment, Decision, Lost, Message, Outcome, Paused, Setting
from studies.record import Failure

__all__ = ["Pool"]

_READY = "ready"

_ENDS: weakref.WeakSet[Connection] = weakref.WeakSet()
"""The coordinator's ends of all pipes."""


def _close_ends() -> None:
    for end in list(_ENDS):
        end.close()


# A process that this one forks must not hold them open: workers would outlive their coordinator.
os.register_at_fork(after_in_child=_close_ends)

MOST_UNREADY = 3
"""Replacements in a row that may die while they start."""


@dataclass(frozen=True)
class _Limits:
    """What a worker process sets for itself before anything else."""

    threads: int
    memory: int | None
    environment: Mapping[str, str]


class _Process:
    """A worker process, its pipes and its trial."""

    def __init__(
        self, process: ForkServerProcess, pipe: Connection, alive: Connection, gpu: int | None
    ) -> None:
        self.process, self.pipe, self.alive, self.gpu = process, pipe, alive, gpu
        _ENDS.update((pipe, alive))
        self.ready = False
        self.number: int | None = None

    def close(self) -> None:
        """Forget a process that has ended."""
        self.process.close()
        self.pipe.close()
        self.alive.close()


class Pool(Executor):
    """Persistent processes, forked from a server that has imported torch once.

    A worker has the environment variables of this process as they were when it began.  It dies
    with the coordinator, ignores Ctrl-C (the coordinator passes it on), and is replaced when it
    dies.  A trial whose worker is gone is `Lost`, and can go on elsewhere.

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
        # A file, not an argument: it is pickled once, and read by each worker.
        self._file = tempfile.NamedTemporaryFile(prefix="bilevel-")  # noqa: SIM115
        self._file.write(payload)
        self._file.flush()
        if threads is None:  # one worker computes as this process would, to the last bit
            threads = min(torch.get_num_threads(), max(1, (os.cpu_count() or 1) // workers))
        self._threads, self._memory = threads, memory
        dealt = [gpus[i % len(gpus)] if gpus else None for i in range(workers)]
        self._processes: list[_Process] = []
        self._began = False  # whether any worker was ready
        self._unready = 0  # that died in a row before they were
        try:
            for gpu in dealt:
                self._processes.append(self._spawn(gpu))
        except BaseException:
            self.close()
            raise

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
                return message  # the others stay in their pipes, and may be killed with them
        return None

    def interrupt(self) -> None:
        """See `Executor.interrupt`."""
        for worker in self._processes:
            if worker.number is not None and worker.ready and worker.process.pid is not None:
                with contextlib.suppress(ProcessLookupError):  # it died: `wait` will see
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
            worker.close()
        self._processes = []
        self._file.close()

    def _of(self, number: int) -> _Process:
        return next(worker for worker in self._processes if worker.number == number)

    def _spawn(self, gpu: int | None) -> _Process:
        ours, theirs = server.context().Pipe()
        # Nothing is ever written: it closes when this process ends, however that happens.  Each
        # worker has one of its own, as the kernel tells one process only.
        ending, alive = server.context().Pipe(duplex=False)
        variables = {**os.environ, "OMP_NUM_THREADS": str(self._threads)}
        if gpu is not None:
            variables["CUDA_VISIBLE_DEVICES"] = str(gpu)  # read when CUDA is first used
        limits = _Limits(self._threads, self._memory, variables)
        process = server.context().Process(
            target=_serve, args=(theirs, ending, self._file.name, limits), daemon=True
        )
        server.start()
        try:
            process.start()
        except EOFError as error:
            raise ExecutorError("workers: the process that starts them has ended.") from error
        finally:
            theirs.close()
            ending.close()
        return _Process(process, ours, alive, gpu)

    def _replace(self, worker: _Process) -> None:
        worker.process.kill()
        worker.process.join()
        at = self._processes.index(worker)
        del self._processes[at]
        worker.close()
        self._processes.insert(at, self._spawn(worker.gpu))

    def _send(self, worker: _Process, what: Any) -> None:
        with contextlib.suppress(OSError):  # it died: `wait` will see its sentinel
            worker.pipe.send_bytes(pickle.dumps(what))

    def _receive(self, worker: _Process) -> Message | None:
        try:
            said = worker.pipe.recv_bytes() if worker.pipe.poll() else None
        except (EOFError, OSError):
            said = None
        message = None if said is None else pickle.loads(said)
        if message == _READY:
            worker.ready = self._began = True
            self._unready = 0
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
            self._unready += 1
            if not self._began:
                raise ExecutorError(
                    f"workers: a worker process ended before it was ready ({_ending(code)}); a "
                    "script that runs a study with workers must do so below "
                    "`if __name__ == '__main__':`."
                )
            if self._unready == MOST_UNREADY:
                raise ExecutorError(
                    f"workers: {MOST_UNREADY} processes in a row ended before they were ready; the "
                    f"last one {_ending(code)}."
                )
        self._replace(worker)
        return None if number is None else Lost(number, Failure("died", f"worker {_ending(code)}"))


def _ending(code: int) -> str:
    return f"died (signal {-code})" if code < 0 else f"ended with exit code {code}"


def _serve(pipe: Connection, ending: Connection, path: str, limits: _Limits) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_at_the_end_of(ending)
    # A daemon may have no children, and a learner may have data loaders with processes.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    os.environ.clear()
    os.environ.update(limits.environment)
    from studies.trial.worker import Worker

    torch.set_num_threads(limits.threads)
    with open(path, "rb") as file:  # written by our own parent
        worker = Worker(pickle.load(file))
    signal.signal(signal.SIGUSR1, lambda *_: worker.interrupt())
    if limits.memory is not None:
        most = _data_segment() + limits.memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    with contextlib.suppress(EOFError, ConnectionError):  # the coordinator is gone
        pipe.send_bytes(pickle.dumps(_READY))
        while (what := pickle.loads(pipe.recv_bytes())) is not None:
            said = worker.start(what) if isinstance(what, Assignment) else worker.answer(what)
            pipe.send_bytes(pickle.dumps(said))


def _die_at_the_end_of(pipe: Connection) -> None:
    """Have the kernel end this process when the other end of a pipe is closed.

    A signal, not a thread that watches: a step that never gives the interpreter back ends, too.
    """
    if sys.platform == "linux":
        fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
        flags = fcntl.fcntl(pipe, fcntl.F_GETFL)
        fcntl.fcntl(pipe, fcntl.F_SETFL, flags | os.O_ASYNC)
    if pipe.poll(0):  # it was closed before the call
        os._exit(1)


def _data_segment() -> int:
    """Bytes that count against RLIMIT_DATA."""
    with open("/proc/self/status", encoding="ascii") as status:
        lines = dict(line.split(":", 1) for line in status)
    return int(lines["VmData"].split()[0]) * 1024
