"""E2: one L2 weight for each weight of logistic regression on breast cancer, with a third split.

    OMP_NUM_THREADS=1 python benchmarks/maid/cancer.py [cost]

100 training, 200 validation and 269 test rows, standardized by the training rows; d = 62.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from common import plot, run, table, write
from torch.nn import functional as F  # noqa: N812

from bilevel.inexact import HOAG, MAID, FixedAccuracy, Geometric, SmoothInner, logistic_ridge
from bilevel.single_loop import Decay

POINTS = (250, 1000)


def main(cost: int) -> None:
    from sklearn.datasets import load_breast_cancer

    torch.set_num_threads(1)
    data = load_breast_cancer()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(data.data)[order], torch.from_numpy(data.target)[order].long()
    x = (x - x[:100].mean(0)) / x[:100].std(0)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
    train, val, test = (x[:100], y[:100]), (x[100:300], y[100:300]), (x[300:], y[300:])

    def make(shape: tuple[int, ...] | None = None, init: float = -3.0) -> SmoothInner:
        return logistic_ridge(train, val, test, shape=shape, init=init)

    def look(inner: SmoothInner) -> tuple[float, float]:
        with torch.no_grad():
            logits = test[0] @ inner.params["W"]
        right = (logits.argmax(1) == test[1]).double().mean()
        return float(F.cross_entropy(logits, test[1])), float(right)

    off: dict[str, Any] = {"descent_test": "off", "lam": 1e-4, "eta": 0.01, "alpha": None}
    arms = [
        *((f"MAID off, ε₀ = {e:g}", MAID(eps=e, **off)) for e in (0.1, 1e-3, 1e-5)),
        ("MAID off, BB + nonmonotone", MAID(barzilai_borwein=True, nonmonotone=0.85, **off)),
        ("MAID estimate, ε₀ = 0.1", MAID(**{**off, "descent_test": "estimate"})),
        ("MAID certified, ε₀ = 0.1", MAID(**{**off, "descent_test": "certified"})),
        ("fixed ε = 1e-3", FixedAccuracy(eps=1e-3, lam=1e-4)),
        ("HOAG 0.9^k", HOAG(schedule=Geometric(0.1, 0.9))),
        ("HOAG k^-2", HOAG(schedule=Decay(0.1, 2.0))),
        ("HOAG k^-3", HOAG(schedule=Decay(0.1, 3.0))),
    ]
    curves = [run(name, make, algorithm, cost, look) for name, algorithm in arms]
    one = MAID(barzilai_borwein=True, nonmonotone=0.85, tolerance=1e-5, **off)
    curves.append(run("one shared weight, MAID", lambda: make(()), one, cost, look))
    rows = []
    for curve in curves:
        best = max(range(len(curve.loss)), key=lambda i: curve.seen[i][1])
        rows.append([
            curve.name, *(curve.at(p) for p in POINTS), curve.loss[-1], *curve.seen[-1],
            f"{curve.seen[best][1]:.3f} at {curve.cost[best]}", f"{curve.seconds:.0f}",
        ])  # fmt: skip
    assert all(math.isfinite(curve.loss[-1]) for curve in curves)
    text = (
        "Validation loss is what is tuned; nothing looks at the test rows.\n\n"
        + table(
            ["arm", *(f"val CE at {p}" for p in POINTS), f"val CE at {cost}", "test CE",
             "test accuracy", "best test accuracy on the way", "s"],
            rows,
        )
    )  # fmt: skip
    write(
        "maid_cancer",
        "MAID: per-weight L2, breast cancer",
        "python benchmarks/maid/cancer.py",
        text,
    )

    def validation(axis: Any) -> None:
        for curve in curves:
            style = "-" if "MAID" in curve.name else "--"
            axis.plot(curve.cost, curve.loss, style, lw=1.1, label=curve.name)
        axis.set(xlabel="cost", ylabel="validation CE", yscale="log", title="tuned")
        axis.legend(fontsize=6)

    def testing(axis: Any) -> None:
        for curve in curves:
            style = "-" if "MAID" in curve.name else "--"
            axis.plot(curve.cost, [s[0] for s in curve.seen], style, lw=1.1, label=curve.name)
        axis.set(xlabel="cost", ylabel="test CE", yscale="log", title="third split: overfitting")

    plot("maid_cancer.png", [validation, testing])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2500)
