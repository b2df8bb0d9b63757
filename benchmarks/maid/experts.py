"""Field of experts denoising of natural images, against TV and HOAG; images apart.

    BILEVEL_DATA=... OMP_NUM_THREADS=1 python benchmarks/maid/experts.py [cost [arm ...]]

Arms are numbers from 0; all by default.  48 filters 7×7 with weights, smoothings and a scale,
d = 2,449, float32, σ = 0.1.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from common import FIGURES, Curve, data, plot, run, table, write
from torch import Tensor

from bilevel.inexact import (
    FISTA,
    HOAG,
    ISGD,
    MAID,
    SmoothInner,
    field_of_experts,
    psnr,
    tv_denoising,
)
from bilevel.inexact.charts import Chart
from bilevel.inexact.level import Level
from bilevel.single_loop import Decay

TRAIN = ["camera", "coffee", "astronaut", "china", "islp_hawk_0", "brick", "coins", "islp_hawk_2"]
VAL = ["chelsea", "rocket", "islp_huey_0", "gravel"]
TEST = ["flower", "islp_kitty", "islp_weaver_0", "retina", "grass", "hubble_deep_field"]
SIGMA = 0.1
INIT = (-2.0, -3.0, -3.5)


def stack(names: list[str], size: int, seed: int) -> dict[str, Tensor]:
    """Central crops and their noise."""
    archive = np.load(data("natural_images", "natural_gray_256.npz"))
    index = [list(archive["names"]).index(name) for name in names]
    low = (256 - size) // 2
    clean = torch.from_numpy(archive["images"][index, low : low + size, low : low + size]) / 255.0
    generator = torch.Generator().manual_seed(seed)
    return {"clean": clean, "noisy": clean + SIGMA * torch.randn(clean.shape, generator=generator)}


def denoise(make: Any, hparams: dict[str, Tensor], images: dict[str, Tensor]) -> Tensor:
    """Solve the lower level at given hyperparameters, each image to a distance of 0.05."""
    inner: SmoothInner = make(images)
    inner.set_hparams(hparams)
    chart = Chart.of(inner.space, "unconstrained", inner.hparams)
    level = Level(inner, chart, images, images)
    theta = chart.theta(inner.hparams)
    constants, _ = inner.smoothness.at(level, level.start, theta, {})
    solved = FISTA().solve(level, level.start, theta, constants, 0.05, 5000)
    return solved.x.reshape(images["clean"].shape)


def main(cost: int, chosen: list[int]) -> None:
    torch.set_num_threads(1)
    train, val, test = stack(TRAIN, 48, 0), stack(VAL, 64, 1), stack(TEST, 128, 2)

    def experts(images: dict[str, Tensor]) -> SmoothInner:
        return field_of_experts(images, init=INIT)

    off: dict[str, Any] = {"descent_test": "off", "lam": 1e-4, "eta": 0.01}
    fast = {"barzilai_borwein": True, "nonmonotone": 0.85}
    adam: dict[str, Any] = {"batch": 2, "optimizer": torch.optim.Adam}
    arms: list[tuple[str, Any, Any]] = [
        ("TV, MAID", tv_denoising, MAID(eps=0.1, tolerance=1e-3, **off, **fast)),
        ("FoE, MAID off, ε₀ = 1", experts, MAID(eps=1.0, **off)),
        ("FoE, MAID off, BB + nonmonotone, ε₀ = 1", experts, MAID(eps=1.0, **off, **fast)),
        ("FoE, MAID off, BB + nonmonotone, ε₀ = 0.01", experts, MAID(eps=0.01, **off, **fast)),
        ("FoE, HOAG k^-2", experts, HOAG(schedule=Decay(1.0, 2.0))),
        ("FoE, ISGD, batch 2, Adam", experts,
         ISGD(alpha=0.05, accuracy=Decay(1.0, 0.25), **adam)),
    ]  # fmt: skip
    arms = [arms[i] for i in chosen] or arms
    curves: list[Curve] = []
    rows: list[list[Any]] = []
    shown: dict[str, Tensor] = {"clean": test["clean"], "noisy": test["noisy"]}
    rows.append(["noisy image", "-", *(f"{psnr(s['noisy'], s['clean']):.2f}"
                                       for s in (train, val, test)), "-", "-", "-"])  # fmt: skip
    for name, make, algorithm in arms:
        curve = run(name, lambda make=make: make(train), algorithm, cost)
        curves.append(curve)
        assert curve.result is not None
        found = [denoise(make, curve.result.hparams, s) for s in (train, val, test)]
        shown[name] = found[2]
        numbers = [
            f"{psnr(x, s['clean']):.2f}" for x, s in zip(found, (train, val, test), strict=True)
        ]
        rows.append([
            name, curve.loss[-1], *numbers, len(curve.cost), f"{curve.eps[-1]:.1e}",
            f"{curve.seconds:.0f}",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    text = (
        f"Hyperparameters learned on 8 crops 48×48, chosen by nothing else; validation 4 crops "
        f"64×64, test 6 crops 128×128 of other photographs; σ = {SIGMA}, float32, cost {cost}. "
        "PSNR in dB with every image solved to a distance of 0.05. Loss: mean of "
        "½‖x̃ - clean‖² on the training crops at the run's accuracy.\n\n"
        + table(
            ["arm", "train loss", "PSNR train", "PSNR val", "PSNR test", "steps", "last ε", "s"],
            rows,
        )
    )  # fmt: skip
    title = "MAID: field of experts on natural images"
    name = "_".join(["maid_experts", *map(str, [cost] if chosen else [])])
    write(name, title, " ".join(["python benchmarks/maid/experts.py", *map(str, [cost, *chosen])]),
          text)  # fmt: skip

    def losses(axis: Any) -> None:
        for curve in curves[1:]:
            axis.plot(curve.cost, curve.loss, lw=1.1, label=curve.name)
        axis.axhline(curves[0].loss[-1], color="k", ls=":", label="TV, MAID")
        low = min(min(curve.loss) for curve in curves)
        axis.set(
            xlabel="cost", ylabel="training loss", xscale="log", yscale="log",
            ylim=(0.95 * low, 5 * low), title="field of experts",
        )  # fmt: skip
        axis.legend(fontsize=6, loc="lower left")

    def filters(axis: Any) -> None:
        result = min(curves[1:], key=lambda c: c.loss[-1]).result
        assert result is not None
        learned = result.hparams["filters"]
        strength = (result.hparams["weights"] - result.hparams["smoothings"]).exp()
        order = (strength * learned.flatten(1).norm(dim=1)).argsort(descending=True)
        tiles = learned[order] / learned[order].abs().amax((1, 2), keepdim=True)
        grid = torch.nn.functional.pad(tiles, (0, 1, 0, 1), value=1.0)
        picture = grid.reshape(6, 8, 8, 8).permute(0, 2, 1, 3).reshape(48, 64)
        axis.imshow(picture, cmap="gray")
        axis.set_axis_off()
        axis.set_title("learned filters, strongest first")

    plot(f"{name}.png", [losses, filters])
    pictures(shown, test)


def pictures(shown: dict[str, Tensor], test: dict[str, Tensor]) -> None:
    """Write the test images as a grid: clean, noisy, TV, FoE."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    columns = [k for k in shown if k in {"clean", "noisy", "TV, MAID"} or "ε₀ = 1" in k]
    rows = [0, 1, 2]
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=(2.3 * len(columns), 7.4), constrained_layout=True
    )
    for i, row in enumerate(rows):
        for axis, name in zip(axes[i], columns, strict=True):
            axis.imshow(shown[name][row], cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
            value = psnr(shown[name][row : row + 1], test["clean"][row : row + 1])
            label = name if name == "clean" else f"{name.split(', ε₀')[0]}\n{value:.2f} dB"
            axis.set_title(label, fontsize=7)
    figure.savefig(FIGURES / "maid_denoising.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    given = [int(v) for v in sys.argv[1:]]
    main(given[0] if given else 8000, given[1:])
