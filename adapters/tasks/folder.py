"""The data folder: files that are not bundled with any library."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["VARIABLE", "data_file"]

VARIABLE = "BILEVEL_DATA"
"""Environment variable with the path of the data folder; see docs/tasks.md for its files."""


def data_file(*parts: str) -> Path:
    """Return the path of a file of the data folder.

    Raises:
        FileNotFoundError: the environment variable `BILEVEL_DATA` is not set, or the folder
            does not hold the file.
    """
    folder = os.environ.get(VARIABLE)
    name = "/".join(parts)
    if not folder:
        raise FileNotFoundError(
            f"this needs {name}: set the environment variable {VARIABLE} to the folder that "
            "holds it; docs/tasks.md lists its files."
        )
    path = Path(folder, *parts)
    if not path.is_file():
        raise FileNotFoundError(
            f"{VARIABLE} is {folder!r}, which does not hold {name}; docs/tasks.md lists the files."
        )
    return path
