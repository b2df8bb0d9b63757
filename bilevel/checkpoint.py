"""Checkpoints: atomic files of plain data, read back without running any code.

A checkpoint is a tree of tensors, numbers, strings, None, lists, tuples and dicts.  It is
written beside its destination, synced to the disk and renamed over it, so that a reader sees
the old file or the new one, whole, whatever happens in between.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import optree
import torch
from torch import Tensor

__all__ = ["check_plain", "check_writable", "copy", "load", "replacing", "save"]

_ATOMS = (bool, int, float, str, bytes, type(None))


def save(path: str | os.PathLike[str], tree: Any) -> None:
    """Write a tree of plain data; an earlier file of that name is replaced in one step.

    Args:
        path: the file; missing folders above it are made.
        tree: tensors, numbers, strings, None, and lists, tuples and dicts of them.

    Raises:
        TypeError: the tree holds something else; says what and where.
        OSError: the file cannot be written; the earlier file is untouched.
    """
    check_plain(tree, "checkpoint")
    with replacing(path) as file:
        torch.save(tree, file)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Yield a file that takes the place of an earlier one in one step, when the block ends.

    Missing folders above it are made; where the block raises, the earlier file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def load(path: str | os.PathLike[str]) -> Any:
    """Read a tree written by `save`, with all tensors on the CPU; nothing in the file is executed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a checkpoint, or is damaged.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no checkpoint {os.fspath(path)!r}.")
    problem = f"{os.fspath(path)!r} is not a readable checkpoint"
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"{problem}: its end is missing, or it is another kind of file.")
        file.seek(0)
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, zipfile.BadZipFile) as error:
            raise ValueError(f"{problem}: {error}") from error


def check_writable(path: str | os.PathLike[str], argument: str) -> None:
    """Write and remove a probe beside `path`: a run should not find out at its end.

    Raises:
        OSError: naming the argument, the path and what the system said.
    """
    path = Path(path)
    probe = path.with_name(f".{path.name}.{os.getpid()}.probe")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder; expected a file name")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise type(error)(f"{argument}: cannot write {str(path)!r}: {error}") from error


def copy(tree: Any) -> Any:
    """Return the tree with every tensor detached and cloned: safe from later in-place changes."""
    return optree.tree_map(
        lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf,
        tree,
        none_is_leaf=True,
    )


def check_plain(tree: Any, where: str) -> None:
    """Check that a tree holds only what a checkpoint can hold.

    Raises:
        TypeError: naming the first other node.
    """
    kind = type(tree)
    if kind in _ATOMS or kind is Tensor:
        return
    if kind is dict:
        for key, value in tree.items():
            if type(key) not in (str, int):
                raise TypeError(f"{where} has the key {key!r}; expected a string or an integer.")
            check_plain(value, f"{where}[{key!r}]")
    elif kind in (list, tuple):
        for i, value in enumerate(tree):
            check_plain(value, f"{where}[{i}]")
    else:
        raise TypeError(
            f"{where} is a {kind.__module__}.{kind.__qualname__}; a checkpoint holds only tensors, "
            "numbers, strings, None, lists, tuples and dicts."
        )


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system can open folders."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
