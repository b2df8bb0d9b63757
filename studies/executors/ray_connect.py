"""Reaching a Ray cluster: who answers at its address, with which token, and who went away."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from enum import Enum
from typing import Any

from studies.executors.base import ExecutorError

__all__ = ["Answer", "answers", "ask", "check_resources", "connect", "daemon"]

SECONDS = 5.0
"""Wall time in which a host has to take a connection."""

HELLO_SECONDS = 20.0
"""Wall time in which the head of a cluster has to say hello, Ray's import included."""

TOKEN = (
    "set RAY_AUTH_MODE=token and give the cluster's token in ~/.ray/auth_token, in the file "
    "RAY_AUTH_TOKEN_PATH or in RAY_AUTH_TOKEN"
)

# `ray._raylet.GcsClient` is private.  Where the token is another one, the public `ray.init` tries
# for 20 s, prints each try, and then says only that it did not connect.  A process of its own
# speaks this first word, because GcsClient ends its process where there is no token.
HELLO = """
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(address=sys.argv[1])
except AuthenticationError:
    sys.exit(3)
"""


class Answer(Enum):
    """What the head of a cluster says to a stranger."""

    WELCOME = 0
    REFUSED = 3
    NOTHING = 4


def ask(address: str, *, token: bool) -> Answer:
    """Say hello to the head of a cluster, with this process's token or without any.

    Args:
        address: ``HOST:PORT``.
        token: whether to show the token.
    """
    mode = {"RAY_AUTH_MODE": "token" if token else "disabled"}
    try:
        ended = subprocess.run(
            [sys.executable, "-c", HELLO, address],
            env={**os.environ, **mode},
            capture_output=True,
            timeout=HELLO_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Answer.NOTHING
    known = {answer.value for answer in Answer}
    return Answer(ended.returncode) if ended.returncode in known else Answer.NOTHING


def answers(address: str) -> bool:
    """Whether anybody takes a connection at ``HOST:PORT``."""
    return _why_not(address) is None


def daemon(ray: Any) -> str | None:
    """``HOST:PORT`` of the daemon (raylet) that this process is connected through.

    None where that is on another host: of a client (``ray://``).

    Raises:
        ExecutorError: it has ended, and the cluster still lists it: Ray connects to it even where
            another one has been started since, and would wait for ever.
    """
    me = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == me)
    host, port = node["NodeManagerAddress"], node["NodeManagerPort"]
    if not _is_here(host):
        return None
    if not answers(f"{host}:{port}"):
        raise ExecutorError(
            f"ray: the daemon of Ray on this host ({host}:{port}) has ended, and the cluster has "
            "not noticed yet: it does within half a minute; `ray start` starts another one."
        )
    return f"{host}:{port}"


def connect(ray: Any, address: str | None, workers: int) -> None:
    """Connect this process to a cluster, or start a local one.

    Args:
        ray: the module.
        address: "auto", ``HOST:PORT`` or ``ray://HOST:PORT``; None for a local cluster.
        workers: CPUs of a local cluster.

    Raises:
        ExecutorError: in one sentence, what does not answer, or which token is missing.
    """
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        if address is None:
            ray.init(address="local", num_cpus=workers, include_dashboard=False, **quiet)
            return
        if not address.startswith("ray://"):
            address = _greeted(address)
        ray.init(address=address, **quiet)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        if isinstance(error, ExecutorError):
            raise
        said = str(error).strip().splitlines()[0]
        if address is None:
            raise ExecutorError(f"ray: a local cluster does not start: {said}") from error
        raise ExecutorError(f"ray: cluster {address!r} is not reached: {said}") from error


def check_resources(ray: Any, wanted: dict[str, float]) -> None:
    """Refuse what no node has: Ray would wait for ever.

    Raises:
        ExecutorError: with the most that a node has.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(n, 0.0) >= v for n, v in wanted.items()) for node in nodes):
        most = {n: max((node.get(n, 0.0) for node in nodes), default=0.0) for n in wanted}
        raise ExecutorError(f"resources: no node has {wanted}; the most a node has is {most}.")


def _greeted(address: str) -> str:
    """Return the ``HOST:PORT`` of a cluster that lets this process in.

    Raises:
        ConnectionError: there is no cluster on this host ("auto").
        ValueError: an address that is none.
        ExecutorError: nobody answers, or the token is not that of the cluster.
    """
    # Private; nothing public says which cluster "auto" is without connecting to it, and `ray.init`
    # does not say why it does not connect (see HELLO).
    from ray._private.services import canonicalize_bootstrap_address

    place = canonicalize_bootstrap_address(address)
    if place is None:
        raise ConnectionError("no cluster runs on this host; `ray start --head` starts one.")
    named = f"cluster {address!r}" + (f" ({place})" if address == "auto" else "")
    if (why := _why_not(place)) is not None:
        raise ExecutorError(f"ray: {named} is not reached: {why}.")
    token = os.environ["RAY_AUTH_MODE"] == "token"
    answer = ask(place, token=token)
    if answer is Answer.NOTHING and token and not _has_token():
        raise ExecutorError(f"ray: {named}: this process has no token; {TOKEN}.")
    if answer is Answer.REFUSED:
        raise ExecutorError(f"ray: {named} refuses the token of this process; {TOKEN}.")
    if answer is Answer.NOTHING:
        raise ExecutorError(
            f"ray: {named} is not reached: what answers there is no Ray of this version; the port "
            "is that of `ray start --head --port`."
        )
    return place


def _is_here(host: str) -> bool:
    """Whether an address is one of this host."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True


def _has_token() -> bool:
    """Whether Ray finds a token for this process, in any of the places where it looks."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "get-auth-token"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _why_not(address: str) -> str | None:
    """Why no connection is made to ``HOST:PORT``; None where one is."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=SECONDS):
            return None
    except TimeoutError:
        return f"no answer in {SECONDS:g} s"
    except OSError as error:
        return (error.strerror or str(error)).lower()
