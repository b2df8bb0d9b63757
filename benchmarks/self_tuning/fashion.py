"""Eleven regularizers and augmentations of a small CNN on Fashion-MNIST.

    BILEVEL_DATA=... OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.fashion [steps [seeds]]

1,000 training, 1,000 validation and 4,000 test images, downsampled to 14×14; two convolutions and
two linear layers; minibatches of 50, SGD 0.05 with momentum 0.9.  A dropout rate for each of three
layers, noise, brightness, contrast, shift in pixels (integer), number (integer) and side (integer)
of cutout holes, label smoothing, L2 penalty.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.self_tuning.report import figure, write
from benchmarks.self_tuning.search import compare, draw_schedules, losses_table
from bilevel import Grad, ModuleInner, SelfTuning, Space
from bilevel.self_tuning import cutout, noisy, smoothed_cross_entropy, squared_norm
from hypergrad import SGD

N_TRAIN, N_VAL, N_TEST = 1000, 1000, 4000
SPACE = Space(
    p1=Grad(0.05, low=0.0, high=0.9, doc="dropout of channels behind the first convolution"),
    p2=Grad(0.05, low=0.0, high=0.9, doc="dropout of channels behind the second convolution"),
    p3=Grad(0.05, low=0.0, high=0.9, doc="dropout of hidden units"),
    noise=Grad(0.05, low=0.0, high=1.0, doc="standard deviation of input noise"),
    brightness=Grad(0.05, low=0.0, high=0.5, doc="largest change of the mean"),
    contrast=Grad(0.05, low=0.0, high=0.5, doc="largest relative change of the deviation"),
    shift=Grad(1.0, low=0.0, high=4.0, doc="largest shift in pixels"),
    holes=Grad(1.0, low=0.0, high=4.0, doc="number of cutout holes"),
    length=Grad(2.0, low=0.0, high=8.0, doc="side of a cutout hole in pixels"),
    smoothing=Grad(0.02, low=0.0, high=0.5, doc="label smoothing"),
    decay=Grad(1e-4, low=1e-6, high=1e-1, scale="log", doc="L2 penalty"),
)
HIGH = {
    "p1": 0.4, "p2": 0.4, "p3": 0.5, "noise": 0.3, "brightness": 0.2, "contrast": 0.2,
    "shift": 2.0, "holes": 2.0, "length": 4.0, "smoothing": 0.2, "decay": 1e-3,
}  # fmt: skip


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout2d(0.1),
        nn.Flatten(), nn.Linear(288, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10),
    )  # fmt: skip


@lru_cache
def images() -> tuple[Tensor, Tensor]:
    folder = os.environ.get("BILEVEL_DATA")
    if folder is None:
        raise SystemExit("set BILEVEL_DATA to the folder that holds fashion_mnist/")
    with np.load(Path(folder) / "fashion_mnist" / "fashion_mnist_20k_10k.npz") as data:
        x, y = torch.from_numpy(data["x_train"]), torch.from_numpy(data["y_train"])
    x = F.avg_pool2d(x.float().view(-1, 1, 28, 28) / 255, 2)
    return (x - x.mean()) / x.std(), y.long()


def augmented(x: Tensor, values: Mapping[str, Any]) -> Tensor:
    def column(name: str) -> Tensor:
        found: Tensor = values[name].view(-1, 1, 1, 1)
        return found

    def uniform() -> Tensor:
        return 2 * torch.rand(len(x), 1, 1, 1) - 1

    x = x * (1 + column("contrast") * uniform()) + column("brightness") * uniform()
    x = _shifted(x, values["shift"])
    x = cutout(x, values["length"], values["holes"])
    return noisy(x, values["noise"])


def _shifted(x: Tensor, most: Tensor) -> Tensor:
    """Shift each image by whole pixels, at most `most` along each axis; zeros come in."""
    rows, _, height, width = x.shape
    padded = F.pad(x, [4] * 4)
    moves = ((2 * torch.rand(2, rows) - 1) * (most + 0.5)).round().clamp(-4, 4).long() + 4
    down = moves[0][:, None] + torch.arange(height)
    right = moves[1][:, None] + torch.arange(width)
    at = torch.arange(rows)[:, None, None]
    return padded[at, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)


def predict(module: nn.Module, values: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Tensor:
    x = augmented(batch["x"], values) if module.training else batch["x"]
    out: Tensor = module(x)
    return out


def cross_entropy(outputs: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch["y"], reduction="none")


def make(hparams: Mapping[str, Any], seed: int) -> ModuleInner:
    x, y = images()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed % 1000))
    cuts = [N_TRAIN, N_TRAIN + N_VAL, N_TRAIN + N_VAL + N_TEST]
    parts = [order[: cuts[0]], order[cuts[0] : cuts[1]], order[cuts[1] : cuts[2]]]
    train, val, test = ({"x": x[i], "y": y[i]} for i in parts)
    torch.manual_seed(seed)
    return ModuleInner(
        network(), SPACE, predict=predict, train=train, val=val, test=test, seed=seed,
        loss=lambda out, values, b: smoothed_cross_entropy(out, b["y"], values["smoothing"]),
        penalty=lambda module, values: values["decay"] * squared_norm(module),
        outer_loss=cross_entropy, batch_size=50, val_batch_size=200, hparams=hparams,
        dropout={"3": "p1", "7": "p2", "11": "p3"}, integers=["shift", "holes", "length"],
        optimizer=SGD(lr=0.05, momentum=0.9),
    )  # fmt: skip


def main(steps: int, seeds: int) -> None:
    torch.set_num_threads(1)
    algorithms = {
        title: SelfTuning(mode=mode, lr=0.03, sigma_lr=0.01, warmup=steps // 10, train_steps=5)
        for title, mode in (("STN", "stn"), ("Δ-STN", "delta"))
    }
    starts: dict[str, dict[str, float]] = {"": {}, " from high values": HIGH}
    found, results = compare(make, SPACE, algorithms, starts, steps, seeds)
    draw_schedules(results, SPACE, figure("stn_fashion"))
    write(
        "self_tuning_fashion",
        f"""# Regularizers and augmentations of a CNN on Fashion-MNIST

Command: `OMP_NUM_THREADS=1 python -m benchmarks.self_tuning.fashion {steps} {seeds}`.
torch {torch.__version__}, float32, one thread.
{" ".join((__doc__ or "").split("[seeds]]")[1].split())}
{seeds} seeds, {steps} steps for a self-tuned or single run; each search has {3 * steps} steps in
all, what a Δ-STN run costs; its first trial has the defaults. PBT is an own short implementation
(`search.population`). The lowest validation loss of 20 looks, and the test loss there.

{losses_table(found)}

Figure: `docs/figures/stn_fashion.png`.
""",
    )


if __name__ == "__main__":
    given = [int(v) for v in sys.argv[1:]]
    main(*(given + [2000, 3][len(given) :]))
