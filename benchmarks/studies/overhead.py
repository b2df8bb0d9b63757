"""What the runner costs: `python -m benchmarks.studies.overhead`.

Cold starts are whole processes, from `python` to exit; everything else is measured inside.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import optuna
from optuna.trial import TrialState, create_trial

from adapters import tasks
from studies import Study
from studies.events import Event, Finished, Started
from tests.studies.trials import Behaving, Trivial, Walker

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "studies_overhead"
REPEATS = 5

PRELOAD = "from studies import preload_workers; preload_workers()"
COLD = """
import sys, tempfile, pathlib
from studies import Study
from tests.studies.trials import Trivial, nothing
if __name__ == "__main__":
    trials, workers = int(sys.argv[1]), int(sys.argv[2])
    folder = pathlib.Path(tempfile.mkdtemp())
    Study("t", Trivial, nothing(), folder / "t.db", sampler="random").run(
        trials, 1, workers=workers, executor="pool" if workers > 1 else "in_process")
"""

PLAN = """
import sys
from studies import Plan
from tests.studies.trials import Trivial, nothing
def plan():
    return Plan(Trivial, nothing(), trials=10, budget=1, sampler="random")
"""


def cold(trials: int, workers: int, *, console: bool = False, preload: bool = False) -> float:
    """Wall seconds of a fresh process that runs so many trivial trials on a trivial task."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "script.py")
        script.write_text(PLAN if console else PRELOAD * preload + COLD)
        if console:
            program = str(Path(sys.executable).with_name("bilevel"))
            command = [program, "study", "run", f"{script}:plan", "--out", f"{folder}/out"]
            command += ["--trials", str(trials), "--workers", str(workers), "--quiet"]
        else:
            command = [sys.executable, "-W", "ignore", str(script), str(trials), str(workers)]
        began = time.perf_counter()
        subprocess.run(command, check=True, env=environment, capture_output=True)
        return time.perf_counter() - began


def imports() -> float:
    """Wall seconds of a fresh process that only imports torch and optuna."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", "import torch, optuna"], check=True)
    return time.perf_counter() - began


def hang() -> float:
    """Seconds over its limit of 2 s until a trial that hangs is failed."""
    times: dict[str, float] = {}

    def note(event: Event) -> None:
        times[type(event).__name__] = time.monotonic()

    with tempfile.TemporaryDirectory() as folder:
        Study(
            "h", Behaving, tasks.get("digits", n_train=100), Path(folder, "h.db"),
            space=Behaving.space.fix(how="hang", mark="none", pace=0.0), sampler="random",
        ).run(1, 10, trial_seconds=2.0, on_event=note)  # fmt: skip
    return times["Finished"] - times["Started"] - 2.0


def per_step(workers: int) -> float:
    """Seconds that the runner adds to a step of 50 ms, checkpoints and ten rungs included."""
    steps, pace = 100, 0.05
    spans: list[float] = []
    began = 0.0

    def note(event: Event) -> None:
        nonlocal began
        if isinstance(event, Started):
            began = time.perf_counter()
        elif isinstance(event, Finished):
            spans.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder:
        Study(
            "p", Walker, tasks.get("digits", n_train=100), Path(folder, "p.db"),
            space=Walker.space.fix(pace=pace), sampler="random",
        ).run(3, steps, executor="pool" if workers > 1 else "in_process",
              workers=workers, on_event=note)  # fmt: skip
    return statistics.median(spans) / steps - pace


def large(count: int) -> dict[str, float]:
    """Seconds to open, to look at and to go on with a study of many trials."""
    task = tasks.get("digits", n_train=100)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "l.db")
        study = Study("l", Trivial, task, path, sampler="random").run(1, 1)
        like = study.optuna.get_trials()[0]
        copies = [
            create_trial(
                state=TrialState.COMPLETE,
                value=like.value,
                params=like.params,
                distributions=like.distributions,
                user_attrs=like.user_attrs,
                intermediate_values=like.intermediate_values,
            )
            for _ in range(count - 1)
        ]
        study.optuna.add_trials(copies)
        seconds = {}
        began = time.perf_counter()
        again = Study("l", Trivial, task, path, sampler="random")
        seconds["open"] = time.perf_counter() - began
        began = time.perf_counter()
        assert len(again.trials) == count
        assert again.best.value is not None
        seconds["status"] = time.perf_counter() - began
        began = time.perf_counter()
        again.run(count + 1, 1)
        seconds["resume"] = time.perf_counter() - began
    return seconds


def main() -> None:
    """Measure everything and write the table."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS):  # interleaved, so that noise hits all alike
        times.setdefault("10 trials, command line", []).append(cold(10, 2, console=True))
        for name, trials, workers in (
            ("10 trials, pool of 2", 10, 2),
            ("110 trials, pool of 2", 110, 2),
            ("10 trials, in process", 10, 1),
        ):
            times.setdefault(name, []).append(cold(trials, workers))
        times.setdefault("10 trials, preloaded", []).append(cold(10, 2, preload=True))
        times.setdefault("imports of torch and optuna", []).append(imports())
    middle = {name: statistics.median(values) for name, values in times.items()}
    each = (middle["110 trials, pool of 2"] - middle["10 trials, pool of 2"]) / 100
    late = statistics.median(hang() for _ in range(3))
    rows = {
        "cold start of `bilevel study run`, 10 trivial trials, pool of 2": (
            f"{middle['10 trials, command line']:.2f} s"
        ),
        "same, of a Python script": f"{middle['10 trials, pool of 2']:.2f} s",
        "same, with `preload_workers` at its top": f"{middle['10 trials, preloaded']:.2f} s",
        "same, in process": f"{middle['10 trials, in process']:.2f} s",
        "yardstick: imports of torch and optuna": f"{middle['imports of torch and optuna']:.2f} s",
        "each further trivial trial, pool of 2": f"{1000 * each:.1f} ms",
        "hang: killed after its limit of 2 s by": f"{1000 * late:.0f} ms",
        "runner's share of a 2 s step, in process": f"{per_step(1) / 2:.3%}",
        "runner's share of a 2 s step, pool of 2": f"{per_step(2) / 2:.3%}",
    }
    for name, seconds in large(count).items():
        rows[f"study of {count:,} trials: {name}"] = f"{seconds:.2f} s"
    load = os.getloadavg()
    lines = [
        "# What the runner costs",
        "",
        f"Medians of {REPEATS}, 2 cores, one thread each, 1-minute load {load[0]:.1f} at the end.",
        "A cold start is a whole process; `python -m benchmarks.studies.overhead`.",
        "",
        "| what | |",
        "| --- | ---: |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")
    RESULTS.with_suffix(".json").write_text(
        json.dumps({"times": times, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
