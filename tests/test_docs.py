"""Every code block of the README and of docs/ runs.

Python blocks of a page run in order in one namespace and in an empty folder; bash blocks run
there too, with `bilevel` on the path.  The README's first two bash blocks install the project
and are run by `.ci/run`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
SHOWN = {"text", "toml"}  # output and file contents, not code


def _blocks(page: Path) -> list[tuple[str, str, int]]:
    """(language, code, line) of each block."""
    text = page.read_text()
    return [(m[1], m[2], text[: m.start()].count("\n") + 1) for m in BLOCK.finditer(text)]


def _install_commands() -> list[str]:
    return [code for language, code, _ in _blocks(ROOT / "README.md") if language == "bash"][:2]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_block_languages_are_known(page: Path) -> None:
    assert {language for language, _, _ in _blocks(page)} <= {"python", "bash"} | SHOWN


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__page__"}
    for language, code, line in _blocks(page):
        if language == "python":
            # Padding makes a traceback point at the line of the page.
            program = compile("\n" * line + code, str(page), "exec", dont_inherit=True)
            exec(program, namespace)


def _bash_blocks() -> list[pytest.param]:  # type: ignore[valid-type]
    found = []
    for page in PAGES:
        for language, code, line in _blocks(page):
            if language == "bash" and code not in _install_commands():
                slow = [pytest.mark.slow] if "bilevel tune" in code else []
                found.append(pytest.param(code, id=f"{page.name}:{line}", marks=slow))
    return found


@pytest.mark.parametrize("code", _bash_blocks())
def test_bash_blocks_run(code: str, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, module in {"bilevel": "-m bilevel", "python": ""}.items():
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        program.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    home = tmp_path / "here"
    home.mkdir()
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=home,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_readme_starts_with_the_two_commands_that_ci_runs() -> None:
    run, test = _install_commands()
    assert run.count("\n") == test.count("\n") == 1  # one line each: .ci/run reads lines
    assert "bilevel tune digits" in run
    assert "pytest" in test
    assert all("-c constraints.txt" in command for command in (run, test))
