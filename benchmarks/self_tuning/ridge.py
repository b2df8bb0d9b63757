"""E1: the log-penalty of ridge regression on the diabetes data, where the best one is known.

    OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.ridge [seeds]

60 training and 200 validation rows, standardized; L_T = mean squared error + e^λ ‖w‖², L_V without
the penalty.  Minibatches of 20, SGD with momentum 0.9, one ε per step, σ = 0.5 fixed, 5 steps for
each outer step, RMSprop on λ after 200 steps of warm-up (2,000 in rows "long"), 6,000 steps.  The
outer learning rate is 0.02, or decays as 0.1/√(k + 1) with the outer step k = 0, 1, ...
"""

from __future__ import annotations

import math
import statistics
import sys
from itertools import product
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from scipy.optimize import minimize_scalar
from sklearn.datasets import load_diabetes
from torch import Tensor

from benchmarks.self_tuning.report import figure, mean, table, write
from bilevel import Budget, Callback, Descent, Grad, SelfTuning, Space, tune
from bilevel.single_loop import Decay
from hypergrad import CG, SGD, Implicit, Problem

N_TRAIN, N_VAL, BATCH, STEPS, TRAIN_STEPS = 60, 200, 20, 6000, 5
RATES = (0.001, 0.003, 0.01, 0.03)
STARTS = {"0": (0.0, 200), "-6": (-6.0, 200), "-6, long": (-6.0, 2000)}
"""First λ and steps of warm-up."""

OUTER = {"constant": 0.02, "decaying": Decay(0.1, 0.5)}
TAIL = 100
"""Outer steps at the end of a run over which λ and the response are averaged."""

Data = tuple[Tensor, Tensor]


