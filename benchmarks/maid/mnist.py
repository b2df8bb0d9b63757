"""Multinomial logistic regression on MNIST 12×12 with one L2 weight for each of 1,440 weights.

    BILEVEL_DATA=... OMP_NUM_THREADS=1 python benchmarks/maid/mnist.py [cost]

3,000 training, 3,000 validation and 10,000 test images (the official test set, only reported).
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from common import data, plot, run, table, write
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from bilevel.inexact import (
    FISTA,
    HOAG,
    LBFGS,
    MAID,
    FixedAccuracy,
    Geometric,
    NewtonCG,
    SmoothInner,
    logistic_ridge,
)
from bilevel.single_loop import Decay

ROWS = 3000


def load() -> list[tuple[Tensor, Tensor]]:
    archive = np.load(data("mnist", "mnist.npz"))
    splits = []
    for x, y in (
        (archive["x_train"][:ROWS], archive["y_train"][:ROWS]),
        (archive["x_train"][ROWS : 2 * ROWS], archive["y_train"][ROWS : 2 * ROWS]),
        (archive["x_test"], archive["y_test"]),
    ):
        images = torch.from_numpy(x[:, 2:26, 2:26]).double()[:, None] / 255
        splits.append((F.avg_pool2d(images, 2).flatten(1), torch.from_numpy(y).long()))
    return splits


def main(cost: int) -> None:
    torch.set_num_threads(1)
    train, val, test = load()

    def make(shape: tuple[int, ...] | None = None) -> SmoothInner:
        return logistic_ridge(train, val, test, shape=shape, init=-3.0, low=-12.0, high=3.0)

    def look(inner: SmoothInner) -> tuple[float, float]:
        with torch.no_grad():
            logits = test[0] @ inner.params["W"]
        right = (logits.argmax(1) == test[1]).double().mean()
        return float(F.cross_entropy(logits, test[1])), float(right)

    lower: dict[str, Any] = {"solver": LBFGS()}
    off: dict[str, Any] = {"descent_test": "off", "lam": 1e-4, "eta": 0.01}
    fast: dict[str, Any] = {"barzilai_borwein": True, "nonmonotone": 0.85}
    arms: list[tuple[str, Any]] = [
        *((f"MAID off, ε₀ = {e:g}", MAID(eps=e, **off, **lower)) for e in (1.0, 0.1, 1e-3)),
        ("MAID off, BB + nonmonotone, ε₀ = 0.1", MAID(eps=0.1, **off, **fast, **lower)),
        ("the same, FISTA", MAID(eps=0.1, solver=FISTA(), **off, **fast)),
        ("the same, Newton-CG", MAID(eps=0.1, solver=NewtonCG(), **off, **fast)),
        ("fixed ε = 0.1", FixedAccuracy(eps=0.1, **lower)),
        ("HOAG 0.9^k", HOAG(schedule=Geometric(0.1, 0.9), **lower)),
        ("HOAG k^-2", HOAG(schedule=Decay(0.1, 2.0), **lower)),
        ("HOAG k^-3", HOAG(schedule=Decay(0.1, 3.0), **lower)),
    ]
    curves = [run(name, make, algorithm, cost, look) for name, algorithm in arms]
    # Without a test of z, the nonmonotone line search lets it drift past the best value.
    tested = {**off, **fast, **lower, "descent_test": "estimate", "eta": 0.5}
    one = MAID(eps=0.1, tolerance=1e-3, **tested)
    curves.append(run("one shared weight, MAID", lambda: make(()), one, cost, look))
    points = (cost // 8, cost // 2)
    rows = [
        [c.name, *(c.at(p) for p in points), c.loss[-1], *c.seen[-1], len(c.cost),
         f"{c.eps[-1]:.1e}", f"{c.seconds:.0f}"]
        for c in curves
    ]  # fmt: skip
    text = (
        f"{ROWS} training and {ROWS} validation images, the 10,000 test images reported only; "
        "θ₀ = -3, θ in (-12, 3); lower level by L-BFGS unless said.\n\n"
        + table(
            ["arm", *(f"val CE at {p}" for p in points), f"val CE at {cost}", "test CE",
             "test accuracy", "steps", "last ε", "s"],
            rows,
        )
    )  # fmt: skip
    write(
        "maid_mnist",
        "MAID: per-weight L2 on MNIST 12×12",
        f"python benchmarks/maid/mnist.py {cost}",
        text,
    )

    def validation(axis: Any) -> None:
        for curve in curves:
            style: dict[str, Any] = {"ls": "--" if curve.name[:3] in {"HOA", "fix"} else "-"}
            if "shared" in curve.name:
                style = {"color": "black", "ls": ":"}
            axis.plot(curve.cost, curve.loss, lw=1.1, label=curve.name, **style)
        axis.set(xlabel="cost", ylabel="validation CE", title="tuned")
        axis.legend(fontsize=6)

    def picture(axis: Any) -> None:
        result = curves[3].result
        assert result is not None
        theta = result.hparams["theta"].reshape(12, 12, 10).permute(2, 0, 1)
        tiles = F.pad(theta, (0, 1, 0, 1), value=float(theta.min()))
        grid = tiles.reshape(2, 5, 13, 13).permute(0, 2, 1, 3).reshape(26, 65)
        axis.imshow(grid, cmap="viridis")
        axis.set_axis_off()
        axis.set_title("learned log penalties, digits 0-9")

    plot("maid_mnist.png", [validation, picture])


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)
