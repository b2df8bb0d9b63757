"""The command line inside the test process: arguments in, exit code and both streams out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from studies.cli import main

__all__ = ["STUDY", "Ended", "console", "study_file"]

STUDY = """
name = "small"
learner = "network"
task = { name = "digits", noise = 0.2, n_train = 100 }
seed = 5

[algorithm]
name = "Descent"
lr = 0.1
estimator = { name = "Unrolled", steps = 5 }

[space]
width = 16
depth = 1

[run]
trials = 3
budget = 40
scheduler = "fifo"
"""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def study_file(folder: Path, text: str = STUDY) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def console(*args: object, cwd: Path) -> Ended:
    """Run ``bilevel ARGS`` in a folder."""
    out, err = io.StringIO(), io.StringIO()
    code, before = 0, Path.cwd()
    os.chdir(cwd)
    try:
        with (
            mock.patch.object(sys, "argv", ["bilevel", *map(str, args)]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os.chdir(before)
    return Ended(code, out.getvalue(), err.getvalue())
