"""E2: three dropout rates of a perceptron on digits with 30 % wrong training labels.

    OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.digits [seeds]

400 training, 500 validation, 897 test samples; perceptron 64-100-100-10, one rate before each
layer; minibatches of 40, SGD with momentum 0.9 and learning rate 0.03, 120 epochs = 1,200 steps.
Each run is evaluated every 5 epochs; its result is the evaluation with the lowest validation loss.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import tasks
from benchmarks.self_tuning.report import mean, table, write
from bilevel import Callback, Descent, Grad, ModuleInner, SelfTuning, Space, tune
from hypergrad import CG, SGD, Implicit

STEPS, EVERY, HIGH = 1200, 50, 0.9
RATES = (0.05, 0.2, 0.3, 0.4, 0.5)
NAMES = ("p0", "p1", "p2")
TRAIN_STEPS = 5
PAIRS = (
    ("STN from 0.5", "STN from 0.05"),
    ("Δ-STN from 0.5", "Δ-STN from 0.05"),
    ("fixed p = 0.5", "fixed p = 0.05"),
    ("Δ-STN from 0.05", "STN from 0.05"),
    ("fixed at the end of STN from 0.5", "STN from 0.5"),
    ("fresh network, schedule of STN from 0.5", "STN from 0.5"),
)
Found = tuple[float, float, list[float]]
"""Lowest validation loss, test loss there, final rates."""


def space() -> Space:
    return Space({name: Grad(0.05, low=0.0, high=HIGH) for name in NAMES})


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Dropout(), nn.Linear(64, 100), nn.ReLU(),
        nn.Dropout(), nn.Linear(100, 100), nn.ReLU(),
        nn.Dropout(), nn.Linear(100, 10),
    )  # fmt: skip


class Gaussian(nn.Module):
    """Multiplicative noise with the variance of dropout, smooth in the rate: for the IFT."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        h, names = x, iter(NAMES)
        for layer in self.layers:  # type: ignore[attr-defined]
            if not isinstance(layer, nn.Dropout):
                h = layer(h)
            elif self.training:
                p = values[next(names)][:, None]
                h = h * (1 + (p / (1 - p)).sqrt() * torch.randn_like(h))
        return h


def subject(
    seed: int, rates: Mapping[str, float], smooth: bool = False, fresh: bool = False
) -> ModuleInner:
    """The learning problem; `fresh` has other weights, batches and masks on the same data."""
    task = tasks.get("digits", noise=0.3, n_train=400, n_val=500, seed=seed)
    draws = seed + 1000 * fresh
    torch.manual_seed(draws)
    net = network()

    def cross_entropy(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch["y"], reduction="none")

    return ModuleInner(
        Gaussian(net) if smooth else net,
        space(),
        predict=(lambda m, v, b: m(b["x"], v)) if smooth else (lambda m, v, b: m(b["x"])),
        loss=lambda outputs, values, batch: cross_entropy(outputs, batch),
        outer_loss=cross_entropy,
        train=dict(task.split("train")), val=dict(task.split("val")), test=dict(task.split("test")),
        dropout=None if smooth else {"1": "p0", "4": "p1", "7": "p2"},
        hparams=rates, batch_size=40, optimizer=SGD(lr=0.03, momentum=0.9), seed=draws,
    )  # fmt: skip


class Look(Callback):
    """Evaluates every so many steps."""

    def __init__(self) -> None:
        self.seen, self.best = 0, (float("inf"), float("inf"))

    def on_outer_step(self, run: Any) -> None:
        if run.cost.steps // EVERY > self.seen:
            self.seen = run.cost.steps // EVERY
            losses = run.inner.evaluate("val")["loss"], run.inner.evaluate("test")["loss"]
            self.best = min(self.best, losses)


def trained(inner: ModuleInner, steps: int = STEPS) -> Found:
    """Plain training at the rates that the inner level has."""
    best = (float("inf"), float("inf"))
    for step in range(1, steps + 1):
        inner.step()
        if step % EVERY == 0:
            best = min(best, (inner.evaluate("val")["loss"], inner.evaluate("test")["loss"]))
    return (*best, [float(v) for v in inner.hparams.values()])


def tuned(inner: ModuleInner, algorithm: Any, steps: int = STEPS) -> tuple[Found, Any]:
    """Tuning while training; validated as plain runs are."""
    look = Look()
    found = tune(inner, algorithm, steps, callbacks=[look])
    return (*look.best, [float(v) for v in found.hparams.values()]), found


