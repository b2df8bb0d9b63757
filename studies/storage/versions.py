"""Versions of what computed a result, to be stored with it."""

from __future__ import annotations

import platform
from importlib import metadata

__all__ = ["versions"]


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("bilevel", "torch", "numpy", "optuna"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # bilevel run from its source tree
            found[name] = "source"
    return found
