"""Options and arguments that commands of `bilevel study` share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Optional

import typer

from studies.commands.completion import study_folders

__all__ = [
    "Folder",
    "Format",
    "Name",
    "Names",
    "Own",
    "Quiet",
    "Ray",
    "Target",
    "Targets",
    "Trials",
    "Values",
    "Workers",
]

Target = Annotated[
    str,
    typer.Argument(
        metavar="DIR",
        help="Folder of a study, SQLite file, or database URL.",
        autocompletion=study_folders,
    ),
]
Targets = Annotated[
    list[str],
    typer.Argument(
        metavar="DIR...", help="Studies, or one database.", autocompletion=study_folders
    ),
]
Folder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Folder of the study.", path_type=Path, autocompletion=study_folders
    ),
]
Name = Annotated[
    Optional[str],  # noqa: UP045  (typer reads the annotation at run time)
    typer.Option("--study", help="Which study, where a database holds several."),
]
Names = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--study", help="A study of the database; once for each."),
]
Own = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(metavar="NAME=OWNER", help="Owner of a name: grad, sampler, shared, fixed."),
]
Trials = Annotated[Optional[int], typer.Option(help="Trials in total.", min=1)]  # noqa: UP045
Workers = Annotated[Optional[int], typer.Option(help="Trials at a time.", min=1)]  # noqa: UP045
Ray = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--ray-address", help="Run on this Ray cluster, such as 'auto'."),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress.")]


class Values(StrEnum):
    """Forms of `bilevel study best`."""

    yaml = "yaml"
    json = "json"
    py = "py"
    toml = "toml"


class Format(StrEnum):
    """Forms of `bilevel study export`."""

    csv = "csv"
    parquet = "parquet"
    json = "json"
