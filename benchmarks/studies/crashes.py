"""Kill a study at random instants and go on with it: `python -m benchmarks.studies.crashes`.

One process imports everything and forks for each study, so that a kill can come at any instant of
a study's life, its first write included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from adapters import registry, tasks
from bilevel import Descent
from hypergrad import Unrolled
from studies import Study

RESULTS = Path(__file__).parents[1] / "results" / "studies_crashes"
TRIALS, BUDGET = 6, 40


def make(storage: str, folder: Path, executor: str = "in_process", workers: int = 1) -> Study:
    """Run a study with halving, a network with both owners."""
    kind = registry.get("network")
    space = kind.space.own(lr="grad", momentum="grad").fix(width=16, depth=1)
    task = tasks.get("digits", noise=0.2, n_train=100)
    descent = Descent(Unrolled(steps=5), lr=0.1)
    name = folder.name
    study = Study(name, kind, task, storage, space=space, algorithm=descent, seed=5, folder=folder)
    return study.run(TRIALS, BUDGET, executor=executor, workers=workers, checkpoint_seconds=0.0)  # type: ignore[arg-type]


def numbers(study: Study) -> list[Any]:
    """What must be equal: numbers, states, values, parameters, rungs."""
    return [
        [r.number, r.state, r.values, dict(r.params), dict(r.hparams), dict(r.metrics),
         dict(r.rungs), r.seed, r.by, r.bracket]
        for r in study.trials
    ]  # fmt: skip


def forked(run: Callable[[], object], kill_after: float | None = None) -> float:
    """Do something in a child process, and kill it after a time; returns how long it lived."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return time.monotonic() - began


def check(storage: Callable[[Path], str], kills: int, workers: int, seed: int) -> dict[str, Any]:
    """Kill that many studies once each; compare with one that was not killed."""
    executor = "in_process" if workers == 1 else "pool"
    draw = random.Random(seed)
    equal = lost = doubled = running = changed = 0
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        whole = root / f"whole {workers}"
        seconds = forked(lambda: make(storage(whole), whole, executor, workers))
        expected = numbers(make(storage(whole), whole, executor, workers))
        for i in range(kills):
            folder = root / f"kill {workers}.{i}"
            forked(lambda f=folder: make(storage(f), f, executor, workers),
                   draw.uniform(0.05, 1.0) * seconds)  # type: ignore[misc]  # fmt: skip
            forked(lambda f=folder: make(storage(f), f, executor, workers))  # type: ignore[misc]
            found = make(storage(folder), folder, executor, workers)
            rows = numbers(found)
            states = [t.state for t in found.optuna.get_trials(deepcopy=False)]
            equal += rows == expected
            lost += max(0, TRIALS - len(rows))
            doubled += max(0, len(rows) - TRIALS)
            running += states.count(TrialState.RUNNING)
            by_params = {json.dumps([r[3], r[7]], sort_keys=True): r for r in expected}
            for row in rows:
                other = by_params.get(json.dumps([row[3], row[7]], sort_keys=True))
                if row[1] == "complete" and other is not None and other[1] == "complete":
                    changed += row[2] != other[2]
            print(i, rows == expected, [r[1] for r in rows], file=sys.stderr, flush=True)
    return {
        "kills": kills, "workers": workers, "equal": equal, "lost": lost, "doubled": doubled,
        "running": running, "changed": changed, "seconds_whole": round(seconds, 2),
    }  # fmt: skip


def main() -> None:
    """Check SQLite with one and two workers, and PostgreSQL where a URL is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--postgres", help="URL of an empty database")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rows = {}

    def sqlite(folder: Path) -> str:
        return f"sqlite:///{folder}.db"

    rows["SQLite, 1 worker"] = check(sqlite, given.kills, 1, 0)
    rows["SQLite, 2 workers (pool)"] = check(sqlite, given.kills, 2, 1)
    if given.postgres:
        for workers in (1, 2):
            name = "PostgreSQL, 1 worker" if workers == 1 else "PostgreSQL, 2 workers (pool)"
            rows[name] = check(lambda _: given.postgres, given.kills, workers, 2 + workers)
    RESULTS.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = [
        "# Killed studies",
        "",
        f"A study of {TRIALS} trials (halving, network on digits, {BUDGET} steps each) is killed",
        "with SIGKILL at a uniformly random instant of its life and run again. Equal: numbers,",
        "states, parameters, values, rungs and final hyperparameters of all trials are those of",
        "the study that was not killed, bit for bit. Changed: complete trials with other values",
        "than the same trial there. `python -m benchmarks.studies.crashes`.",
        "",
        "| storage | kills | equal | lost | doubled | left running | changed |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in rows.items():
        cells = [row[k] for k in ("kills", "equal", "lost", "doubled", "running", "changed")]
        lines.append(f"| {name} | " + " | ".join(map(str, cells)) + " |")
    whole = statistics.fmean(row["seconds_whole"] for row in rows.values())
    lines += [
        "",
        f"An uninterrupted study took {whole:.1f} s on average. With two workers the order of",
        "events, and so what TPE has seen, may differ: equality is not expected there.",
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