def random_search(seed: int, work: int) -> Found:
    generator = torch.Generator().manual_seed(seed)
    trials = []
    for _ in range(work // STEPS):
        rates = HIGH * torch.rand(3, generator=generator)
        trials.append(trained(subject(seed, dict(zip(NAMES, rates.tolist(), strict=True)))))
    return min(trials)


def implicit(seed: int, work: int) -> Found:
    """IFT with 5 conjugate-gradient iterations: 5 + 1 + 10 gradients for each outer step."""
    steps = TRAIN_STEPS * (work // (TRAIN_STEPS + 1 + 2 * 5))
    algorithm = Descent(
        Implicit(CG(max_iter=5, damping=0.1)), torch.optim.RMSprop, lr=0.03,
        inner_steps=TRAIN_STEPS,
    )  # fmt: skip
    return tuned(subject(seed, dict.fromkeys(NAMES, 0.05), smooth=True), algorithm, steps)[0]


def self_tuning(mode: Any) -> SelfTuning:
    return SelfTuning(
        mode=mode, lr=0.03, sigma_lr=0.01, train_steps=TRAIN_STEPS, warmup=100, sigma=0.5,
        sigma_bounds=(0.05, 0.7), response_optimizer=SGD(lr=0.03, momentum=0.9),
    )  # fmt: skip


def replayed(seed: int, result: Any) -> Found:
    """A fresh network trained on a recorded schedule."""
    inner = subject(seed, dict.fromkeys(NAMES, 0.05), fresh=True)
    best = (float("inf"), float("inf"))
    for step, _ in enumerate(result.schedule.replay(inner, STEPS), 1):
        if step % EVERY == 0:
            best = min(best, (inner.evaluate("val")["loss"], inner.evaluate("test")["loss"]))
    return (*best, [float(v) for v in inner.hparams.values()])


def one_seed(seed: int) -> dict[str, Found]:
    """All ways on one seed."""
    found: dict[str, Found] = {}
    for rate in RATES:
        found[f"fixed p = {rate}"] = trained(subject(seed, dict.fromkeys(NAMES, rate)))
    work = 0
    for mode, title in (("stn", "STN"), ("delta", "Δ-STN")):
        for rate in (0.05, 0.5):
            inner = subject(seed, dict.fromkeys(NAMES, rate))
            name = f"{title} from {rate}"
            found[name], result = tuned(inner, self_tuning(mode))
            work = max(work, result.cost.gradients)
            if name == "STN from 0.5":
                end = dict(zip(NAMES, found[name][2], strict=True))
                found["fixed at the end of STN from 0.5"] = trained(subject(seed, end))
                found["fresh network, schedule of STN from 0.5"] = replayed(seed, result)
    found[f"random search, {work // STEPS} trials"] = random_search(seed, work)
    found["IFT, CG(5), Gaussian dropout"] = implicit(seed, work)
    return found


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    found: dict[str, list[Found]] = {}
    for seed in range(seeds):
        for name, run in one_seed(seed).items():
            found.setdefault(name, []).append(run)
            print(seed, name, *(f"{v:.3f}" for v in run[:2]), flush=True)

    def row(name: str) -> list[str]:
        runs = found[name]
        rates = [statistics.mean(run[2][i] for run in runs) for i in range(3)]
        losses = [mean([run[i] for run in runs], 3) for i in (0, 1)]
        return [name, *losses, ", ".join(f"{r:.2f}" for r in rates)]

    def paired(a: str, b: str) -> list[str]:
        differences = [x[0] - y[0] for x, y in zip(found[a], found[b], strict=True)]
        return [f"{a} − {b}", mean(differences, 3)]

    runs = table(["way", "validation loss", "test loss", "rates at the end"], map(row, found))
    pairs = table(["difference", "mean ± standard deviation"], [paired(a, b) for a, b in PAIRS])
    write(
        "self_tuning_digits",
        f"""# E2: dropout rates on digits with wrong labels

Command: `OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.digits {seeds}`.
torch {torch.__version__}, float32.
{" ".join((__doc__ or "").split("[seeds]")[1].split())}
{seeds} seeds (split, wrong labels, weights, batches). STN and Δ-STN: RMSprop 0.03 on λ, 0.01 on
σ, σ from 0.5 and at most 0.7, 100 steps of warm-up, 5 training steps for each outer step. Random
search and IFT have the gradients of a Δ-STN run.

{runs}

Paired differences of the validation loss:

{pairs}
""",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
