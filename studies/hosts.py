"""A Ray cluster of several hosts is used with token authentication only."""

from __future__ import annotations

__all__ = ["check_hosts"]


def check_hosts() -> None:
    """Refuse a cluster of several hosts without token authentication.

    Raises:
        RuntimeError: whoever reaches a port of such a cluster runs code on it.
    """
    import ray
    from ray._private.authentication.authentication_utils import is_token_auth_enabled

    hosts = {
        node["NodeManagerHostname"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    }
    if len(hosts) > 1 and not is_token_auth_enabled():
        raise RuntimeError(
            f"the Ray cluster has {len(hosts)} hosts and no authentication, and its ports "
            "listen on every interface: start it with RAY_AUTH_MODE=token on all of them."
        )
