"""Every method that fine-tunes a pretrained network, on digits 0-4 → 5-9: writes docs/methods.md.

python -m benchmarks.methods             # both tables, about 30 minutes on one core
python -m benchmarks.methods --only hut  # these rows anew, the others as they were measured
python -m benchmarks.methods --quick     # few seeds and steps; prints, and writes nothing
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from adapters import Trainer, artifacts, registry, tasks
from adapters.finetune import FineTune
from adapters.measure import intruders
from adapters.networks import MLP
from adapters.weights.method import WeightAdapter
from bilevel import Budget, Descent
from hypergrad import Unrolled
from studies import Study

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "methods.json"
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STEPS, TRIALS = 250, 30
TUNING, FRESH = (0, 1, 2), tuple(range(5, 15))


@dataclass
class Line:
    """What one method did."""

    name: str
    lr: float
    trained: int
    state: int
    step_ms: float
    accuracy: list[float]
    retention: list[float]
    intruders: list[float]


def methods() -> list[str]:
    """Names of all methods that start from the pretrained network."""
    found = []
    for name in registry.names():
        kind = registry.get(name)
        if issubclass(kind, Trainer) and issubclass(kind.method_type, FineTune):
            found.append(name)
    return found


def run(name: str, seed: int, lr: float, steps: int) -> tuple[Trainer, float]:
    """Train at the defaults, and return the learner with CPU milliseconds a step."""
    learner = registry.get(name)()
    task = tasks.get("digits_transfer", seed=seed)
    learner.setup(task, {"lr": lr}, seed=seed)
    began = time.process_time()
    for _ in range(steps):
        learner.step()
    return cast(Trainer, learner), (time.process_time() - began) / steps * 1e3


def looked_at(learner: Trainer, seed: int) -> tuple[float, float, float]:
    """Return test accuracy, source accuracy with the old head, and intruder dimensions of 30."""
    task = tasks.get("digits_transfer", seed=seed)
    source = cast(MLP, artifacts.resolve(["source_net"], task, seed)["source_net"])
    model = cast(MLP, learner.module())
    old, new = source.layers, model.layers
    count = sum(
        intruders(cast(Tensor, a.weight), cast(Tensor, b.weight.detach())).count
        for a, b in zip(old[:-1], new[:-1], strict=True)
    )
    model.layers[-1] = old[-1]
    data = task.split("source_test")
    with torch.no_grad():
        kept = (model(data["x"]).argmax(1) == data["y"]).double().mean()
    return learner.evaluate("test")["accuracy"], float(kept), float(count)


def measure(name: str, steps: int, tuning: Sequence[int], fresh: Sequence[int]) -> Line:
    """Choose the learning rate by validation accuracy, then run fresh seeds."""
    scores = {}
    for lr in RATES:
        each = [run(name, seed, lr, steps)[0].evaluate("val")["accuracy"] for seed in tuning]
        scores[lr] = statistics.fmean(each)
    best = max(scores, key=lambda lr: scores[lr])
    line = Line(name, best, 0, 0, 0.0, [], [], [])
    times = []
    for seed in fresh:
        learner, ms = run(name, seed, best, steps)
        times.append(ms)
        accuracy, kept, count = looked_at(learner, seed)
        line.accuracy.append(accuracy)
        line.retention.append(kept)
        line.intruders.append(count)
    line.trained = sum(p.numel() for p in learner.params.values())
    line.state = sum(v.nbytes for v in learner.optimizer_state.values() if isinstance(v, Tensor))
    line.step_ms = statistics.median(times)
    return line


def tuned(name: str, seeds: Sequence[int], trials: int, steps: int) -> dict[str, Any]:
    """Return test losses of the best trial of a random search, and of tuning by the gradient."""
    learner = registry.get(name)
    smooth = [n for n, d in learner.space.items() if type(d).__name__ == "Grad"]
    rest = {n: "fixed" for n in learner.space if n not in smooth}
    budget = trials * steps
    ways = {
        "defaults": (dict.fromkeys(smooth, "fixed"), 1, steps, None),
        "random": (dict.fromkeys(smooth, "sampler"), trials, steps, None),
        "gradient": (dict.fromkeys(smooth, "grad"), 1, budget, Descent(Unrolled(steps=10), lr=0.1)),
    }
    found: dict[str, Any] = {"name": name, "smooth": len(smooth)}
    for way, (owners, count, each, algorithm) in ways.items():
        losses, accuracies = [], []
        for seed in seeds:
            with tempfile.TemporaryDirectory() as folder:
                study = Study(
                    way,
                    learner,
                    tasks.get("digits_transfer", seed=seed),
                    Path(folder, "study.db"),
                    space=learner.space.own(**rest, **owners),
                    algorithm=algorithm,
                    sampler="random",
                    seed=seed,
                )
                if way == "random":
                    study.enqueue({})
                study.run(count, Budget(equivalent_steps=each), keep="last")
                losses.append(study.best.metrics["test/loss"])
                accuracies.append(study.best.metrics["test/accuracy"])
        found[way] = losses
        found[f"{way} accuracy"] = accuracies
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few seeds and steps, nothing written")
    parser.add_argument("--only", help="names of methods, comma-separated")
    quick = (options := parser.parse_args()).quick
    torch.set_num_threads(1)
    names = options.only.split(",") if options.only else methods()
    steps, fresh = (20, (5,)) if quick else (STEPS, FRESH)
    lines = []
    for name in names:
        lines.append(measure(name, steps, TUNING[:1] if quick else TUNING, fresh))
        print(asdict(lines[-1]), flush=True)
    searched = []
    for name in names:
        if issubclass(registry.get(name).method_type, WeightAdapter):  # type: ignore[attr-defined]
            searched.append(
                tuned(name, TUNING[:1] if quick else TUNING, 3 if quick else TRIALS, steps)
            )
            print(searched[-1], flush=True)
    if quick:
        return
    from benchmarks.methods.page import page

    if options.only:
        before = json.loads(RESULTS.read_text())
        lines += [Line(**each) for each in before["lines"] if each["name"] not in names]
        searched += [each for each in before["searched"] if each["name"] not in names]
    lines.sort(key=lambda line: line.name)
    searched.sort(key=lambda each: each["name"])
    (ROOT / "docs" / "methods.md").write_text(page(lines, searched))
    results = {"lines": [asdict(line) for line in lines], "searched": searched}
    RESULTS.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
