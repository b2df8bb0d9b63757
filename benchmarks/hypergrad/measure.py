"""CPU time with the yardstick interleaved, and extra peak memory in forked processes."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import resource
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["cpu_time", "forked", "interleaved", "peak_growth"]


SAMPLE = 0.02
"""Seconds that a sample takes at least: a shorter run is repeated, as in a training loop."""


def cpu_time(run: Callable[[], object], count: int = 1) -> float:
    """Seconds of user and system time of this process, all threads, per run of `count` runs."""
    gc.collect()
    start = time.process_time()
    for _ in range(count):
        run()
    return (time.process_time() - start) / count


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    budget: float = math.inf,
    warm_ups: int = 1,
) -> dict[str, list[float]]:
    """Return the CPU times of each run, one after the other in each repeat.

    Args:
        runs: by name.
        repeats: at most this many.
        budget: seconds after which no further repeat starts, once there have been three.
        warm_ups: runs before the first repeat.
    """
    for _ in range(warm_ups):
        for run in runs.values():
            run()
    counts = {name: math.ceil(SAMPLE / max(cpu_time(run), 1e-6)) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.process_time()
    for repeat in range(repeats):
        if repeat >= 3 and time.process_time() - begin > budget:
            break
        for name, run in runs.items():
            times[name].append(cpu_time(run, counts[name]))
    return times


def forked(measure: Callable[[], Any]) -> Any:
    """Return what a function measures in a fork of this process: its memory counts from here.

    Raises:
        RuntimeError: the function raised, or the process died.
    """
    # Freed pages that the allocator keeps would hide what the function needs.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        try:
            answer = {"value": measure()}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    answer = json.loads(text) if text else {"error": f"the process ended with status {status}"}
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


def peak_growth(
    plain: Callable[[], object],
    run: Callable[[], object],
    warm_up: Callable[[], object] | None = None,
) -> tuple[float, float]:
    """Return by how many MB `run` raises the peak memory of this process over plain training's.

    To be called in a fresh process; returns the wall time of the run too, in seconds.

    Args:
        plain: plain training.
        run: what is measured.
        warm_up: a small run that makes the libraries load their code before, so that it does not
            count; without it everything that the first call loads or compiles counts.
    """
    plain()
    if warm_up is not None:
        warm_up()
        gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, seconds
