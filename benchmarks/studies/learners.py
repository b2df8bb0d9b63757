"""Studies of real learners against searches: `python -m benchmarks.studies.learners`.

Every way spends the same number of equivalent training steps (gradients + 2 · Hessian-vector
products).  Chosen by validation loss, at a rung or at the end; the test loss of the complete
trial with the best validation loss is reported.  Each seed has its own split and wrong labels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import optuna

from adapters import registry, tasks
from adapters.learner import Learner
from benchmarks.self_tuning.search import population
from bilevel import Budget, Descent
from hypergrad import Unrolled
from studies import Study
from studies.events import Event, Finished, Rung
from studies.sampling.spaces import sampled_space

TOTAL, SEEDS = 12_000, 5
TRIALS = 27
"""Plain trials of a search: enough for TPE, whose first ten are random."""
POPULATION = 9
"""Members of PBT: with 27, each trained a third as long, its losses were higher on digits."""
RESULTS = Path(__file__).parents[1] / "results" / "studies_learners"
DESCENT = Descent(Unrolled(steps=10), lr=0.1)

PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "network on digits, 30 % wrong": ("network", "digits", {"noise": 0.3}),
    "network on digits": ("network", "digits", {"n_train": 200}),
    "network on breast_cancer, 20 % wrong": ("network", "breast_cancer", {"noise": 0.2}),
    "network on breast_cancer, 30 % wrong": ("network", "breast_cancer", {"noise": 0.3}),
    "PS-KD on digits, 30 % wrong": ("ps_kd", "digits", {"noise": 0.3}),
    "AdaWAC on digits, 30 % wrong": ("adawac", "digits", {"noise": 0.3}),
}

Curve = list[tuple[float, float]]
"""(equivalent steps so far, lowest validation loss so far)."""
Found = tuple[Curve, float, float]
"""Curve, and validation and test loss of the chosen model."""


class Watch:
    """The curve of a study: what trials cost follows from their share of the budget."""

    def __init__(self, study: Study, budget: int) -> None:
        self.study, self.budget = study, budget
        self.shares: dict[int, float] = {}
        self.curve: Curve = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, Finished) and event.record.cost.equivalent_steps:
            self.shares[event.record.number] = event.record.cost.equivalent_steps / self.budget
        if isinstance(event, Rung):
            rungs = self.study.optuna.user_attrs["run"]["rungs"]
            self.shares[event.number] = rungs[event.rung - 1]
            if not self.curve or event.value < self.curve[-1][1]:
                self.curve.append((sum(self.shares.values()) * self.budget, event.value))


def finished(study: Study, watch: Watch) -> Found:
    """What a study reached."""
    best = study.best
    return watch.curve, float(best.value or 0.0), best.metrics["test/loss"]


Way = Callable[[type[Learner], Any, int, Path], Found]


def search(sampler: str, pruner: str = "none") -> Way:
    """Plain trials at sampled values; more of them where a pruner saves steps."""

    def run(kind: type[Learner], task: Any, seed: int, folder: Path) -> Found:
        study = Study(
            "s", kind, task, folder / "s.db", space=sampled_space(kind.space), sampler=sampler,
            pruner=pruner, seed=seed,
        )  # fmt: skip
        study.enqueue({})
        each = TOTAL // TRIALS
        watch = Watch(study, each)
        study.run(1000, Budget(equivalent_steps=each), on_event=watch,
                  total=Budget(equivalent_steps=TOTAL - each // 2))  # fmt: skip
        return finished(study, watch)

    return run


def ours(kind: type[Learner], task: Any, seed: int, folder: Path) -> Found:
    """The default of a study."""
    study = Study("o", kind, task, folder / "o.db", algorithm=DESCENT, seed=seed)
    each = int(TOTAL / 2.4)
    watch = Watch(study, each)
    study.run(100, Budget(equivalent_steps=each), on_event=watch,
              total=Budget(equivalent_steps=TOTAL))  # fmt: skip
    return finished(study, watch)


def one_run(kind: type[Learner], task: Any, seed: int, folder: Path) -> Found:
    """The gradient alone: one run at the defaults of what the sampler would choose."""
    rest = dict.fromkeys(kind.space.sampled, "fixed")
    study = Study("g", kind, task, folder / "g.db", space=kind.space.own(**rest),
                  algorithm=DESCENT, seed=seed)  # fmt: skip
    watch = Watch(study, TOTAL)
    study.run(1, Budget(equivalent_steps=TOTAL), on_event=watch, scheduler="fifo")
    return finished(study, watch)


def pbt(kind: type[Learner], task: Any, seed: int, folder: Path) -> Found:
    """Population-based training of the smooth hyperparameters, the rest at its defaults."""
    space = kind.space.own(**dict.fromkeys(kind.space.sampled, "fixed"))

    def member(values: Mapping[str, Any], seed: int) -> Any:
        learner: Any = kind(space)
        learner.setup(task, {}, seed=seed)
        if values:
            mine = {name: values[name] for name in learner.hparams}
            checked = learner.space.validate(mine, dtype=task.dtype)
            learner.set_hparams({name: checked[name] for name in learner.hparams})
        return learner

    curve: Curve = []
    best = population(
        member, space, POPULATION, TOTAL // POPULATION, seed,
        look=lambda steps, best: curve.append((float(steps), best[0])),
    )  # fmt: skip
    return curve, *best


WAYS: dict[str, Way] = {
    "random": search("random"),
    "TPE": search("tpe"),
    "ASHA (random + halving pruner)": search("random", "halving"),
    "PBT": pbt,
    "one gradient run": one_run,
    "study": ours,
}


def measure(pair: str, chosen: Collection[str]) -> dict[str, list[Found]]:
    """Run some ways on all seeds."""
    learner, name, options = PAIRS[pair]
    found: dict[str, list[Found]] = {}
    for seed in range(SEEDS):
        task = tasks.get(name, seed=seed, **options)
        for way in chosen:
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(way, []).append(
                    WAYS[way](registry.get(learner), task, seed, Path(folder))
                )
            _, val, test = found[way][-1]
            print(pair, seed, way, round(val, 4), round(test, 4), file=sys.stderr, flush=True)
    return found


def draw(everything: dict[str, dict[str, list[Found]]], path: Path) -> None:
    """Anytime curves: median over seeds, and the range."""
    import matplotlib as mpl

    mpl.use("Agg")
    import numpy as np
    from matplotlib import pyplot as plt

    rows_of_axes = -(-len(everything) // 3)
    size = (11, 3.3 * rows_of_axes)
    figure, axes = plt.subplots(rows_of_axes, 3, figsize=size, squeeze=False, layout="constrained")
    grid = np.linspace(0, TOTAL, 81)
    for axis, (pair, ways) in zip(axes.flat, everything.items(), strict=False):
        for color, (way, runs) in enumerate(ways.items()):
            rows = []
            for curve, _, _ in runs:
                cost, value = (np.array(column) for column in zip(*curve, strict=True))
                at = np.searchsorted(cost, grid, side="right") - 1
                rows.append(np.where(at >= 0, value[np.maximum(at, 0)], np.nan))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                low, middle, high = np.nanmin(rows, 0), np.nanmedian(rows, 0), np.nanmax(rows, 0)
            axis.plot(grid, middle, lw=1.6, color=f"C{color}", label=way)
            axis.fill_between(grid, low, high, color=f"C{color}", alpha=0.12, lw=0)
        axis.set_title(pair, fontsize=8)
        axis.set_yscale("log")
        axis.set_xlabel("equivalent training steps", fontsize=8)
        axis.tick_params(labelsize=7, which="both")
        axis.grid(alpha=0.3, which="both")
    for axis in axes[:, 0]:
        axis.set_ylabel("lowest validation loss so far", fontsize=8)
    handles = axes[0, 0].get_lines()
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=7)
    figure.savefig(path, dpi=110)


def page(everything: dict[str, dict[str, list[Found]]]) -> str:
    """The tables."""
    lines = [
        "# Studies of real learners at equal cost",
        "",
        f"{TOTAL} equivalent training steps each (gradients + 2 · Hessian-vector products), seeds",
        f"0–{SEEDS - 1}, mean ± standard deviation. Chosen by validation loss. Searches: {TRIALS}",
        "trials' worth of plain training, the first at the defaults; ASHA starts more, and stops",
        f"them early. PBT trains {POPULATION} members, tunes what is smooth, and takes the best of",
        "ten looks. One gradient run: no search at all. Study: the default, a bracket of nine.",
        "`python -m benchmarks.studies.learners`; curves in studies_learners.png (median, range).",
    ]
    for pair, ways in everything.items():
        lines += ["", f"## {pair}", "", "| way | val loss | test loss |", "| --- | ---: | ---: |"]
        for way, runs in ways.items():
            cells = []
            for k in (1, 2):
                values = [float(run[k]) for run in runs]  # type: ignore[arg-type]
                cells.append(f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}")
            lines.append(f"| {way} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure; what is not measured again stays as it was."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("pairs", nargs="*", help="parts of the names of pairs; all by default")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    path = RESULTS.with_suffix(".json")
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for pair in PAIRS:
        if not given.pairs or any(text in pair for text in given.pairs):
            found = {**known.get(pair, {}), **measure(pair, given.ways)}
            known[pair] = {way: found[way] for way in WAYS if way in found}
            path.write_text(json.dumps(known) + "\n")
    known = {pair: known[pair] for pair in PAIRS if pair in known}
    RESULTS.with_suffix(".md").write_text(page(known))
    draw(known, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
