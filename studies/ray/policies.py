"""Population based training: what it may explore, and its policies as schedules."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bilevel.checks import did_you_mean
from bilevel.dimensions import Scalar, dimensions, options
from bilevel.domains import Float, Int
from bilevel.schedule import Schedule
from bilevel.space import Space
from bilevel.to_ray import to_ray

__all__ = ["Within", "bounds", "mutations", "policy_schedules"]


def mutations(space: Space, *names: str) -> dict[str, Any]:
    """Return the `hyperparam_mutations` of PBT: sampler-owned dimensions by mangled name.

    What the gradient owns is never explored; an exploit copies it with the weights.

    Args:
        space: the hyperparameters.
        names: which to explore; only those that keep the shape of weights and optimizer state.
            Default: all floats.

    Raises:
        ValueError: a name that the sampler does not own, or nothing to explore.
    """
    domains = to_ray(space)
    return {
        label: list(options(domain)) if not isinstance(domain, Float | Int) else domains[label]
        for label, domain in _chosen(space, names).items()
    }


def bounds(space: Space, *names: str) -> dict[str, list[float]]:
    """Return the `hyperparam_bounds` of PB2; numbers only, otherwise as `mutations`."""
    return {
        label: [domain.low, domain.high]
        for label, domain in _chosen(space, names).items()
        if isinstance(domain, Float | Int)
    }


class Within:
    """The `custom_explore_fn` of PBT and PB2: an explored number stays inside its bounds.

    PBT multiplies by 0.8 or 1.2 whatever the bounds are; `Space.values_from_params` refuses that.
    """

    def __init__(self, space: Space) -> None:
        self._domains = _sampled(space)

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the config with every sampled number in its domain."""
        inside = dict(config)
        for label, domain in self._domains.items():
            if label not in config or not isinstance(domain, Float | Int):
                continue
            value = min(max(config[label], domain.low), domain.high)
            if isinstance(domain, Int):
                steps = round((value - domain.low) / domain.step)
                value = min(domain.low + steps * domain.step, domain.high)
            inside[label] = value
        return inside


def policy_schedules(
    folder: str | os.PathLike[str], steps_per_report: int = 1
) -> dict[str, Schedule]:
    """Return the schedule behind each ``pbt_policy_ID.txt`` of a sweep, by trial id.

    A policy is the line of descent of a trial: the values of each ancestor up to the iteration at
    which it was exploited, then those of the trial.  Numbers only; replay one with
    `Schedule.replay`, or with Tune's `PopulationBasedTrainingReplay`.  Each is also written beside
    its policy, as ``schedule_ID.json``.

    Args:
        folder: of the sweep (``out/name``).
        steps_per_report: training steps of one iteration.

    Raises:
        ValueError: a line that is no policy; names file and line.
    """
    found = {}
    for path in sorted(Path(folder).glob("pbt_policy_*.txt")):
        trial = path.stem.removeprefix("pbt_policy_")
        found[trial] = _schedule(path, steps_per_report)
        path.with_name(f"schedule_{trial}.json").write_text(found[trial].to_json())
    return found


def _schedule(path: Path, steps: int) -> Schedule:
    rows: list[tuple[int, Mapping[str, Any], Mapping[str, Any]]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            _, _, _, at, before, after = json.loads(line)
            rows.append((int(at), before, after))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path.name}, line {number} is no policy of PBT: {error}") from error
    # A file has the line of the donor first: each exploit comes after all that led to the donor.
    schedule = Schedule()
    begin = 0
    for at, before, after in rows:
        if not schedule.names:
            schedule.record(0, _numbers(before))
        if at * steps < begin:
            raise ValueError(f"{path.name}: iteration {at} comes after a later one.")
        begin = at * steps
        schedule.record(begin, _numbers(after))
    return schedule


def _numbers(config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(float(value), dtype=torch.float64)
        for name, value in config.items()
        if isinstance(value, int | float)
    }


def _sampled(space: Space) -> dict[str, Scalar]:
    return {d.label: d.domain for name in space.sampled for d in dimensions(space, name)}


def _chosen(space: Space, names: tuple[str, ...]) -> dict[str, Scalar]:
    for name in names:
        if name not in space.sampled:
            raise ValueError(
                f"{name!r} is not owned by the sampler; {did_you_mean(name, space.sampled)}"
            )
    chosen = {
        dimension.label: dimension.domain
        for name in space.sampled
        for dimension in dimensions(space, name)
        if (name in names if names else isinstance(dimension.domain, Float))
    }
    if not chosen:
        raise ValueError(f"nothing to explore: the sampler owns {list(space.sampled)}, no float.")
    return chosen
