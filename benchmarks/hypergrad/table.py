"""The report: one table a problem, with the conditions, in Markdown."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.hypergrad.worker import Row

__all__ = ["Conditions", "Line", "problem_table", "render"]


@dataclass(frozen=True)
class Line:
    """A row with the library that it belongs to."""

    library: str
    row: Row


@dataclass(frozen=True)
class Conditions:
    """Under which circumstances the figures came about.

    Attributes:
        command: what was run.
        repeats: of every timing.
        load: lowest and highest load average.
    """

    command: str
    repeats: int
    load: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"Command: `{self.command}`. torch {torch.__version__}, Python "
            f"{platform.python_version()}, {_processor()}, {os.cpu_count()} cores, one thread, "
            f"load average {self.load[0]:.1f} to {self.load[1]:.1f}, up to {self.repeats} repeats."
        )


EXPLANATION = """\
- **ms**: user and system time of one whole hypergradient, the least of the repeats.
- **× plain**: divided by the least of the yardstick, interleaved in the same process; in brackets
  the ratio of medians. The yardstick is T ordinary `torch.optim` steps with the penalty in the
  loss, or (P1a, P1, P3) one gradient of the inner loss.
- **extra MB**: growth of the peak memory over plain training, in a forked fresh process; code
  that a library loads at its first call is counted.
- **error**: relative error of the hypergradient in float64 against a straightforward float64
  unroll, or against 20 iterations of conjugate gradients on the dense Hessian. "f32": the method
  was run in float32, and its rounding is in the figure.
- **to exact**: distance to the implicit hypergradient of the solved system.
- **compile s**: wall time of the first call of a method that compiles, not part of ms."""


def problem_table(title: str, lines: Sequence[Line], check: float | None) -> str:
    """Return the table of one problem.

    Args:
        title: heading.
        lines: rows in order.
        check: relative difference of the reference to central differences, where it has one.
    """
    plain = [line.row.plain_ms for line in lines if line.row.plain_ms is not None]
    text = [f"## {title}", ""]
    if plain:
        text.append(f"Yardstick: {_number(min(plain))} to {_number(max(plain))} ms.")
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


def render(conditions: Conditions, tables: Sequence[str], absent: Sequence[str]) -> str:
    """Return the whole page."""
    parts = ["# Hypergradients: cost, memory, error", str(conditions), EXPLANATION, *tables]
    if absent:
        parts.append("Not measured:\n\n" + "\n".join(f"- {reason}" for reason in absent))
    return "\n\n".join(parts) + "\n"


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
