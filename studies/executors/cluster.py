"""Trials in Ray actors, over the nodes of a cluster; Ray Tune is not involved."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bilevel.checkpoint import replacing
from studies.executors.base import Executor, ExecutorError
from studies.executors.hosts import check_hosts
from studies.executors.ray_connect import answers, check_resources, connect, daemon
from studies.messages import Assignment, Decision, Lost, Message, Outcome, Paused, Setting
from studies.record import Failure
from studies.trial.worker import Worker

__all__ = ["Cluster"]

FETCH_SECONDS = 2.0
"""Wall time between two looks at the checkpoints of running trials."""

GONE_SECONDS = 20.0
"""Wall time without an answer after which the cluster is gone.  After a minute Ray would end this
process; a head that starts again with its memory (Redis) takes a few seconds."""


class _Remote:
    """A worker on some node; checkpoints travel with its messages, so no shared disk is needed."""

    def __init__(self, setting: Setting) -> None:
        self._worker = Worker(setting)
        self._folder = Path(tempfile.mkdtemp(prefix="bilevel-"))
        self._file = self._folder / "none.pt"
        self._sent = 0  # when what was sent last was written, in ns

    def ready(self) -> bool:
        """Answer once everything is imported."""
        return True

    def start(self, trial: Assignment, state: bytes | None) -> tuple[Message, bytes | None]:
        """See `Worker.start`; `state` is the checkpoint to go on from."""
        self._file.unlink(missing_ok=True)
        self._file, self._sent = self._folder / trial.checkpoint.name, 0
        self._file.unlink(missing_ok=True)
        if state is not None:
            with replacing(self._file) as file:  # `checkpoint` may look meanwhile
                file.write(state)
            self._sent = self._file.stat().st_mtime_ns
        message = self._worker.start(replace(trial, checkpoint=self._file))
        return message, self.checkpoint()

    def answer(self, decision: Decision) -> tuple[Message, bytes | None]:
        """See `Worker.answer`."""
        message = self._worker.answer(decision)
        return message, self.checkpoint()

    def checkpoint(self) -> bytes | None:
        """Return the checkpoint of the running trial, if there is one since the last look."""
        try:
            written = self._file.stat().st_mtime_ns
            if written == self._sent:
                return None
            self._sent = written
            return self._file.read_bytes()
        except FileNotFoundError:
            return None

    def interrupt(self) -> None:
        """See `Worker.interrupt`."""
        self._worker.interrupt()


class _Node:
    """An actor, its trial, and what is asked of it."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.trial: Assignment | None = None
        self.reply: Any = None  # to come: the next message of the trial
        self.look: Any = None  # to come: its checkpoint, while it goes on
        self.ready = False
        self.sign = actor.ready.remote()


