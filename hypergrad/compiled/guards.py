"""What a loss reads beside its arguments, and whether it still is what it was when traced."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from hypergrad.swap import Swap

__all__ = ["Guards"]

_VALUES = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_LIBRARY = (types.ModuleType, type, types.BuiltinFunctionType)


class Guards:
    """Watches the variables that functions close over and the globals that they name.

    Seen: another tensor, function, number or object put into such a variable, or into a list,
    tuple or dict there; another training mode, parameter or buffer of a module.  Tensors are
    watched by identity: a graph reads their values at each call.  Not seen: other attributes of
    objects.

    Args:
        functions: the losses.
    """

    def __init__(self, *functions: Any) -> None:
        self._watched: list[tuple[Callable[[], Any], Any]] = []
        self._codes: dict[types.CodeType, None] = {}
        self._seen: dict[int, Any] = {}
        for function in functions:
            self._enter(function)
        self._seen.clear()  # guards must not keep the losses alive

    @property
    def codes(self) -> tuple[types.CodeType, ...]:
        """The source that the losses come from: equal for functions made anew from it."""
        return tuple(self._codes)

    def hold(self) -> bool:
        """Whether everything still is as it was."""
        return all([_same(read(), before) for read, before in self._watched])

    def _enter(self, value: Any) -> None:
        """Watch what a value refers to."""
        if id(value) in self._seen or isinstance(value, _LIBRARY):
            return
        self._seen[id(value)] = value
        if isinstance(value, types.FunctionType):
            self._codes[value.__code__] = None
            for read in _variables(value):
                self._watch(read)
        elif isinstance(value, types.MethodType):
            self._enter(value.__func__)
            self._enter(value.__self__)
        elif isinstance(value, functools.partial):
            for part in (value.func, *value.args, *value.keywords.values()):
                self._enter(part)
        elif isinstance(value, nn.Module):
            self._watch_module(value)
        elif isinstance(value, Swap):  # how `module_problem` refers to its module
            self._enter(value.module)
        elif isinstance(value, list | tuple):
            self._watch(lambda: tuple(value))
            for part in value:
                self._enter(part)
        elif isinstance(value, dict):
            self._watch(lambda: tuple(value.items()))
            for part in value.values():
                self._enter(part)
        elif callable(value) and hasattr(value, "__dict__"):  # such as a dataclass
            space = vars(value)
            self._watch(lambda: tuple(space.values()))
            for part in space.values():
                self._enter(part)

    def _watch(self, read: Callable[[], Any]) -> None:
        value = read()
        self._watched.append((read, value))
        if not isinstance(value, tuple):
            self._enter(value)

    def _watch_module(self, module: nn.Module) -> None:
        modules = list(module.modules())
        kinds = [kind for m in modules for kind in (m._parameters, m._buffers)]
        self._watch(lambda: tuple([m.training for m in modules]))
        self._watch(lambda: tuple([t for kind in kinds for t in kind.values()]))


def _variables(function: types.FunctionType) -> Iterator[Callable[[], Any]]:
    """Yield a reader of each closure variable, and of each global named in a user's function."""
    for cell in function.__closure__ or ():
        yield lambda cell=cell: _contents(cell)  # type: ignore[misc]
    package = function.__module__.partition(".")[0]
    if package not in ("torch", "hypergrad"):
        space = function.__globals__
        for name in _names(function.__code__):
            if name in space and not isinstance(space[name], _LIBRARY):
                yield lambda name=name: space.get(name)  # type: ignore[misc]


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _names(code: types.CodeType) -> Iterator[str]:
    """Names of globals and attributes in a function and the functions defined in it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    if type(now) is not type(before):
        return False
    if isinstance(now, tuple):
        return len(now) == len(before) and all([_same(*pair) for pair in zip(now, before)])
    return isinstance(now, _VALUES) and bool(now == before)
