"""Tasks by name: ``tasks.get("digits", noise=0.3, seed=0)``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from adapters.tasks import images, text
from adapters.tasks.bundled import breast_cancer, diabetes, digits, digits_split
from adapters.tasks.constrained import Constrained, constrained_logistic, hock_schittkowski
from adapters.tasks.kinds import Regression, Segmentation, Sequences
from adapters.tasks.shifted import digits_robust, digits_stream
from adapters.tasks.task import Classification, Split, Task
from adapters.tasks.transfer import Transfer, digits_rotated, digits_transfer
from adapters.tasks.transport import Transport, digit_clouds
from bilevel.checks import did_you_mean

__all__ = [
    "Classification",
    "Constrained",
    "Regression",
    "Segmentation",
    "Sequences",
    "Split",
    "Task",
    "Transfer",
    "Transport",
    "describe",
    "get",
    "names",
    "option_names",
    "register",
]

_makers: dict[str, Callable[..., Task]] = {
    "banking77": text.banking77,
    "breast_cancer": breast_cancer,
    "constrained_logistic": constrained_logistic,
    "descriptions": text.descriptions,
    "diabetes": diabetes,
    "digit_clouds": digit_clouds,
    "digits": digits,
    "digits_robust": digits_robust,
    "digits_rotated": digits_rotated,
    "digits_split": digits_split,
    "digits_stream": digits_stream,
    "digits_transfer": digits_transfer,
    "fashion": images.fashion,
    "hock_schittkowski": hock_schittkowski,
    "mnist": images.mnist,
    "nuclei": images.nuclei,
    "omniglot": images.omniglot,
    "shakespeare": text.shakespeare,
    "stories": text.stories,
}


def names() -> list[str]:
    """Return the names of all tasks."""
    return sorted(_makers)


def describe() -> dict[str, str]:
    """Return one line about each task."""
    return {name: inspect.getdoc(_makers[name]).splitlines()[0] for name in names()}  # type: ignore[union-attr]


def option_names(name: str) -> list[str]:
    """Return the names of a task's options.

    Raises:
        ValueError: an unknown task.
    """
    if name not in _makers:
        raise ValueError(f"unknown task {name!r}; {did_you_mean(name, names())}")
    return list(inspect.signature(_makers[name]).parameters)


def get(name: str, /, **options: Any) -> Task:
    """Make a task.

    Args:
        name: one of `names()`.
        **options: arguments of its maker, such as ``noise=0.3, seed=0`` of "digits".

    Raises:
        ValueError: an unknown task or option (the message lists the known ones), or an option
            out of its range.
        TypeError: an option of another type.
        FileNotFoundError: it needs the data folder, see `adapters.tasks.folder`.

    Example:
        >>> task = get("digits", noise=0.3, seed=0)
        >>> task.input_shape, len(task.split("train")["y"]), int(task.corrupted.sum())
        ((1, 8, 8), 600, 180)
    """
    known = option_names(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"task {name!r} has no option {option!r}; {did_you_mean(option, known)}"
            )
    return _makers[name](**options)


def register(name: str) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Decorate a function that makes a task, so that `get` finds it.

    The first line of its docstring describes it; its arguments are the options.

    Raises:
        ValueError: the name is taken by another function, or the function has no docstring.
    """

    def decorate(maker: Callable[..., Task]) -> Callable[..., Task]:
        if name in _makers and _makers[name] is not maker:
            raise ValueError(f"there is a task {name!r} already: {_makers[name].__qualname__}.")
        if not inspect.getdoc(maker):
            raise ValueError(f"{maker.__qualname__} needs a docstring: its first line is shown.")
        _makers[name] = maker
        return maker

    return decorate
