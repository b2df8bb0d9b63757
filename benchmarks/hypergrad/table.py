"""The report: one table a problem, with the conditions, in Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benchmarks.hypergrad.store import Entry
from benchmarks.hypergrad.worker import Row

__all__ = ["Line", "problem_table", "render"]


@dataclass(frozen=True)
class Line:
    """A row with the library that it belongs to."""

    library: str
    row: Row


EXPLANATION = """\
- **ms**: user and system time of one whole hypergradient, the least of the repeats.
- **× plain**: divided by the least of the yardstick, interleaved in the same process; in brackets
  the ratio of medians. The yardstick is T ordinary `torch.optim` steps with the penalty in the
  loss, or (P1a, P1, P3) one gradient of the inner loss.
- **extra MB**: growth of the peak memory over plain training and a run of two steps, which loads
  the code that a library loads at its first call, in a forked fresh process; the compiler and all
  that it loads is counted.
- **error**: relative error of the hypergradient in float64 against a straightforward float64
  unroll, or against 20 iterations of conjugate gradients on the dense Hessian. "f32": the method
  was run in float32, and its rounding is in the figure.
- **to exact**: distance to the implicit hypergradient of the solved system.
- **compile s**: wall time of the first call of a method that compiles, not part of ms."""


def problem_table(title: str, entries: Mapping[str, Entry], check: float | None) -> str:
    """Return the table of one problem.

    Args:
        title: heading.
        entries: what was measured, by title of the library, in order.
        check: relative difference of the reference to central differences, where it has one.
    """
    lines = [Line(name, row) for name, entry in entries.items() for row in entry.rows]
    plain = [line.row.plain_ms for line in lines if line.row.plain_ms is not None]
    low = min(entry.load[0] for entry in entries.values())
    high = max(entry.load[1] for entry in entries.values())
    repeats = max(entry.repeats for entry in entries.values())
    text = [f"## {title}", ""]
    if plain:
        text.append(f"Yardstick: {_number(min(plain))} to {_number(max(plain))} ms.")
    text.append(f"Load average {low:.1f} to {high:.1f}, up to {repeats} repeats.")
    if check is not None:
        text.append(f"The reference agrees with central differences to {check:.0e}.")
    text += ["", _HEAD, _RULE]
    for line in lines:
        row = line.row
        cells = [f"{line.library}: {row.method}"]
        if row.failure is not None:
            cells += [row.failure.replace("|", "\\|"), *[""] * 5]
        else:
            cells += [
                _number(row.ms),
                "" if row.ratio is None else f"{row.ratio:.2f} ({row.median_ratio:.2f})",
                "" if row.extra_mb is None else f"{row.extra_mb:.0f}",
                _error(row.error, row.single),
                _error(row.exact_error, row.single),
                "" if row.compile_s is None else f"{row.compile_s:.0f}",
            ]
        text.append("| " + " | ".join(cells) + " |")
    return "\n".join(text)


def render(tables: Sequence[str], absent: Sequence[str]) -> str:
    """Return the whole page."""
    parts = ["# Hypergradients: cost, memory, error", _conditions(), EXPLANATION, *tables]
    if absent:
        parts.append("Not measured:\n\n" + "\n".join(f"- {reason}" for reason in absent))
    return "\n\n".join(parts) + "\n"


def _conditions() -> str:
    return (
        "Written by `python -m benchmarks.hypergrad`; a run of some `--problems` or `--peers` "
        f"replaces their lines. torch {torch.__version__}, Python {platform.python_version()}, "
        f"{_processor()}, {os.cpu_count()} cores, one thread. What bounds the figures is in "
        "[hypergrad_profile.md](hypergrad_profile.md)."
    )


_HEAD = "| method | ms | × plain | extra MB | error | to exact | compile s |"
_RULE = "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _error(value: float | None, single: bool) -> str:
    return "" if value is None else f"{value:.1e}" + (" f32" if single else "")


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.machine()
