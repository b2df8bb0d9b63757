"""E3: the quadratic of the paper, with f in closed form.

    OMP_NUM_THREADS=1 python benchmarks/maid/quadratic.py [cost]

A_i ∈ R^{1000×10} with entries U(0, 1), 0.01 N(0, 1) noise in b, θ₀ = 1, x₀ = b's first rows.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import plot, run, table, write
from torch import Tensor

from bilevel.inexact import HOAG, MAID, FixedAccuracy, Geometric, SmoothInner, quadratic
from bilevel.single_loop import Decay


def main(cost: int) -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    A1, A2, A3 = uniform(1000, 10), uniform(1000, 10), uniform(1000, 10)
    x1, x2, theta = uniform(10), uniform(10), uniform(10)
    b1 = A1 @ x1 + 0.01 * normal(1000)
    b2 = A2 @ x2 + A3 @ theta + 0.01 * normal(1000)
    H, J = A2.T @ A2, A2.T @ A3
    M = A1 @ torch.linalg.solve(H, J)
    rest = A1 @ torch.linalg.solve(H, A2.T @ b2) - b1
    best = torch.linalg.lstsq(M, rest[:, None]).solution[:, 0]

    def f(at: Tensor) -> float:
        return float(0.5 * (rest - M @ at).square().sum())

    low, start = f(best), f(torch.ones(10).double())
    kappa = [float(torch.linalg.cond(m)) for m in (H, M.T @ M)]

    def make() -> SmoothInner:
        return quadratic(A1, b1, A2, A3, b2, x=x2)

    def look(inner: SmoothInner) -> float:
        return (f(inner.hparams["theta"]) - low) / (start - low)

    shared: dict[str, Any] = {"alpha": 0.01, "lam": 1e-4}
    grow: dict[str, Any] = {"eta": 0.01, "nu_bar": 1.25, **shared}
    fast: dict[str, Any] = {"barzilai_borwein": True, "nonmonotone": 0.85}
    arms = [
        *((f"MAID certified, ε₀ = {e:g}", MAID(eps=e, **grow))
          for e in (0.1, 1e-3, 1e-5)),
        *((f"MAID off, ε₀ = {e:g}", MAID(eps=e, descent_test="off", **grow))
          for e in (0.1, 1e-5)),
        *((f"MAID certified, BB + nonmonotone, ε₀ = {e:g}",
           MAID(eps=e, **fast, **grow)) for e in (0.1, 1e-5)),
        *((f"fixed ε = {e:g}", FixedAccuracy(eps=e, **shared)) for e in (0.1, 1e-3, 1e-5)),
        ("HOAG 0.9^k", HOAG(schedule=Geometric(0.1, 0.9))),
        ("HOAG k^-2", HOAG(schedule=Decay(0.1, 2.0))),
        ("HOAG k^-3", HOAG(schedule=Decay(0.1, 3.0))),
    ]  # fmt: skip
    curves = [run(name, make, algorithm, cost, look) for name, algorithm in arms]
    levels = (1e-1, 1e-2, 1e-3)
    rows = []
    for curve in curves:
        assert curve.result is not None
        reached = [curve.first_below(level) or "-" for level in levels]
        certified = "yes" if curve.result.trace[-1]["certified"] == 1.0 else "no"
        rows.append([curve.name, *reached, curve.loss[-1], f"{curve.eps[-1]:.1e}", certified,
                     f"{curve.seconds:.1f}"])  # fmt: skip
    text = (
        f"κ of the lower level {kappa[0]:.0f}, of the upper {kappa[1]:.1e}. Gap: "
        "(f(θ) - f*)/(f(θ₀) - f*) in closed form. "
        f"Cost to reach a gap, within {cost}:\n\n"
        + table(
            ["arm", *(f"gap {v:g}" for v in levels), "last gap", "last ε", "certified", "s"], rows
        )
    )
    write("maid_quadratic", "MAID: quadratic", "python benchmarks/maid/quadratic.py", text)

    def gaps(axis: Any) -> None:
        for curve in curves:
            style = "-" if curve.name.startswith("MAID") else "--"
            axis.plot(curve.cost, curve.loss, style, label=curve.name, lw=1.1)
        axis.set(xlabel="cost", ylabel="gap", xscale="log", yscale="log", title="true gap of f")
        axis.legend(fontsize=6)

    def accuracies(axis: Any) -> None:
        for curve in curves[:7]:
            axis.plot(curve.cost, curve.eps, lw=1.0, label=curve.name)
        axis.set(xlabel="cost", ylabel="ε", xscale="log", yscale="log", title="ε")

    plot("maid_quadratic.png", [gaps, accuracies], width=6.0)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5000)
