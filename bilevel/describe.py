"""Configurations as plain data: to store with a checkpoint, and to say what differs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

__all__ = ["describe", "differences"]


def describe(config: Any) -> Any:
    """Return a frozen config object as nested dicts, lists, strings and numbers.

    Equal configs give equal descriptions, in this process or another.  Functions and classes
    are described by their qualified names, large tensors by a hash.
    """
    if config is None or isinstance(config, bool | int | float | str):
        return config
    if isinstance(config, Tensor):
        values = config.detach().cpu()
        if values.numel() <= 64:
            return values.tolist()
        digest = hashlib.sha256(values.double().numpy().tobytes()).hexdigest()
        return f"{tuple(values.shape)} {values.dtype} sha256:{digest}"
    if isinstance(config, type):
        return f"{config.__module__}.{config.__qualname__}"
    if is_dataclass(config):
        members = {f.name: describe(getattr(config, f.name)) for f in fields(config)}
        return {"type": describe(type(config)), **members}
    if isinstance(config, functools.partial):
        keywords = {name: describe(value) for name, value in config.keywords.items()}
        return {"type": describe(config.func), "args": describe(config.args), **keywords}
    if isinstance(config, Mapping):
        return {str(name): describe(value) for name, value in config.items()}
    if isinstance(config, list | tuple):
        return [describe(value) for value in config]
    if callable(config) and hasattr(config, "__qualname__"):
        return f"{config.__module__}.{config.__qualname__}"
    return describe(type(config))


def differences(before: Any, now: Any, path: str) -> list[str]:
    """List where two descriptions differ, one line each, such as ``lr: 0.1 before, 0.2 now``.

    An object that is only in one of them is named by its class.
    """
    if before == now:
        return []
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        return [
            line
            for key in dict.fromkeys([*before, *now])
            for line in differences(before.get(key), now.get(key), f"{path}.{key}")
        ]
    return [f"{path}: {_short(before)} before, {_short(now)} now"]


def _short(value: Any) -> str:
    """A description in a word: an object, where there was none, by the name of its class."""
    if isinstance(value, Mapping) and "type" in value:
        return str(value["type"]).rpartition(".")[2]
    return repr(value)
