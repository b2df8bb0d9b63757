"""The page and the picture of the selection of modules, from benchmarks/results/diffora.json."""

# ruff: noqa: E501

from __future__ import annotations

import itertools
import statistics
from pathlib import Path
from typing import Any

import torch

__all__ = ["draw", "page"]

ROOT = Path(__file__).parents[2]
NAMES = {
    "rotated": "digits, turned",
    "shifted": "digits, other classes",
    "stories": "stories260K to Shakespeare",
}
TITLES = {
    "rotated": """## A digits transformer turned by 90 degrees

A vision transformer (16 patches of 2×2, width 32, three layers, four heads; modules q, k, v, o, f1, f2 of each) is trained on 600
upright digits, frozen, and adapted to 300 turned ones (`digits_rotated`); 200 validation and 399 test images. Search: 100 steps of
32; adaptation: 200 steps of 32, the better rate of 5e-3 and 1.5e-2 by validation loss. Test accuracy in %.""",
    "shifted": """## A digits transformer adapted to other classes

The same network, trained on the digits 0–4 and adapted with a new last layer to 100 images of 5–9 (`digits_transfer`); 200
validation and 596 test images. Search, adaptation and rates as above. Test accuracy in %.""",
    "stories": """## stories260K adapted to Shakespeare

The real 260,032-parameter Llama (5 layers; modules q, k, v, o, gate, up, down of each), trained on children's stories, adapted to
512 windows of 64 tokens of tinyshakespeare (`stories`); 128 validation and 384 test windows. Search: 100 steps of 8 windows;
adaptation: 120 steps of 8, the better rate of 5e-3 and 1.5e-2 by validation loss. Test loss in nats a token.""",
}


def page(stored: dict[str, Any]) -> str:
    """Return the page."""
    text = f"""# Selection of modules (DiffoRA)

`python -m benchmarks.core.diffora`; torch {stored["torch"]}, one thread.

## Planted

y = Σ_j x_j W_jᵀ over six groups of four features, with changes planted in two of the six modules and noise of 0.3; 150 training
and 150 validation samples, 120 steps of θ unless said, ρ = 1/3. Share of the planted modules that is found, mean of ten seeds;
by chance 0.33.

| search | over LoRA r2 | over HUT r2 |
| --- | ---: | ---: |
"""
    for way, recall in stored.get("planted", {}).items():
        text += f"| {way} | " + " | ".join(f"{v:.2f}" for v in recall.values()) + " |\n"
    text += """
## How the real cases are measured

LoRA of rank 6 at scale 2 on the chosen modules. ρ is a share of the *parameters* that rank 6 on all modules would have: modules
are taken by score while they fit, so that all rows but the first and the last train about as many; "K a row" takes ⌊ρN⌋, at least one, of
each layer instead. Search: Adam at 5e-3 on θ with one half of the training samples, at 2e-2 on α with the other, warm-up 20
steps; the chosen modules are adapted anew on all training samples by Adam with linear decay. Nothing is chosen on test samples
but the oracle's modules. Mean ± standard deviation over the seeds, of which each has its own split and draws (the pretrained
stories260K is one network); "random" pools several draws of each seed, and "less random" is the difference from the mean of
those draws, seed by seed. Stability: mean Jaccard index of the selections of two
seeds at ρ = 1/6, chance about 0.1.
"""
    for case, title in TITLES.items():
        if case in stored:
            text += f"\n{title}\n\n" + table(stored[case]["runs"], case)
    return text


