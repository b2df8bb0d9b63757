"""The command line inside the test process: arguments in, exit code and both streams out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from studies.commands.cli import main
from tests.signals import interruptible

__all__ = ["STUDY", "Ended", "console", "five_trials", "interrupted_run", "study_file"]

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


def five_trials(folder: Path) -> Path:
    """Run the study with five trials; returns its folder."""
    study_file(folder, STUDY.replace("trials = 3", "trials = 5"))
    done = console("study", "run", "small.toml", "--out", "out", "--quiet", cwd=folder)
    assert done.code == 0, done.err
    return folder / "out"


def interrupted_run(folder: Path) -> Ended:
    """Run the study file in a process of its own, with Ctrl-C after its first line."""
    command = [sys.executable, "-m", "bilevel", "study", "run", "small.toml", "--out", "out"]
    process = subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out, first + err)
