"""Finished phases that later runs start from, keyed by all that they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from adapters.method import Method
from adapters.tasks import Task
from bilevel.checks import did_you_mean
from bilevel.describe import describe

__all__ = ["PhaseCache", "check_scopes", "phase_key"]

PhaseCache = dict[str, dict[str, Any]]
"""Key of a finished phase -> the learner's state at its end."""


def check_scopes(method: type[Method]) -> None:
    """Check that `Method.scopes` maps names of the space to later phases.

    Raises:
        ValueError: an unknown hyperparameter or phase.
    """
    for name, phase in method.scopes.items():
        if name not in method.space:
            raise ValueError(
                f"{method.__name__}.scopes: unknown hyperparameter {name!r}; "
                f"{did_you_mean(name, method.space)}"
            )
        if phase not in method.phases:
            raise ValueError(
                f"{method.__name__}.scopes[{name!r}]: unknown phase {phase!r}; "
                f"{did_you_mean(phase, method.phases)}"
            )


def later_names(method: type[Method], phase: str) -> set[str]:
    """Return the hyperparameters that act only after a phase."""
    order = method.phases.index
    return {name for name, first in method.scopes.items() if order(first) > order(phase)}


def phase_key(
    method: type[Method], task: Task, seed: int, values: Mapping[str, Any], phase: str
) -> str:
    """Return a hash of all that the end of a phase depends on.

    Args:
        method: with its `scopes`.
        task: by its fingerprint.
        seed: of the run.
        values: all active hyperparameters; those of later phases are left out.
        phase: the finished phase.
    """
    later = later_names(method, phase)
    head = {
        "method": describe(method),
        "task": task.fingerprint,
        "seed": seed,
        "values": describe({n: v for n, v in sorted(values.items()) if n not in later}),
        "phase": phase,
    }
    return hashlib.sha256(json.dumps(head).encode()).hexdigest()
