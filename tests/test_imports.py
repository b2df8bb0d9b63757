"""The four packages import in one direction, and `import bilevel` stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = ["hypergrad", "bilevel", "adapters", "studies"]
# Parts of studies/, and which others they may import at module level: those before them.
PARTS = [
    "record", "messages", "events", "arguments", "storage", "sampling", "trial", "executors",
    "runner", "views", "study", "plan", "compare", "loggers", "figures", "dashboard", "ray",
    "commands",
]  # fmt: skip
# Imported where they are used, never at module level.
DEFERRED = {"ray", "optuna", "higher", "plotly", "matplotlib", "transformers", "peft", "sklearn"}


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """Top-level statements, those in `if TYPE_CHECKING:` excluded."""
    kept: list[ast.stmt] = []
    for node in tree.body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        kept.append(node)
    return kept


def _imported(nodes: list[ast.AST]) -> set[str]:
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def _modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", ORDER)
def test_imports_go_one_way(package: str) -> None:
    later = set(ORDER[ORDER.index(package) + 1 :])
    for path in _modules(package):
        if path.name == "__main__.py":  # `python -m bilevel` starts the command line
            continue
        tree = ast.parse(path.read_text())
        assert not _imported(list(ast.walk(tree))) & later, path


def test_the_parts_of_studies_import_in_one_direction() -> None:
    parts = {path.stem for path in (ROOT / "studies").iterdir() if path.suffix in ("", ".py")}
    assert parts - {"__init__", "__pycache__", "py"} == set(PARTS)
    for path in _modules("studies"):
        part = path.relative_to(ROOT / "studies").with_suffix("").parts[0]
        if part == "__init__":
            continue
        for node in _statements(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("studies."):
                other = str(node.module).split(".")[1]
                assert PARTS.index(other) <= PARTS.index(part), f"{path}: {node.module}"


@pytest.mark.parametrize("package", ["hypergrad", "bilevel", "adapters"])
def test_heavy_packages_are_imported_where_used(package: str) -> None:
    for path in _modules(package):
        top = _imported(list(_statements(ast.parse(path.read_text()))))
        assert not top & DEFERRED, path


def test_import_bilevel_loads_no_heavy_package() -> None:
    code = "import sys, bilevel; print(sorted(set(sys.modules) & {'torch', 'ray', 'optuna'}))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ORDER)
def test_every_public_name_exists(package: str) -> None:
    code = f"import {package} as m; [getattr(m, n) for n in m.__all__]; print(len(m.__all__))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert int(done.stdout) > 0
    assert (ROOT / package / "py.typed").exists()
