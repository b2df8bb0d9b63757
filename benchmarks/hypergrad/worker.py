"""Measures one library on one problem, in a process of its own; the answer goes to a JSON file."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.hypergrad import measure, problems
from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.plain import GRADIENTS, plain
from benchmarks.hypergrad.problems import Stationary
from benchmarks.hypergrad.reference import flat, reference, relative_error

__all__ = ["Job", "Row", "load", "work"]


BUDGET = 20.0
"""Seconds of timed repeats for a library on a problem; three repeats are made in any case."""


@dataclass(frozen=True)
class Job:
    """What to measure.

    Attributes:
        library: file of the library: "ours", or a name in peers/.
        problem: one of `problems.NAMES`.
        repeats: timed repeats at most, after one that warms up.
        steps: replaces the number of steps of the problem.
        compiled: measure methods that compile.
        memory: measure extra peak memory.
        cache: folder of the references.
    """

    library: str
    problem: str
    repeats: int
    steps: int | None
    compiled: bool
    memory: bool
    cache: str


@dataclass
class Row:
    """A line of the table; None where it was not measured.

    Attributes:
        method: name of the method.
        plain_ms: the yardstick in the same process: T steps, or one gradient.
        ms: CPU time of one hypergradient, the least of the repeats.
        ratio: ms / plain_ms.
        median_ratio: the same of medians.
        extra_mb: growth of the peak memory over plain training.
        error: relative error in float64 (float32 for a method of that precision only).
        exact_error: distance to the exact implicit hypergradient, in the same precision.
        single: the errors are those of float32.
        compile_s: wall time of the first call, of a method that compiles.
        failure: why there are no figures.
    """

    method: str
    plain_ms: float | None = None
    ms: float | None = None
    ratio: float | None = None
    median_ratio: float | None = None
    extra_mb: float | None = None
    error: float | None = None
    exact_error: float | None = None
    single: bool = False
    compile_s: float | None = None
    failure: str | None = None


def load(name: str) -> Library:
    """Return a library by the name of its file."""
    module = "benchmarks.hypergrad.ours" if name == "ours" else f"benchmarks.hypergrad.peers.{name}"
    library: Library = importlib.import_module(module).LIBRARY
    return library


def work(job: Job) -> list[Row]:
    """Measure every method of a library on a problem."""
    library = load(job.library)
    for module in library.modules:
        importlib.import_module(module)
    known = reference(job.problem, job.steps, Path(job.cache))

    def methods(dtype: torch.dtype, steps: int | None = job.steps) -> dict[str, Method]:
        problem = problems.make(job.problem, dtype, steps, known["params"])
        found = library.methods(problem)
        return {m.name: m for m in found if job.compiled or not m.compiles}

    problem = problems.make(job.problem, torch.float32, job.steps, known["params"])
    yardstick, single = plain(problem), methods(torch.float32)
    rows = {name: Row(name, single=m.single) for name, m in single.items()}

    # Memory first, while this process is fresh; compiled code goes to a cache on disk on the way,
    # so that the first call here is the cold one.
    small = methods(torch.float32, 2)
    for name, method in single.items():
        if job.memory or method.compiles:
            with _reported(rows[name]):
                warm_up = None if method.compiles else small[name].run
                grown, seconds = measure.forked(
                    lambda m=method, w=warm_up: measure.peak_growth(yardstick, m.run, w)  # type: ignore[misc]
                )
                rows[name].extra_mb = grown if job.memory else None
                rows[name].compile_s = seconds if method.compiles else None

    for name, method in methods(torch.float64).items():
        with _reported(rows[name]):
            chosen = single[name] if method.single else method
            grads = flat([g.detach() for g in chosen.run()])
            rows[name].single = chosen is single[name]
            rows[name].error = min(relative_error(grads, a) for a in known["accepted"])
            if "exact" in known:
                rows[name].exact_error = relative_error(grads, known["exact"])

    runs = {n: m.run for n, m in single.items() if rows[n].failure is None}
    unit = GRADIENTS if isinstance(problem, Stationary) else 1
    times = measure.interleaved({"": yardstick, **runs}, job.repeats, BUDGET)
    for name in runs:
        row = rows[name]
        row.plain_ms, row.ms = (1e3 * min(times[n]) / u for n, u in (("", unit), (name, 1)))
        row.ratio = row.ms / row.plain_ms
        row.median_ratio = _median(times[name]) * unit / _median(times[""])
    return list(rows.values())


def _median(values: list[float]) -> float:
    ordered, n = sorted(values), len(values)
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


class _reported:  # noqa: N801
    """Keeps the reason of a failure in a row; one method that fails is a result, not an end."""

    def __init__(self, row: Row) -> None:
        self.row = row

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        if isinstance(error, Exception):
            print("".join(traceback.format_exception(error)), file=sys.stderr)
            last = str(error).strip().splitlines()[-1:] or [""]
            self.row.failure = f"{type(error).__name__}: {last[0]}"
        return isinstance(error, Exception)


def main() -> None:
    """Read a job as JSON from the command line; write the rows to the file named after it."""
    job, answer = Job(**json.loads(sys.argv[1])), Path(sys.argv[2])
    torch.set_num_threads(1)
    answer.write_text(json.dumps([asdict(row) for row in work(job)]))
    sys.stdout.flush()
    os._exit(0)  # some libraries leave threads that would keep the process


if __name__ == "__main__":
    main()
