"""Weight compander: fixed, learned on the training loss, and tuned on the validation loss.

    OMP_NUM_THREADS=1 python -m benchmarks.core.compander run NAME   # a case; writes its json
    python -m benchmarks.core.compander page                         # the page and the figures

Cases: digits, digits-train, digits-all, fashion-all.  A case takes five minutes of one core.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.core.compander_arms import Data, Outcome, draw, run
from benchmarks.self_tuning.report import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "compander"
SEEDS, STEPS = range(5), 600
DECAYS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 9e-2)
GRID = [(a, g) for a in (0.5, 1.0, 2.0) for g in (1.0, 2.0, 4.0)]
BINS = torch.linspace(-4, 4, 81)


@dataclass(frozen=True)
class Case:
    """Data of a case.

    Attributes:
        task: its name.
        noise: share of wrong labels.
        clean: whether validation labels are right.
        sizes: of the training part and of the validation part.
        width: of the hidden layers.
    """

    task: str
    noise: float
    clean: bool
    sizes: tuple[int, int] = (150, 50)
    width: int = 256


CASES = {
    "digits": Case("digits", 0.0, True),
    "digits-train": Case("digits", 0.3, True),
    "digits-all": Case("digits", 0.3, False),
    "fashion-all": Case("fashion", 0.3, False, (375, 125), 128),
}


def arms(data: Data, seed: int, width: int) -> dict[str, Outcome]:
    """Run every arm on one draw of the data."""
    found: dict[str, Outcome] = {}

    def go(name: str, task: Any, **options: Any) -> Outcome:
        found[name] = run(task, seed, STEPS, width=width, **options)
        return found[name]

    def chosen(name: str, task: Any, values: list[dict[str, float]], **options: Any) -> None:
        """Choose by the validation loss on the part; then train on all labels as well."""
        tried = [run(data.part, seed, STEPS, width=width, **options, **v) for v in values]
        best = min(range(len(values)), key=lambda i: tried[i].val)
        found[f"{name}, part"] = tried[best]
        go(f"{name}, then all", task, **options, **values[best])

    for where, task in (("part", data.part), ("all", data.whole)):
        go(f"plain, {where}", task, companded=False)
        go(f"a = 2s, γ = 2, {where}", task)
        go(f"a = s, γ = 2, {where}", task, amplitude=1.0)
        go(f"learned on training loss, per layer, {where}", task, learned_on="training")
        go(
            f"learned on training loss, shared, {where}",
            task,
            learned_on="training",
            sharing="shared",
        )
    chosen("decay by grid", data.whole, [{"weight_decay": d} for d in DECAYS], companded=False)
    chosen("a, γ by grid", data.whole, [{"amplitude": a, "gamma": g} for a, g in GRID])
    go(
        "decay by unrolled, part",
        data.part,
        companded=False,
        estimator="unrolled",
        owned=("weight_decay",),
        weight_decay=1e-3,
    )
    for how in ("first order", "one step", "unrolled", "implicit"):
        go(f"a, γ by {how}, part", data.part, estimator=how)
    go("a, γ by unrolled, shared, part", data.part, estimator="unrolled", sharing="shared")
    go(
        "a, γ, decay by unrolled, part",
        data.part,
        estimator="unrolled",
        owned=("amplitude", "gamma", "weight_decay"),
        weight_decay=1e-3,
    )
    last = found["a, γ by unrolled, part"].hparams
    values = {name: torch.tensor(last[name]) for name in ("amplitude", "gamma")}
    go("a, γ by unrolled, then all", data.whole, fixed=values)
    return found


def measure(name: str) -> None:
    """Run a case and write its json."""
    torch.set_num_threads(1)
    case = CASES[name]
    seeds = []
    for seed in SEEDS:
        data = draw(case.task, case.noise, case.clean, seed, case.sizes)
        found = arms(data, seed, case.width)
        rows: dict[str, Any] = {}
        for arm, outcome in found.items():
            second = outcome.second / outcome.second.std()
            density, _ = torch.histogram(second.flatten(), BINS, density=True)
            rows[arm] = {**asdict(outcome), "second": density.tolist()}
        seeds.append(rows)
        print(name, seed, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    head = {"torch": torch.__version__, "steps": STEPS, **asdict(case)}
    (FOLDER / f"{name}.json").write_text(json.dumps({"conditions": head, "seeds": seeds}))


def page() -> None:
    """Write the page and the figures."""
    from benchmarks.core import compander_page

    compander_page.main(FOLDER)


if __name__ == "__main__":
    commands: dict[str, Callable[..., None]] = {"run": measure, "page": page}
    commands[sys.argv[1]](*sys.argv[2:])
