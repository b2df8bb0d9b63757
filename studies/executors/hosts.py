"""A Ray cluster of several hosts is used with token authentication only."""

from __future__ import annotations

from studies.executors.base import ExecutorError
from studies.executors.ray_connect import Answer, ask

__all__ = ["check_hosts"]


def check_hosts() -> None:
    """Refuse a cluster of several hosts without token authentication.

    The cluster is asked, not this process: a token that nobody wants to see protects nothing.

    Raises:
        ExecutorError: whoever reaches a port of such a cluster runs code on it.
    """
    import ray

    hosts = {
        node["NodeManagerAddress"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }
    if len(hosts) < 2:
        return
    head = ray.get_runtime_context().gcs_address
    if ask(head, token=False) is not Answer.REFUSED:
        raise ExecutorError(
            f"ray: the cluster has {len(hosts)} hosts and no authentication, and its ports "
            "listen on every interface: start it with RAY_AUTH_MODE=token on all of them."
        )