class Cluster(Executor):
    """Ray actors; a node that is lost is replaced by another, and its trial goes on there.

    Args:
        setting: of the study.
        workers: number of actors.
        address: of a running cluster, such as "auto" or "HOST:PORT"; None: that which this process
            is connected to, or a local one that is started and ended here.
        resources: of each actor, such as {"CPU": 1, "GPU": 0.5}; by default one CPU.

    Raises:
        ExecutorError: Ray is not installed, the cluster cannot be reached, no node has the
            resources, or there are several hosts and no token authentication.
    """

    def __init__(
        self,
        setting: Setting,
        workers: int,
        *,
        address: str | None = None,
        resources: dict[str, float] | None = None,
    ) -> None:
        # Ray's ports listen on every interface; it reads this while it is imported.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        try:
            import ray
        except ImportError as error:
            raise ExecutorError("executor 'ray' needs Ray: pip install 'ray[default]'.") from error
        self._ray = ray
        self._nodes: list[_Node] = []
        self._ours = not ray.is_initialized()
        if self._ours:
            connect(ray, address, workers)
        self._head = ray.get_runtime_context().gcs_address
        self._heard = time.monotonic()
        self._gone = False
        self._daemon = daemon(ray)
        wanted = dict(resources or {"CPU": 1.0})
        try:
            check_hosts()
            check_resources(ray, wanted)
            self._options = {
                "num_cpus": wanted.pop("CPU", 0),
                "num_gpus": wanted.pop("GPU", 0),
                "resources": wanted,
                "max_concurrency": 2,  # so that it hears `interrupt` in the middle of a trial
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
            }
            self._setting = ray.put(setting)
            self._nodes = [_Node(self._actor()) for _ in range(workers)]
        except BaseException:
            self.close()
            raise

    def _actor(self) -> Any:
        return self._ray.remote(_Remote).options(**self._options).remote(self._setting)

    @property
    def free(self) -> int:
        """See `Executor.free`."""
        return sum(node.ready and node.trial is None for node in self._nodes)

    def start(self, trial: Assignment) -> None:
        """See `Executor.start`."""
        node = next(node for node in self._nodes if node.ready and node.trial is None)
        node.trial = trial
        state = trial.checkpoint.read_bytes() if trial.checkpoint.exists() else None
        node.reply = node.actor.start.remote(trial, state)

    def answer(self, number: int, decision: Decision) -> None:
        """See `Executor.answer`."""
        node = self._of(number)
        node.reply = node.actor.answer.remote(decision)

    def wait(self, seconds: float | None) -> Message | None:
        """See `Executor.wait`.

        Raises:
            ExecutorError: an actor does not start, nobody answers for the cluster any more, or
                Ray's daemon on this host has ended.
        """
        busy = [node for node in self._nodes if node.reply is not None]
        coming = [node for node in self._nodes if not node.ready]
        expected = [*(node.reply for node in busy), *(node.sign for node in coming)]
        most = FETCH_SECONDS if seconds is None else min(seconds, FETCH_SECONDS)
        if not expected:
            return None
        self._check_daemon()
        done, _ = self._ray.wait(expected, num_returns=1, timeout=most)
        self._check_daemon()
        if not done:
            if self._is_there():
                self._fetch(busy)
            return None
        for node in coming:
            if node.sign == done[0]:
                self._welcome(node)
                return None
        node = next(node for node in busy if node.reply == done[0])
        trial = node.trial
        assert trial is not None
        try:
            message, state = self._ray.get(node.reply)
        except self._ray.exceptions.RayError as error:
            if not self._is_there():  # the trial is not to blame
                return None
            self._replace(node)
            said = str(error).strip().splitlines()[0]
            if isinstance(error, self._ray.exceptions.OutOfMemoryError):
                return Lost(trial.number, Failure("out of memory", said))
            return Lost(trial.number, Failure("died", f"worker died: {said}"))
        node.reply = None
        self._seen(node)  # older than what came with the message
        _keep(trial, state)
        if isinstance(message, Outcome | Paused):
            node.trial = None
        found: Message = message
        return found

    def interrupt(self) -> None:
        """See `Executor.interrupt`."""
        for node in self._nodes:
            if node.trial is not None:
                node.actor.interrupt.remote()

    def kill(self, number: int) -> None:
        """See `Executor.kill`."""
        self._replace(self._of(number))

    def close(self) -> None:
        """See `Executor.close`."""
        if self._gone:  # Ray would wait for it, or end this process
            return
        for node in self._nodes:
            self._ray.kill(node.actor)
        self._nodes = []
        if self._ours:
            self._ray.shutdown()

    def _is_there(self) -> bool:
        """Whether the head answers; looks every `FETCH_SECONDS`."""
        if time.monotonic() - self._heard < FETCH_SECONDS:
            return True
        if answers(self._head):
            self._heard = time.monotonic()
            return True
        if time.monotonic() - self._heard > GONE_SECONDS:
            raise self._ended(f"the cluster {self._head} is gone: no answer for {GONE_SECONDS:g} s")
        time.sleep(1.0)
        return False

    def _check_daemon(self) -> None:
        """Refuse to go on without the daemon (raylet) of this host; with the head or without it.

        It does not come back to a process that it has left, and Ray ends this process, without a
        word, at the next object that it wants from it.

        Raises:
            ExecutorError: it has ended.
        """
        if self._daemon is None or answers(self._daemon):
            return
        if answers(self._head):
            raise self._ended(f"the daemon of Ray on this host ({self._daemon}) has ended")
        raise self._ended(f"the cluster {self._head} is gone")

    def _ended(self, what: str) -> ExecutorError:
        self._gone = True
        return ExecutorError(
            f"ray: {what}; the trials have their checkpoints, and the same study again goes on "
            "with them."
        )

    def _of(self, number: int) -> _Node:
        return next(n for n in self._nodes if n.trial is not None and n.trial.number == number)

    def _welcome(self, node: _Node) -> None:
        try:
            node.ready = bool(self._ray.get(node.sign))
        except self._ray.exceptions.RayActorError as error:
            if getattr(error, "actor_init_failed", False):  # another one would fail, too
                said = str(error).strip().splitlines()[-1]
                raise ExecutorError(f"ray: an actor does not start: {said}") from error
            if self._is_there():  # its node is gone: try another
                self._replace(node)
        except self._ray.exceptions.RayError as error:
            said = str(error).strip().splitlines()[-1]
            raise ExecutorError(f"ray: an actor does not start: {said}") from error

    def _replace(self, node: _Node) -> None:
        self._ray.kill(node.actor)
        self._nodes[self._nodes.index(node)] = _Node(self._actor())

    def _fetch(self, busy: list[_Node]) -> None:
        """Bring over what running trials have stored, without waiting for it."""
        for node in busy:
            if node.look is None or self._ray.wait([node.look], timeout=0)[0]:
                self._seen(node)
                node.look = node.actor.checkpoint.remote()

    def _seen(self, node: _Node) -> None:
        """Keep the checkpoint that was asked for."""
        if node.look is None or node.trial is None:
            return
        with contextlib.suppress(self._ray.exceptions.RayError):  # its next reply says so
            _keep(node.trial, self._ray.get(node.look))
        node.look = None


def _keep(trial: Assignment, state: bytes | None) -> None:
    """Store a checkpoint that came over the network as if it had been written here."""
    if state is None:
        return
    with replacing(trial.checkpoint) as file:
        file.write(state)