def data(seed: int) -> tuple[Data, Data]:
    """Standardized training and validation rows."""
    x, y = load_diabetes(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(y))
    train, val = order[:N_TRAIN], order[N_TRAIN : N_TRAIN + N_VAL]
    x = (x - x[train].mean(0)) / x[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    return tuple((torch.from_numpy(x[i]), torch.from_numpy(y[i])) for i in (train, val))  # type: ignore[return-value]


def error(params: Any, hparams: Any, batch: Data) -> Tensor:
    x, t = batch
    return (x @ params["w"] - t).square().mean()


def penalized(params: Any, hparams: Any, batch: Data) -> Tensor:
    return error(params, hparams, batch) + hparams["penalty"].exp() * params["w"].square().sum()


class Ridge:
    """Closed forms on one split."""

    def __init__(self, seed: int) -> None:
        self.train, self.val = data(seed)
        x, t = self.train
        self.S, self.c = x.T @ x / len(x), x.T @ t / len(x)

    def weights(self, penalty: float) -> Tensor:
        return torch.linalg.solve(self.S + math.exp(penalty) * torch.eye(10).double(), self.c)

    def slope(self, penalty: float) -> Tensor:
        """dw*/dλ."""
        inverse = self.S + math.exp(penalty) * torch.eye(10).double()
        return -math.exp(penalty) * torch.linalg.solve(inverse, self.weights(penalty))

    def loss(self, penalty: float) -> float:
        """L_V(w*(λ))."""
        return float(error({"w": self.weights(penalty)}, {}, self.val))

    def best(self) -> float:
        return float(
            minimize_scalar(self.loss, bounds=(-8, 4), method="bounded", options={"xatol": 1e-8}).x
        )


def options(ridge: Ridge, start: float, rate: float, seed: int) -> dict[str, Any]:
    x, t = ridge.train

    def batch(step: int) -> Data:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        rows = torch.randperm(N_TRAIN, generator=generator)[:BATCH]
        return x[rows], t[rows]

    return {
        "params": {"w": torch.zeros(10, dtype=torch.float64, requires_grad=True)},
        "space": Space(penalty=Grad(0.0)),
        "hparams": {"penalty": start},
        "optimizer": SGD(lr=rate, momentum=0.9),
        "inner_batch": batch,
        "outer_batch": ridge.val,
    }


class Slopes(Callback):
    """Keeps the response θ = gate · response of the last outer steps."""

    def __init__(self) -> None:
        self.last: list[Tensor] = []

    def on_outer_step(self, run: Any) -> None:
        if run.cost.steps > STEPS - TRAIN_STEPS * TAIL:
            state = run.state_dict()["algorithm"]["weights"]["response"]
            response, gate = state.split(10)
            self.last.append(response * gate)

    def mean(self) -> Tensor:
        return torch.stack(self.last).mean(0)


def self_tuned(
    ridge: Ridge, mode: Any, outer: str, start: str, rate: float, seed: int
) -> dict[str, Any]:
    algorithm = SelfTuning(
        mode=mode, lr=OUTER[outer], warmup=STARTS[start][1], train_steps=TRAIN_STEPS, sigma=0.5,
        tune_sigma=False, seed=seed,
    )  # fmt: skip
    given, slopes = options(ridge, STARTS[start][0], rate, seed), Slopes()
    found = tune(Problem(penalized, error), algorithm, STEPS, callbacks=[slopes], **given)
    path = found.schedule["penalty"]
    end = float(np.mean(path[-TAIL:]))
    truth = ridge.slope(end)
    off = (slopes.mean() - truth).norm() / truth.norm() if slopes.last else math.inf
    return {
        "path": path,
        "step": found.schedule["step"],
        "end": end,
        "regret": ridge.loss(end) - ridge.loss(ridge.best()) if math.isfinite(end) else math.inf,
        "slope_error": float(off),
        "status": found.status.value,
        "gradients": found.cost.gradients,
    }


def implicit(ridge: Ridge, start: float, seed: int, work: int) -> float:
    """IFT with conjugate gradients on full batches, at the work of one Δ-STN run."""
    given = options(ridge, start, 0.03, seed) | {"inner_batch": ridge.train}
    algorithm = Descent(Implicit(CG(max_iter=10)), torch.optim.RMSprop, lr=0.02, inner_steps=5)
    found = tune(Problem(penalized, error), algorithm, Budget(equivalent_steps=work), **given)
    end = float(np.mean(found.schedule["penalty"][-20:]))
    return ridge.loss(end) - ridge.loss(ridge.best())


def random_search(ridge: Ridge, seed: int, work: int, each: int = 600) -> float:
    """Best of as many trainings of 600 gradients as the work pays for, solved exactly."""
    draws = np.random.default_rng(seed).uniform(-8, 4, work // each)
    return min(map(ridge.loss, draws)) - ridge.loss(ridge.best())


def draw(runs: dict[Any, list[dict[str, Any]]], best: float) -> None:
    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure_, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, sharey=True)
    colors = dict(zip(RATES, ("tab:green", "tab:blue", "tab:orange", "tab:red"), strict=True))
    for line, outer in zip(axes, OUTER, strict=True):
        for axis, mode, title in zip(line, ("stn", "delta"), ("STN", "Δ-STN"), strict=True):
            for rate in RATES:
                for start in STARTS:
                    run = runs[mode, outer, start, rate][0]
                    label = f"learning rate {rate:g}" if start == "0" else None
                    style = ":" if "long" in start else "-"
                    axis.plot(
                        run["step"], run["path"], style, color=colors[rate], lw=1.2, label=label
                    )
            axis.axhline(best, color="black", ls="--", lw=1, label="best λ")
            axis.set(title=f"{title}, {outer} outer learning rate", ylim=(-8, 3))
            axis.grid(alpha=0.3)
        line[0].set_ylabel("λ, the logarithm of the penalty")
    for axis in axes[1]:
        axis.set_xlabel("training step")
    axes[0, 0].legend(fontsize=8)
    figure_.tight_layout()
    figure_.savefig(figure("stn_ridge"), dpi=110)


def main(seeds: int) -> None:
    torch.set_num_threads(1)
    ridges = [Ridge(seed) for seed in range(seeds)]
    runs: dict[Any, list[dict[str, Any]]] = {}
    for key in product(("stn", "delta"), OUTER, STARTS, RATES):
        runs[key] = [self_tuned(r, *key, s) for s, r in enumerate(ridges)]
        print(*key, [f"{r['regret']:.1e}" for r in runs[key]], flush=True)

    def cell(mode: str, outer: str, start: str, rate: float, key: str) -> str:
        found = runs[mode, outer, start, rate]
        if any(run["status"] == "diverged" for run in found):
            count = sum(run["status"] == "diverged" for run in found)
            return f"{count} of {len(found)} diverged"
        values = [run[key] for run in found]
        return f"{statistics.mean(values):.1e} ({max(values):.1e})"

    titles = {"stn": "STN", "delta": "Δ-STN"}
    header = ["λ starts at", "outer rate", "learning rate", *titles.values()]
    tables = {
        key: table(header, [
            [start, outer, f"{rate:g}",
             *(cell(mode, outer, start, rate, key) for mode in titles)]
            for start, outer, rate in product(STARTS, OUTER, RATES)
        ])
        for key in ("regret", "slope_error")
    }  # fmt: skip
    work = runs["delta", "constant", "0", 0.01][0]["gradients"]
    others = [implicit(r, 0.0, s, work) for s, r in enumerate(ridges)]
    search = [random_search(r, s, work) for s, r in enumerate(ridges)]
    draw(runs, ridges[0].best())
    best = [ridge.best() for ridge in ridges]
    lowest = ", ".join(f"{r.loss(at):.3f}" for r, at in zip(ridges, best, strict=True))
    trials = f"random search, {work // 600} trials of 600 gradients, each solved exactly"
    equal = table(
        ["way", "excess validation loss"],
        [
            ["IFT, CG, full batches", mean(others, 6)],
            [trials, mean(search, 6)],
            *(
                [f"{titles[mode]}, learning rate 0.01, {outer} outer rate",
                 mean([run["regret"] for run in runs[mode, outer, "0", 0.01]], 6)]
                for mode, outer in product(titles, OUTER)
            ),
        ],
    )  # fmt: skip
    write(
        "self_tuning_ridge",
        f"""# E1: the penalty of ridge regression

Command: `OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.ridge {seeds}`.
torch {torch.__version__}, float64.
{" ".join((__doc__ or "").split("[seeds]")[1].split())}
{seeds} seeds; a seed is a split, an order of batches and all perturbations.
Best λ of each split: {", ".join(f"{at:.2f}" for at in best)}; its validation loss: {lowest}.

Validation loss of the exact ridge solution at the λ found (mean of the last {5 * TAIL} steps),
minus the best possible: mean over seeds (worst seed):

{tables["regret"]}

Relative error of the response ∂ŵ/∂λ, averaged over the last {5 * TAIL} steps, against the closed
form at that λ: mean over seeds (worst seed):

{tables["slope_error"]}

At equal work ({work} gradients, a Hessian-vector product counted as two), from λ = 0:

{equal}

Figure: `docs/figures/stn_ridge.png` (seed 0; dotted: 2,000 steps of warm-up).
""",
    )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
