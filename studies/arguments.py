"""Arguments of `Study` and `Study.run`, refused where they cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from bilevel.budget import Budget
from bilevel.checks import integer

__all__ = ["Direction", "check_run", "directions", "metric_names"]

Direction = Literal["minimize", "maximize"]


HIGHER_IS_BETTER = ("accuracy", "auc", "dice", "f1", "precision", "psnr", "recall", "score")
"""Ends of the names of metrics that nobody minimizes but by mistake."""


def directions(
    direction: Direction | Sequence[Direction] | None, metrics: Sequence[str]
) -> list[Direction]:
    """Return a direction for each metric; "minimize" where nothing was said.

    Raises:
        ValueError: another word, another number of them, or nothing for an accuracy.
    """
    count = len(metrics)
    if direction is None:
        odd = [name for name in metrics if name.lower().endswith(HIGHER_IS_BETTER)]
        if odd:
            each = " for each metric" if count > 1 else ""
            raise ValueError(
                f"direction must be given{each}, 'minimize' or 'maximize': the default is to "
                f"minimize, but got the metric {odd[0]!r}."
            )
        direction = "minimize"
    found = [direction] * count if isinstance(direction, str) else list(direction)
    for one in found:
        if one not in ("minimize", "maximize"):
            raise ValueError(f"direction must be 'minimize' or 'maximize', but got {one!r}.")
    if len(found) != count:
        raise ValueError(f"direction: {count} metrics, but got {found}.")
    return found


def metric_names(given: str | Sequence[str]) -> tuple[str, ...]:
    """Return the names of what a study optimizes.

    Raises:
        ValueError: no name, the same one twice, or something else.
    """
    names = (given,) if isinstance(given, str) else given
    if not (isinstance(names, Sequence) and names and all(isinstance(n, str) for n in names)):
        raise ValueError(f"metric must be a name or a list of names, but got {given!r}.")
    if len(set(names)) < len(names):
        raise ValueError(f"metric: names must be unique, but got {list(names)}.")
    return tuple(names)


def check_run(
    trials: int,
    rungs: int,
    retries: int,
    max_failed: float,
    trial_seconds: float | None,
    checkpoint_seconds: float | None,
    keep: str,
    total: Budget | None,
) -> None:
    """Check arguments of `Study.run`.

    Raises:
        ValueError: one out of its range.
    """
    integer("trials", trials, minimum=1)
    integer("rungs", rungs, minimum=1)
    integer("retries", retries, minimum=0)
    if not 0 <= max_failed <= 1:
        raise ValueError(f"max_failed must be in [0, 1], but got {max_failed!r}.")
    if trial_seconds is not None and not trial_seconds > 0:
        raise ValueError(f"trial_seconds must be positive, but got {trial_seconds!r}.")
    if checkpoint_seconds is not None and not checkpoint_seconds >= 0:
        raise ValueError(f"checkpoint_seconds must be >= 0, but got {checkpoint_seconds!r}.")
    if keep not in ("best", "last"):
        raise ValueError(f"keep must be 'best' or 'last', but got {keep!r}.")
    if not isinstance(total, Budget | None):
        raise ValueError(f"total must be a Budget, but got {total!r}.")
