"""Frozen artifacts that methods need, such as a clean network: made once per task and seed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from adapters.functional import copy_module
from adapters.tasks import Task
from bilevel.checks import did_you_mean
from hypergrad import seeded

__all__ = ["register", "resolve"]

Maker = Callable[[Task, int], Any]
"""``(task, seed) -> artifact``: a module, a tensor, or plain data; deterministic."""

_makers: dict[str, Maker] = {}
_made: dict[tuple[str, str, int], Any] = {}


def register(name: str) -> Callable[[Maker], Maker]:
    """Decorate a function ``(task, seed) -> artifact``, so that a method can name it in `needs`.

    Raises:
        ValueError: the name is taken by another function.
    """

    def decorate(maker: Maker) -> Maker:
        if _makers.get(name, maker) is not maker:
            raise ValueError(
                f"there is an artifact {name!r} already: {_makers[name].__qualname__}."
            )
        _makers[name] = maker
        return maker

    return decorate


def resolve(needs: Iterable[str], task: Task, seed: int) -> dict[str, Any]:
    """Return the artifacts by name; a task and seed seen before gets what was made then.

    Every caller gets copies of its own; modules are in evaluation mode and frozen.

    Raises:
        ValueError: nobody registered a maker of that name.
    """
    found = {}
    for name in needs:
        if name not in _makers:
            raise ValueError(f"unknown artifact {name!r}; {did_you_mean(name, _makers)}")
        key = (name, task.fingerprint, seed)
        if key not in _made:
            # Whoever asks first, the maker sees the same default generators and leaves them alone.
            with seeded(seed, [task.device]):
                _made[key] = _frozen(_makers[name](task, seed))
        made = _made[key]
        found[name] = copy_module(made) if isinstance(made, nn.Module) else copy.deepcopy(made)
    return found


def _frozen(artifact: Any) -> Any:
    if isinstance(artifact, nn.Module | Tensor):
        artifact.requires_grad_(False)
    return artifact.eval() if isinstance(artifact, nn.Module) else artifact
