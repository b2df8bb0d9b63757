"""Studies with and without hypergradients at equal solves: `python -m benchmarks.studies.nested`.

Every row gets the same number of solves; the best trial is chosen by validation error, the test
error is only reported.  Data, initial order and samplers change with the seed.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from benchmarks.studies.ridge import Closed, Ridge, regression, ridge, sparse
from bilevel import Budget, Descent
from studies import Study
from studies.runner.schedulers import Halving
from studies.sampling.spaces import sampled_space

SOLVES, SEEDS = 200, 5
RESULTS = Path(__file__).parents[1] / "results" / "studies_nested"

Way = Callable[[type[Ridge], Any, Descent, int, Path], Study]


def search(sampler: str) -> Way:
    """Plain trials of a sampler over everything."""

    def run(kind: type[Ridge], task: Any, descent: Descent, seed: int, folder: Path) -> Study:
        study = Study(
            sampler, kind, task, folder / f"{sampler}.db",
            space=sampled_space(kind.space), sampler=sampler, seed=seed,
        )  # fmt: skip
        return study.run(SOLVES, 1)

    return run


def nested(kind: type[Ridge], task: Any, descent: Descent, seed: int, folder: Path) -> Study:
    """Every sampled trial runs 20 outer steps to the end."""
    study = Study(
        "nested", kind, task, folder / "nested.db", algorithm=descent, sampler="tpe", seed=seed
    )
    return study.run(SOLVES // 40, Budget(equivalent_steps=40), scheduler="fifo", warm=False)


def ours(mix: bool) -> Way:
    """The default of a study: halving with pause and resume."""

    def run(kind: type[Ridge], task: Any, descent: Descent, seed: int, folder: Path) -> Study:
        name = "ours" if mix else "unmixed"
        study = Study(name, kind, task, folder / f"{name}.db", algorithm=descent, seed=seed)
        share = 84 if kind.space.sampled else SOLVES  # a bracket of 9 costs 2.4 trials
        return study.run(
            SOLVES,
            Budget(equivalent_steps=share),
            total=Budget(equivalent_steps=SOLVES),
            scheduler=Halving(mix=mix),
        )

    return run


WAYS: dict[str, Way] = {
    "random": search("random"),
    "TPE": search("tpe"),
    "TPE, 20 steps nested": nested,
    "study": ours(True),
    "study, gradients only": ours(False),
}

PROBLEMS: dict[str, tuple[int, dict[str, Any], Descent]] = {
    "mixed: 20 penalties × 9": (20, {"mixed": True}, Descent(Closed(), lr=0.5)),
    "mixed, sparse: 20 penalties × 9": (20, {"mixed": True}, Descent(Closed(), lr=0.5)),
    "50 penalties": (50, {}, Descent(Closed(), lr=0.5)),
    "1 penalty": (1, {}, Descent(Closed(), lr=0.5)),
    "2 penalties": (2, {}, Descent(Closed(), lr=0.5)),
    "non-smooth, 20 × 9": (20, {"mixed": True, "grain": 0.02}, Descent(Closed(), lr=0.5)),
    "misleading, 20 × 9": (20, {"mixed": True}, Descent(Closed(-1.0), lr=0.5)),
    "misleading, 20": (20, {}, Descent(Closed(-1.0), lr=0.5)),
}


def measure(problem: str) -> dict[str, list[list[float]]]:
    """Return validation error, test error and solves of each way and seed."""
    groups, options, descent = PROBLEMS[problem]
    kind = ridge(groups, **options)
    found: dict[str, list[list[float]]] = {}
    for seed in range(SEEDS):
        task = sparse(groups, seed) if "sparse" in problem else regression(max(20, groups), seed)
        for name, way in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                study = way(kind, task, descent, seed, Path(folder))
                best = study.best
                cost = sum(record.cost.equivalent_steps for record in study.trials)
            row = [best.value or 0.0, best.metrics["test/loss"], float(cost)]
            found.setdefault(name, []).append(row)
            print(problem, seed, name, [round(x, 4) for x in row], file=sys.stderr, flush=True)
    return found


def page(everything: dict[str, dict[str, list[list[float]]]]) -> str:
    """The tables."""
    lines = [
        "# Studies at equal cost",
        "",
        f"{SOLVES} solves each, seeds 0–{SEEDS - 1}, mean ± standard deviation; chosen by the",
        "validation error. A hypergradient step costs 2 solves. Ridge regression on 60 rows",
        "(sparse: 100, 20 groups of 5 features of which 4 count), exact solves and",
        "hypergradients; `python -m benchmarks.studies.nested`.",
        "Ratio: mean over TPE's mean.",
    ]
    for problem, rows in everything.items():
        lines += ["", f"## {problem}", "", "| way | val | ratio | test | ratio | solves |",
                  "| --- | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
        base = [statistics.fmean(column) for column in zip(*rows["TPE"], strict=True)]
        for name, values in rows.items():
            val, test, cost = (list(column) for column in zip(*values, strict=True))
            cells = [name]
            for column, reference in ((val, base[0]), (test, base[1])):
                mean = statistics.fmean(column)
                cells += [f"{mean:.3f} ± {statistics.stdev(column):.3f}", f"{mean / reference:.2f}"]
            lines.append("| " + " | ".join([*cells, f"{statistics.fmean(cost):.0f}"]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all problems, or those whose name begins like an argument."""
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = RESULTS.with_suffix(".json")
    known = json.loads(path.read_text()) if path.exists() else {}
    for problem in PROBLEMS:
        if len(sys.argv) == 1 or any(problem.startswith(a) for a in sys.argv[1:]):
            known[problem] = measure(problem)
            path.write_text(json.dumps(known, indent=1) + "\n")
    RESULTS.with_suffix(".md").write_text(page({p: known[p] for p in PROBLEMS if p in known}))


if __name__ == "__main__":
    main()
