"""How a study begins: which scheduler it has, and which points come before any that are sampled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import optuna

from bilevel.space import Space
from studies.runner.schedulers import Fifo, Halving, Scheduler
from studies.sampling.samplers import derive_seed
from studies.sampling.spaces import combinations, points, samplable, sampled_space

__all__ = ["choose_scheduler", "first_points", "fitted"]

MAX_ENUMERATED = 27
"""Combinations of discrete values up to which all are tried before any is sampled."""


def choose_scheduler(scheduler: Scheduler | str, space: Space, study: optuna.Study) -> Scheduler:
    """Return the scheduler of a name; "auto" is halving where the gradient owns something.

    Raises:
        ValueError: an unknown name, or halving for several objectives.
    """
    several = len(study.directions) > 1
    if isinstance(scheduler, Scheduler):
        chosen = scheduler
    elif scheduler == "auto":
        pruned = not isinstance(study.pruner, optuna.pruners.NopPruner)
        chosen = Fifo() if not space.grad or pruned or several else Halving()
    elif scheduler in ("fifo", "halving"):
        chosen = Fifo() if scheduler == "fifo" else Halving()
    else:
        raise ValueError(
            f"scheduler must be 'auto', 'fifo', 'halving' or an object, but got {scheduler!r}."
        )
    if isinstance(chosen, Halving) and several:
        raise ValueError("scheduler: halving ranks by one metric; use 'fifo' for several.")
    return chosen


def first_points(scheduler: Scheduler, space: Space, seed: int) -> list[dict[str, Any]]:
    """Return what is tried before anything is sampled, by mangled names.

    Under halving: all combinations, in an order of the seed, where they are few, and then the
    defaults at sampled values, for the trial of a bracket without hypergradients; the defaults
    alone where the combinations are many.
    """
    if not isinstance(scheduler, Halving) or not space.sampled:
        return []
    count = combinations(space)
    if count is None or not 1 < count <= MAX_ENUMERATED:
        return [space.to_params({})]
    order = points(space, derive_seed(seed, "enumerate"))
    if scheduler.mix and space.grad and count > 2 and samplable(space):
        order.append(sampled_space(space).to_params({}))
    return order


def fitted(scheduler: Scheduler, space: Space, first: int, enumerates: bool) -> Scheduler:
    """Return the scheduler with brackets of the points that come first, where it left that open.

    A sampler that enumerates has no values for what the gradient owns: no trials of other kinds.
    """
    if isinstance(scheduler, Halving) and enumerates:
        scheduler = replace(scheduler, mix=False)
    if not isinstance(scheduler, Halving) or scheduler.most is not None:
        return scheduler
    if not space.sampled:  # the same trial again and again: one at a time
        return replace(scheduler, most=1)
    return replace(scheduler, most=first) if first > 1 else scheduler
