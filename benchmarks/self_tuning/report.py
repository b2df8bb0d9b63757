"""Where results and figures go, and tables of means over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def mean(values: Sequence[float], digits: int = 4) -> str:
    """Return ``mean ± standard deviation``, the latter where there are several values."""
    center = f"{statistics.mean(values):.{digits}f}"
    return center if len(values) < 2 else f"{center} ± {statistics.stdev(values):.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table, all columns but the first to the right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(name: str, text: str) -> None:
    """Write ``benchmarks/results/NAME.md``."""
    path = ROOT / "benchmarks" / "results" / f"{name}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.rstrip() + "\n")
    print(text)


def figure(name: str) -> Path:
    """Return ``docs/figures/NAME.png``, its folder made."""
    path = ROOT / "docs" / "figures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
