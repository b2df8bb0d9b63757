"""What the installation looks like: versions, devices, threads, and packages in the way."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.table import Table

__all__ = ["Finding", "conflicts", "examine", "findings_table"]

OURS = ("hypergrad", "bilevel", "adapters", "studies")
_LIBRARIES = (
    "torch",
    "torchopt",
    "higher",
    "optuna",
    "ray",
    "numpy",
    "scikit-learn",
    "sqlalchemy",
    "matplotlib",
    "plotly",
)

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True)
class Finding:
    """One fact about the installation.

    Attributes:
        topic: what was looked at.
        value: what was found.
        level: "ok"; "warning", works but not as it should; "error", will not work.
        advice: what to do about it; empty where all is well.
    """

    topic: str
    value: str
    level: Level = "ok"
    advice: str = ""


def examine() -> list[Finding]:
    """Look at everything; no finding raises, a missing library is a finding itself."""
    return [
        Finding(
            "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
        ),
        _own_version(),
        *(_version(name) for name in _LIBRARIES),
        *_requirements(),
        *_torch(),
        Finding("sqlite", sqlite3.sqlite_version),
        *conflicts(metadata.packages_distributions(), _origins()),
    ]


def _own_version() -> Finding:
    try:
        return Finding("bilevel", metadata.version("bilevel"))
    except metadata.PackageNotFoundError:
        return Finding(
            "bilevel", "from a source tree", advice="pip install . makes the `bilevel` command"
        )


def _version(name: str) -> Finding:
    try:
        return Finding(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, "not installed", "error", f"pip install {name}")


def _requirements() -> list[Finding]:
    """Installed versions outside the ranges that `bilevel` declares."""
    from packaging.requirements import Requirement

    try:
        declared = metadata.requires("bilevel") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for requirement in map(Requirement, declared):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(
                Finding(requirement.name, "not installed", "error", f"pip install '{requirement}'")
            )
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(
                Finding(
                    requirement.name,
                    f"{version}, but bilevel needs {requirement.specifier}",
                    "error",
                    f"pip install '{requirement}'",
                )
            )
    return found


def _torch() -> list[Finding]:
    """Devices and threads, as torch sees them."""
    try:
        import torch
    except ImportError as error:
        return [Finding("devices", f"torch does not import: {error}", "error", "pip install torch")]
    devices = ["cpu"]
    devices += [
        f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
    ]
    if torch.backends.mps.is_available():
        devices.append("mps")
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    setting = os.environ.get("OMP_NUM_THREADS", "not set")
    finding = Finding("threads", f"{threads} of {cores} cores; OMP_NUM_THREADS={setting}")
    if threads > cores:
        advice = f"set OMP_NUM_THREADS={cores} or less"
        finding = Finding("threads", finding.value, "warning", advice)
    return [Finding("devices", ", ".join(devices)), finding]


def _origins() -> dict[str, Path | None]:
    """The folder each of our import names would be loaded from."""
    origins: dict[str, Path | None] = {}
    for name in OURS:
        spec = importlib.util.find_spec(name)
        origins[name] = Path(spec.origin).parent if spec and spec.origin else None
    return origins


def conflicts(
    owners: Mapping[str, Sequence[str]], origins: Mapping[str, Path | None]
) -> Iterable[Finding]:
    """Import names of ours that another distribution, or another folder, takes.

    Args:
        owners: distributions by the import names they bring, as
            `importlib.metadata.packages_distributions` returns.
        origins: the folder that each name is loaded from; None where it does not load.
    """
    home = origins["bilevel"]
    for name in OURS:
        others = sorted({d for d in owners.get(name, ()) if _normal(d) != "bilevel"})
        origin = origins[name]
        if others:
            yield Finding(
                f"package {name}",
                f"also brought by {', '.join(others)}",
                "error",
                f"pip uninstall {' '.join(others)}, then reinstall bilevel",
            )
        elif origin is None:
            yield Finding(f"package {name}", "not found", "error", "reinstall bilevel")
        elif home is not None and origin.parent != home.parent:
            yield Finding(
                f"package {name}",
                f"loaded from {origin}, not from {home.parent}",
                "error",
                "rename that folder, or start Python somewhere else",
            )
        else:
            yield Finding(f"package {name}", str(origin))


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def findings_table(findings: Sequence[Finding]) -> Table:
    """What `bilevel doctor` found."""
    table = Table(show_header=False, box=None, pad_edge=False)
    colors = {"ok": "green", "warning": "yellow", "error": "red"}
    for finding in findings:
        mark = f"[{colors[finding.level]}]{finding.level}[/]"
        text = finding.value + (f"\n-> {finding.advice}" if finding.advice else "")
        table.add_row(mark, finding.topic, text)
    return table
