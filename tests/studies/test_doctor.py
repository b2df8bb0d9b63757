"""`doctor`: what it reports, and how it finds packages that take our import names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from studies.commands.doctor import OURS, conflicts, examine

HOME = Path("/site-packages")
ORIGINS: dict[str, Path | None] = {name: HOME / name for name in OURS}


def test_this_installation_is_well() -> None:
    findings = {finding.topic: finding for finding in examine()}
    assert all(finding.level == "ok" for finding in findings.values())
    assert findings["torch"].value == torch.__version__
    assert findings["numpy"].value == np.__version__
    assert findings["devices"].value.startswith("cpu")
    assert {f"package {name}" for name in OURS} <= set(findings)


def test_another_distribution_that_owns_a_name_is_found() -> None:
    owners = {"hypergrad": ["bilevel"], "adapters": ["adapters", "bilevel"], "numpy": ["numpy"]}
    bad = [finding for finding in conflicts(owners, ORIGINS) if finding.level == "error"]
    assert [finding.topic for finding in bad] == ["package adapters"]
    assert "also brought by adapters" in bad[0].value
    assert "pip uninstall adapters" in bad[0].advice


def test_a_folder_that_shadows_a_package_is_found() -> None:
    origins = {**ORIGINS, "studies": Path("/home/me/studies")}
    bad = [finding for finding in conflicts({}, origins) if finding.level == "error"]
    assert [finding.topic for finding in bad] == ["package studies"]
    assert "/home/me/studies" in bad[0].value


def test_a_missing_package_is_found() -> None:
    bad = [f for f in conflicts({}, {**ORIGINS, "adapters": None}) if f.level == "error"]
    assert [finding.topic for finding in bad] == ["package adapters"]


def test_an_installed_rival_is_found_in_a_real_process(tmp_path: Path) -> None:
    """A distribution with a package `adapters`, as the one of AdapterHub, on the path."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "__init__.py").write_text("")
    info = tmp_path / "adapters-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adapters\nVersion: 1.0\n")
    (info / "RECORD").write_text("adapters/__init__.py,,\n")
    (info / "top_level.txt").write_text("adapters\n")
    code = f"""
import sys
sys.path.append({str(tmp_path)!r})
from studies.commands.doctor import examine
print([f.value for f in examine() if f.level == "error"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "['also brought by adapters']"
