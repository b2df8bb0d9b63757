"""Seconds per trivial trial of a Ray Tune sweep: OptunaSearch as it comes, and `studies.ray`.

    python -m benchmarks.studies.ray_overhead [--repeats 3] [--out benchmarks/results]

The trainable imports torch and reports once.  Both kinds run alternately in one Ray session of two
CPUs, after a sweep that is not counted; the time is that of `fit`.  Processes that imported torch
are counted by their ids in the results.
Defaults are only timed up to `--default-up-to` trials.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

DEFAULT, OURS = "OptunaSearch, defaults", "StudySearcher, tuner()"


def trivial(config: dict[str, Any]) -> None:
    import torch
    from ray import tune

    tune.report({"loss": float(torch.tensor(config["x"]) ** 2), "worker": os.getpid()})


def sweep(kind: str, trials: int, folder: str) -> tuple[float, int]:
    """Return seconds of `fit`, and the number of worker processes."""
    from optuna.distributions import FloatDistribution
    from ray import tune
    from ray.tune.search.optuna import OptunaSearch

    from studies.ray import StudySearcher, tuner
    from studies.ray.door import SETTINGS

    space = {"x": FloatDistribution(-1.0, 1.0)}
    for variable in SETTINGS:
        if variable.startswith("TUNE_"):
            os.environ.pop(variable, None)
    if kind == OURS:
        searcher = StudySearcher(space, "loss", "min")
        made = tuner(trivial, searcher, trials=trials, workers=2, out=folder)
    else:
        made = tune.Tuner(
            trivial,
            tune_config=tune.TuneConfig(
                search_alg=OptunaSearch(space, metric="loss", mode="min"), num_samples=trials
            ),
            run_config=tune.RunConfig(storage_path=folder, verbose=0),
        )
    began = time.perf_counter()
    results = made.fit()
    seconds = time.perf_counter() - began
    assert len(results) == trials
    assert not results.num_errors
    return seconds, len({r.metrics["worker"] for r in results})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 60])
    parser.add_argument("--default-up-to", type=int, default=10, help="trials; it is slow")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "token"
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        sweep(OURS, 2, folder)
        for trials in args.counts:
            kinds = (OURS, DEFAULT) if trials <= args.default_up_to else (OURS,)
            found: dict[str, list[tuple[float, int]]] = {kind: [] for kind in kinds}
            for _ in range(args.repeats):
                for kind, runs in found.items():
                    runs.append(sweep(kind, trials, tempfile.mkdtemp(dir=folder)))
            for kind, runs in found.items():
                seconds = [s for s, _ in runs]
                rows.append(
                    {
                        "sweep": kind,
                        "trials": trials,
                        "fit_s": statistics.median(seconds),
                        "min_s": min(seconds),
                        "max_s": max(seconds),
                        "workers": statistics.median(w for _, w in runs),
                    }
                )
    ray.shutdown()
    load = ", ".join(f"{v:.1f}" for v in os.getloadavg())
    lines = [
        "# Ray Tune: seconds per trivial trial",
        "",
        f"`python -m benchmarks.studies.ray_overhead --repeats {args.repeats}`: `num_cpus=2`, "
        f"load averages at the end {load}; medians of {args.repeats} sweeps of `fit`, in one run.",
        "",
        "| sweep | trials | fit, s | smallest | largest | s a trial | processes importing torch |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['sweep']} | {r['trials']} | {r['fit_s']:.2f} | {r['min_s']:.2f} | "
            f"{r['max_s']:.2f} | {r['fit_s'] / r['trials']:.3f} | {r['workers']:g} |"
        )
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ray_overhead.md").write_text("\n".join(lines) + "\n")
    (args.out / "ray_overhead.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
