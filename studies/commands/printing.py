"""What all commands share: options, and results on standard output."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

__all__ = ["Json", "print_json", "print_result"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

PIPE_WIDTH = 160
"""Characters of a table in a pipe, which has no width of its own."""


def print_json(data: Any) -> None:
    """Print plain data as JSON."""
    print(json.dumps(data, indent=1))


def print_result(result: Any) -> None:
    """Print a result on standard output: text as it is, tables wide enough for a pipe."""
    if isinstance(result, str):
        print(result)
        return
    from rich.console import Console

    console = Console()
    Console(width=console.width if console.is_terminal else PIPE_WIDTH).print(result)
