"""E2: one L2 weight for each weight of logistic regression on breast cancer, with a third split.

    OMP_NUM_THREADS=1 python benchmarks/maid/cancer.py [cost [seeds]]

100 training, 200 validation and 269 test rows, standardized by the training rows; d = 62.
A seed is a split.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from common import Curve, plot, run, table, write
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bilevel.inexact import HOAG, MAID, FixedAccuracy, Geometric, SmoothInner, logistic_ridge
from bilevel.single_loop import Decay

POINTS = (1000, 3000)
Data = tuple[Tensor, Tensor]


def splits(seed: int) -> tuple[Data, Data, Data]:
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x, y = torch.from_numpy(data.data)[order], torch.from_numpy(data.target)[order].long()
    x = (x - x[:100].mean(0)) / x[:100].std(0)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    return (x[:100], y[:100]), (x[100:300], y[100:300]), (x[300:], y[300:])


def runs(cost: int, seed: int) -> list[Curve]:
    train, val, test = splits(seed)

    def make(shape: tuple[int, ...] | None = None) -> SmoothInner:
        return logistic_ridge(train, val, test, shape=shape, init=-3.0)

    def look(inner: SmoothInner) -> tuple[float, float]:
        with torch.no_grad():
            logits = test[0] @ inner.params["W"]
        right = (logits.argmax(1) == test[1]).double().mean()
        return float(F.cross_entropy(logits, test[1])), float(right)

    off: dict[str, Any] = {"descent_test": "off", "lam": 1e-4, "eta": 0.01, "alpha": None}
    fast: dict[str, Any] = {"barzilai_borwein": True, "nonmonotone": 0.85, **off}
    arms = [
        *((f"MAID off, ε₀ = {e:g}", MAID(eps=e, **off)) for e in (0.1, 1e-3, 1e-5)),
        ("MAID off, BB + nonmonotone", MAID(**fast)),
        ("MAID estimate, ε₀ = 0.1", MAID(**{**off, "descent_test": "estimate"})),
        ("MAID certified, ε₀ = 0.1", MAID(**{**off, "descent_test": "certified"})),
        ("fixed ε = 1e-3", FixedAccuracy(eps=1e-3, lam=1e-4)),
        ("HOAG 0.9^k", HOAG(schedule=Geometric(0.1, 0.9))),
        ("HOAG k^-2", HOAG(schedule=Decay(0.1, 2.0))),
        ("HOAG k^-3", HOAG(schedule=Decay(0.1, 3.0))),
    ]
    found = [run(name, make, algorithm, cost, look) for name, algorithm in arms]
    # Without a test of z, the nonmonotone line search lets it drift past the best value.
    shared = MAID(tolerance=1e-4, **{**fast, "descent_test": "estimate", "eta": 0.5})
    return [*found, run("one shared weight, MAID", lambda: make(()), shared, cost, look)]


def mean(values: list[float], digits: int = 4) -> str:
    center = f"{statistics.mean(values):.{digits}f}"
    return center if len(values) < 2 else f"{center} ± {statistics.stdev(values):.{digits}f}"


def main(cost: int, seeds: int) -> None:
    torch.set_num_threads(1)
    found = [runs(cost, seed) for seed in range(seeds)]
    rows = []
    for curves in zip(*found, strict=True):
        tested = [[s[1] for s in c.seen] for c in curves]
        rows.append([
            curves[0].name,
            *(mean([c.at(p) for c in curves]) for p in (*POINTS, cost)),
            mean([c.seen[-1][0] for c in curves]),
            mean([t[-1] for t in tested], 3),
            mean([max(t) for t in tested], 3),
            mean([float(len(c.cost)) for c in curves], 0),
        ])  # fmt: skip
    text = (
        f"{seeds} seeds (splits), means ± standard deviations. Validation loss is what is tuned; "
        "nothing looks at the test rows.\n\n"
        + table(
            ["arm", *(f"val CE at {p}" for p in (*POINTS, cost)), "test CE", "test accuracy",
             "highest on the way", "steps"],
            rows,
        )
    )  # fmt: skip
    command = f"python benchmarks/maid/cancer.py {cost} {seeds}"
    write("maid_cancer", "MAID: per-weight L2, breast cancer", command, text)
    first = found[0]

    def style(curve: Curve) -> dict[str, Any]:
        if "shared" in curve.name:
            return {"color": "black", "ls": ":"}
        return {"ls": "-" if "MAID" in curve.name else "--"}

    def validation(axis: Any) -> None:
        for curve in first:
            axis.plot(curve.cost, curve.loss, lw=1.1, label=curve.name, **style(curve))
        axis.set(xlabel="cost", ylabel="validation CE", yscale="log", title="tuned, seed 0")
        axis.legend(fontsize=6)

    def testing(axis: Any) -> None:
        for curve in first:
            axis.plot(curve.cost, [s[0] for s in curve.seen], lw=1.1, **style(curve))
        axis.set(xlabel="cost", ylabel="test CE", yscale="log", title="third split: overfitting")

    plot("maid_cancer.png", [validation, testing])


if __name__ == "__main__":
    given = [int(v) for v in sys.argv[1:]]
    main(*(given + [10_000, 3][len(given) :]))
