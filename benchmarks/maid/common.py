"""What the MAID benchmarks share: runs to a cost, tables, figures, data."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bilevel import Budget, Callback, Result, RunStatus, tune

ROOT = Path(__file__).parents[2]
FIGURES, RESULTS = ROOT / "docs" / "figures", ROOT / "benchmarks" / "results"


@dataclass
class Curve:
    """A run: cost in gradients + Hessian-vector products, and what was seen there."""

    name: str
    cost: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    eps: list[float] = field(default_factory=list)
    seconds: float = 0.0
    result: Result | None = None

    def at(self, cost: int) -> float:
        """Loss of the last outer step that ended within a cost; NaN before the first."""
        found = [v for c, v in zip(self.cost, self.loss, strict=True) if c <= cost]
        return found[-1] if found else float("nan")

    def first_below(self, loss: float) -> int | None:
        """Cost of the first outer step that ended below a loss."""
        return next((c for c, v in zip(self.cost, self.loss, strict=True) if v <= loss), None)


class _Watch(Callback):
    def __init__(self, curve: Curve, cost: int, look: Callable[[Any], Any] | None) -> None:
        self.curve, self.limit, self.look = curve, cost, look

    def on_outer_step(self, run: Any) -> None:
        row, curve = run.trace[-1], self.curve
        cost = run.cost.gradients + run.cost.hvps
        curve.cost.append(cost)
        curve.eps.append(float(row.get("eps", float("nan"))))
        seen = None if self.look is None else self.look(run.inner)
        curve.seen.append(seen)
        curve.loss.append(seen if isinstance(seen, float) else float(row["outer_loss"]))
        if cost >= self.limit and run.status is RunStatus.RUNNING:
            run.stop(RunStatus.MAX_ITER, f"cost {self.limit}")


def run(
    name: str,
    make: Callable[[], Any],
    algorithm: Any,
    cost: int,
    look: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Curve:
    """Tune until gradients + products reach a cost; `look(inner)` is called after each step.

    Where `look` returns a float, that is the loss of the curve.
    """
    curve = Curve(name)
    start = time.process_time()
    watch = _Watch(curve, cost, look)
    curve.result = tune(
        make(), algorithm, Budget(outer_steps=1_000_000), callbacks=[watch], seed=0, **options
    )
    curve.seconds = time.process_time() - start
    print(
        f"{name:40s} cost {curve.cost[-1]:7d}  loss {curve.loss[-1]:.6g}  {len(curve.cost)} steps"
        f"  {curve.seconds:.1f} s  {curve.result.reason}",
        flush=True,
    )
    return curve


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; numbers to four digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows])


def write(name: str, title: str, command: str, text: str) -> None:
    """Write a result page with its conditions."""
    conditions = (
        f"Command: `{command}`. torch {torch.__version__}, Python {platform.python_version()}, "
        "float64 unless said otherwise, one thread of a shared two-core machine. Cost: gradients "
        "of either loss + Hessian-vector products, all samples together; seconds are CPU time."
    )
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.md").write_text(f"# {title}\n\n{conditions}\n\n{text.strip()}\n")


def plot(path: str, panels: Sequence[Callable[[Any], None]], width: float = 5.0) -> None:
    """Draw panels side by side into docs/figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(width * len(panels), 3.6), constrained_layout=True
    )
    for axis, panel in zip(np.atleast_1d(axes), panels, strict=True):
        panel(axis)
    FIGURES.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURES / path, dpi=110)
    plt.close(figure)


def data(*parts: str) -> Path:
    """A file below the folder that the environment variable BILEVEL_DATA names."""
    if "BILEVEL_DATA" not in os.environ:
        raise SystemExit("set BILEVEL_DATA to the folder with natural_images/ and mnist/")
    return Path(os.environ["BILEVEL_DATA"]).joinpath(*parts)
