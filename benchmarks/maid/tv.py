"""E1: total variation denoising of four 32×32 crops; every first accuracy meets.

    OMP_NUM_THREADS=1 python benchmarks/maid/tv.py [cost]

Weight and smoothing of smoothed TV, σ = 0.1, θ₀ = (-5, -5), on crops of scikit-learn's china.jpg,
averaged over 4×4 pixels.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from common import plot, run, table, write
from torch import Tensor

from bilevel.inexact import HOAG, MAID, FixedAccuracy, Geometric, SmoothInner, psnr, tv_denoising
from bilevel.single_loop import Decay


def crops() -> dict[str, Tensor]:
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).double() / 255
    gray = photo @ torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)
    small = torch.nn.functional.avg_pool2d(gray[None, None, :424, :640], 4)[0, 0]
    corners = [(20, 10), (20, 60), (50, 30), (60, 110)]
    clean = torch.stack([small[i : i + 32, j : j + 32] for i, j in corners])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    return {"clean": clean, "noisy": clean + 0.1 * noise}


def main(cost: int) -> None:
    torch.set_num_threads(1)
    images = crops()

    def make() -> SmoothInner:
        return tv_denoising(images)

    shared: dict[str, Any] = {"alpha": 0.01, "lam": 1e-4}
    fast: dict[str, Any] = {"barzilai_borwein": True, "nonmonotone": 0.85, **shared}
    arms: list[tuple[str, Any]] = [
        *((f"MAID off, ε₀ = {e:g}", MAID(descent_test="off", eps=e, eta=0.01, **shared))
          for e in (10.0, 0.1, 1e-5)),
        *((f"MAID estimate, ε₀ = {e:g}", MAID(descent_test="estimate", eps=e, eta=0.01, **shared))
          for e in (0.1, 1e-3)),
        *((f"MAID certified, ε₀ = {e:g}", MAID(eps=e, eta=0.01, **shared)) for e in (0.1, 1e-3)),
        ("MAID off, BB + nonmonotone, ε₀ = 0.1",
         MAID(descent_test="off", eps=0.1, eta=0.01, **fast)),
        *((f"fixed ε = {e:g}", FixedAccuracy(eps=e, **shared)) for e in (0.1, 1e-3, 1e-5)),
        ("HOAG 0.9^k", HOAG(schedule=Geometric(0.1, 0.9))),
        ("HOAG k^-2", HOAG(schedule=Decay(0.1, 2.0))),
        ("HOAG k^-3", HOAG(schedule=Decay(0.1, 3.0))),
    ]  # fmt: skip
    curves = [run(name, make, algorithm, cost) for name, algorithm in arms]
    points = [500, 1500, 3000, cost]
    rows = []
    for curve in curves:
        assert curve.result is not None
        final = psnr(curve.result.params["x"], images["clean"])
        certified = curve.result.trace[-1]["certified"] == 1.0
        accepted = sum(float(r.get("accepted", 1.0)) for r in curve.result.trace)
        rows.append([
            curve.name, *(curve.at(p) for p in points), f"{final:.2f}", int(accepted),
            f"{curve.eps[-1]:.1e}", "yes" if certified else "no", f"{curve.seconds:.0f}",
        ])  # fmt: skip
    noisy = psnr(images["noisy"], images["clean"])
    text = (
        f"Four 32×32 crops, noisy PSNR {noisy:.2f} dB. MAID and fixed accuracy: α₀ = 0.01, "
        "ρ = ν = ½, ν̄ = 1.05, λ = 1e-4, η = 0.01. Loss: mean of ½‖x̃ - clean‖² at the cost.\n\n"
        + table(
            ["arm", *(f"loss at {p}" for p in points), "PSNR", "steps", "last ε", "certified", "s"],
            rows,
        )
    )
    write("maid_tv", "MAID: TV denoising of crops", f"python benchmarks/maid/tv.py {cost}", text)
    shown = [c for c in curves if "estimate" not in c.name]

    def losses(axis: Any) -> None:
        for curve in shown:
            style = "-" if curve.name.startswith("MAID") else "--"
            axis.plot(curve.cost, curve.loss, style, label=curve.name, lw=1.2)
        axis.set(
            xlabel="cost", ylabel="loss", xscale="log", yscale="log", title="loss at equal cost"
        )
        axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))

    def accuracies(axis: Any) -> None:
        for curve in shown:
            if curve.name.startswith("MAID"):
                axis.plot(curve.eps, lw=1.0, label=curve.name)
        axis.set(xlabel="outer step", ylabel="ε", yscale="log", title="ε finds its level")
        axis.legend(fontsize=6, loc="lower left")

    plot("maid_tv.png", [losses, accuracies], width=6.5)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000)
