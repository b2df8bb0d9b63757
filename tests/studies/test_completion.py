"""Completion of the command line in a real bash."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from studies.storage.layout import SPEC

BASH = shutil.which("bash")
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(BASH is None, reason="there is no bash on this machine")

ASK = """
eval "$(bilevel --show-completion bash)"
COMP_WORDS=("$@")
COMP_CWORD=$(( $# - 1 ))
_bilevel_completion bilevel
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two studies and a folder that is none, and the command on a path."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("digits", "runs/digits2"):
        (folder / name).mkdir(parents=True)
        (folder / name / SPEC).write_text("{}")
    (folder / "data").mkdir()
    command = folder / "bin" / "bilevel"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nfrom studies.commands.cli import main\n\nmain()\n")
    command.chmod(0o755)
    return folder


def completed(place: Path, *words: str) -> list[str]:
    """What bash offers for the last word of ``bilevel WORDS``."""
    path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [str(BASH), "--norc", "-c", ASK, "ask", "bilevel", *words],
        cwd=place, capture_output=True, text=True, timeout=120, check=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("st",), ["study"]),
        (("study", "re"), ["resume", "report"]),
        (("study", "run", "--o"), ["--out", "--own"]),
        (("study", "status", ""), ["digits", "runs/digits2"]),
        (("study", "resume", "d"), ["digits"]),
        (("study", "compare", "digits", "runs/"), ["runs/digits2"]),
        (("study", "gc", "da"), []),
        (("study", "best", "digits", "--as", "y"), ["yaml"]),
        (("tune", "breast"), ["breast_cancer"]),
        (("tune", "digits", "--learner", "lora"), ["lora", "lora_sb"]),
    ],
)
def test_bash_offers(place: Path, words: tuple[str, ...], offered: list[str]) -> None:
    assert completed(place, *words) == offered