def table(runs: list[dict[str, Any]], case: str) -> str:
    """Return the rows of a case."""
    seeds = sorted({run["seed"] for run in runs})
    head = f"| way ({len(seeds)} seeds) | numbers, ρ = 1/6 | ρ = 1/6 | less random | numbers, ρ = 1/2 | ρ = 1/2 | less random | stability |\n"
    lines = [head, "| --- |" + " ---: |" * 7 + "\n"]
    for way in dict.fromkeys(run["way"] for run in runs):
        mine = [run for run in runs if run["way"] == way]
        cells = [way]
        shares = list(dict.fromkeys(run["share"] for run in mine))
        for share in shares:
            at = [run for run in mine if run["share"] == share]
            cells.append(f"{statistics.fmean(run['parameters'] for run in at):,.0f}")
            cells.append(spread([value(run, case) for run in at], case))
            chance = [run for run in runs if (run["way"], run["share"]) == ("random", share)]
            if way == "random" or share is None:
                cells.append("")
                continue
            mean = {
                s: statistics.fmean(value(r, case) for r in chance if r["seed"] == s) for s in seeds
            }
            cells.append(spread([value(run, case) - mean[run["seed"]] for run in at], case, "+"))
        if shares == [None]:
            cells += ["", "", ""]
        chosen = [
            set(run["modules"]) for run in mine if run["share"] == shares[0] and "modules" in run
        ]
        jaccard = [len(a & b) / len(a | b) for a, b in itertools.combinations(chosen, 2)]
        cells.append(f"{statistics.fmean(jaccard):.2f}" if jaccard else "")
        lines.append("| " + " | ".join(cells) + " |\n")
    return "".join(lines)


def value(run: dict[str, Any], case: str) -> float:
    """What a case reports: the loss of language, else the accuracy in %."""
    return float(run["loss"] if case == "stories" else 100 * run["accuracy"])


def spread(values: list[float], case: str, sign: str = "") -> str:
    """Mean ± standard deviation."""
    digits = 3 if case == "stories" else 1
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def draw(stored: dict[str, Any]) -> None:
    """The gates of stories260K during the search, and what each way reaches at ρ = 1/6."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    history = stored["stories"]["history"]
    gates = torch.tensor(history["alpha"]).softmax(dim=2)
    labels = [name.rpartition(".")[2].removesuffix("_proj") for name in history["rows"][0]]
    moments = [0, len(gates) // 3, len(gates) - 1]
    figure = plt.figure(figsize=(12, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    axes = top.subplots(1, 3)
    for axis, moment in zip(axes, moments, strict=True):
        image = axis.imshow(gates[moment], vmin=0, vmax=float(gates.max()), cmap="viridis")
        axis.set_xticks(range(len(labels)), labels, fontsize=8)
        axis.set_yticks(range(len(gates[0])))
        axis.set_title(f"gates after {5 * (moment + 1)} steps of α", fontsize=9)
    axes[0].set_ylabel("layer of stories260K")
    for layer, row in enumerate(history["chosen"]):
        for module, kept in enumerate(row):
            if kept:
                box = plt.Rectangle(
                    (module - 0.48, layer - 0.48), 0.96, 0.96, fill=False, ec="r", lw=2
                )
                axes[-1].add_patch(box)
    axes[-1].set_title(axes[-1].get_title() + "; red: chosen at ρ = 1/6", fontsize=9)
    top.colorbar(image, ax=list(axes), shrink=0.8)
    panels = bottom.subplots(1, 3)
    for axis, case in zip(panels, NAMES, strict=True):
        bars(axis, [run for run in stored[case]["runs"] if run["share"]], case)
    figure.savefig(ROOT / "docs" / "figures" / "diffora.png", dpi=130)


def bars(axis: Any, runs: list[dict[str, Any]], case: str) -> None:
    """Mean and standard deviation of each way at the smallest share."""
    low = min(run["share"] for run in runs)
    at = [run for run in runs if run["share"] == low]
    ways = list(dict.fromkeys(run["way"] for run in at))
    for i, way in enumerate(reversed(ways)):
        values = [value(run, case) for run in at if run["way"] == way]
        color = "C0" if way.startswith("DiffoRA,") else "C7"
        axis.errorbar(
            statistics.fmean(values), i, xerr=statistics.stdev(values), fmt="o", color=color, ms=4
        )
    axis.set_yticks(range(len(ways)), list(reversed(ways)), fontsize=7)
    axis.set_xlabel(
        "test loss, nats a token" if case == "stories" else "test accuracy, %", fontsize=8
    )
    axis.set_title(f"{NAMES[case]}, ρ = 1/6", fontsize=9, loc="right")
    axis.grid(axis="x", alpha=0.3)
