"""The page and the figures of the compander's study, from its json files."""

# ruff: noqa: E501

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.self_tuning.report import figure, mean, table, write

__all__ = ["main"]

TITLES = {
    "digits": "Digits, right labels",
    "digits-train": "Digits, 30 % wrong training labels, right validation labels",
    "digits-all": "Digits, 30 % wrong labels in training and validation",
    "fashion-all": "Fashion, 30 % wrong labels in training and validation",
}
COLORS = {"plain": "#555555", "training": "#d62728", "validation": "#1f77b4", "fixed": "#2ca02c"}
LEARNED, TUNED = "learned on training loss, per layer, part", "a, γ by unrolled, part"
TAILS = {
    "plain": "plain, part",
    "a = 2s, γ = 2": "a = 2s, γ = 2, part",
    "a = s, γ = 2": "a = s, γ = 2, part",
    "learned on training loss": LEARNED,
    "tuned on validation loss": TUNED,
}

Seeds = list[dict[str, Any]]


def main(folder: Path) -> None:
    """Write everything that the cases there allow."""
    cases = {}
    for name in TITLES:
        path = folder / f"{name}.json"
        if path.exists():
            cases[name] = json.loads(path.read_text())
    parts = [section(name, case) for name, case in cases.items()]
    shown = "digits-all"
    write(
        "compander",
        f"""# Weight compander

Commands: `python -m benchmarks.core.compander run CASE` and `python -m benchmarks.core.compander page`, torch {cases[shown]["conditions"]["torch"]}, one thread.

Every arm has the same 200 labels (Fashion: 500): "part" trains on 150 (375) of them and validates on 50 (125), "all" trains on all of them, "then all"
trains anew on all of them with what was chosen on the part. Every arm has the same initial weights (He), the same order of
batches of 50, 600 steps of SGD with momentum 0.9 and a cosine schedule from 0.02; perceptrons 64-256-256-10 (Fashion: 784-128-128-10), no weight
decay but where stated. Hypergradients: 60 plain steps, then one step of Adam at 0.05 on the bounded logarithms for each five
training steps; "first order" is ∂F/∂h, "one step" T1–T2, "unrolled" through five steps, "implicit" ten Neumann terms. Decay by grid: λ ∈
{{3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 9e-2}}; a, γ by grid: {{0.5, 1, 2}} s × {{1, 2, 4}}; chosen by the validation loss at the end of training. Each grid is 6 or 9
runs, each hypergradient arm one. Test accuracy and test cross entropy, mean ± standard deviation over five draws of data, labels and weights;
"difference" is the paired difference of accuracy from "plain, all", the fair comparison; "stopped" is the accuracy where the validation loss of the run was lowest (for arms trained on all
labels that set is part of training, so there is no such column).

{chr(10).join(parts)}
## Distributions of weights

{distributions(cases[shown])}
""",
    )
    pictures(cases[shown])


def section(name: str, case: dict[str, Any]) -> str:
    """Return the table of a case."""
    seeds: Seeds = case["seeds"]
    reference = [seed["plain, all"]["accuracy"] for seed in seeds]
    rows = []
    for arm in sorted(seeds[0], key=lambda a: (not a.startswith("plain"), "learned" in a)):
        runs = [seed[arm] for seed in seeds]
        paired = [r["accuracy"] - q for r, q in zip(runs, reference, strict=True)]
        stopped = "–"
        if arm.endswith("part"):
            stopped = mean([r["stopped"][0] for r in runs], 3)
        rows.append(
            [
                arm,
                mean([r["accuracy"] for r in runs], 3),
                ""
                if arm == "plain, all"
                else f"{statistics.mean(paired):+.3f} ± {statistics.stdev(paired):.3f}",
                mean([r["loss"] for r in runs], 2),
                stopped,
                values(runs, "gamma") if not arm.startswith(("plain", "decay")) else "–",
                values(runs, "amplitude") if not arm.startswith(("plain", "decay")) else "–",
            ]
        )
    header = ["arm", "accuracy", "difference", "loss", "stopped", "γ by layer", "a/s by layer"]
    return f"## {TITLES[name]}\n\n{table(header, rows)}\n"


def values(runs: list[dict[str, Any]], name: str) -> str:
    """Return means over seeds of the values of each layer."""
    layers = zip(*(r["hparams"][name] for r in runs), strict=True)
    return ", ".join(f"{statistics.mean(layer):.2f}" for layer in layers)


def distributions(case: dict[str, Any]) -> str:
    """Return the table of distributions by layer, means over seeds."""
    rows = []
    for title, arm in TAILS.items():
        for layer in range(3):
            cells = [
                mean([seed[arm]["weights"][layer][key] for seed in case["seeds"]], 3)
                for key in ("kurtosis", "tail", "near_zero")
            ]
            rows.append([f"{title}, layer {layer + 1}", *cells])
    text = (
        "Digits, wrong labels in training and validation, at the end of training. Excess kurtosis (normal 0, uniform −1.2, two "
        "values −2), largest |w| in standard deviations, share of |w| below a tenth of one.\n\n"
    )
    return text + table(["weights", "kurtosis", "tail", "near zero"], rows)


def pictures(case: dict[str, Any]) -> None:
    """Draw distributions, slopes over training, and the test loss."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seeds: Seeds = case["seeds"]
    colors = dict(zip(TAILS, ("#555555", "#98df8a", "#2ca02c", "#d62728", "#1f77b4"), strict=True))
    drawn, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.8))
    centers = [-4 + 0.05 + 0.1 * i for i in range(80)]
    for title, arm in TAILS.items():
        curves = zip(*(seed[arm]["second"] for seed in seeds), strict=True)
        left.plot(centers, [statistics.mean(c) for c in curves], color=colors[title], label=title)
        for axis, key in ((middle, "kurtosis"), (right, "near_zero")):
            each = [[seed[arm]["weights"][i][key] for seed in seeds] for i in range(3)]
            axis.errorbar(
                [1, 2, 3], [statistics.mean(e) for e in each], [statistics.stdev(e) for e in each],
                color=colors[title], marker="o", capsize=3,
            )  # fmt: skip
    left.set(xlabel="weight of layer 2 / standard deviation", ylabel="density")
    left.set_ylim(0, 1.6 * left.get_ylim()[1])
    left.legend(fontsize=8, loc="upper left")
    middle.axhline(0, color="#bbbbbb", lw=0.8)
    middle.set(xlabel="layer", ylabel="excess kurtosis (normal: 0)", xticks=[1, 2, 3])
    right.set(xlabel="layer", ylabel="share of |w| below a tenth of a deviation", xticks=[1, 2, 3])
    drawn.tight_layout()
    drawn.savefig(figure("compander_weights"), dpi=120)

    drawn, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for title, arm, color in (
        ("learned on training loss", LEARNED, COLORS["training"]),
        ("tuned on validation loss", TUNED, COLORS["validation"]),
        ("fixed a = 2s, γ = 2", "a = 2s, γ = 2, part", COLORS["fixed"]),
        ("plain", "plain, part", COLORS["plain"]),
    ):
        paths = [seed[arm]["path"] for seed in seeds]
        steps = [[look[0] for look in path] for path in paths]
        losses = list(zip(*([look[2] for look in path] for path in paths), strict=True))
        center = [statistics.mean(c) for c in losses]
        spread = [statistics.stdev(c) for c in losses]
        right.plot(steps[0], center, color=color, label=title)
        low, high = ([c + s * d for c, d in zip(center, spread, strict=True)] for s in (-1, 1))
        right.fill_between(steps[0], low, high, color=color, alpha=0.15, lw=0)
        if arm in (LEARNED, TUNED):
            for layer, style in enumerate(("-", "--", ":")):
                slopes = zip(*([look[1][layer] for look in path] for path in paths), strict=True)
                left.plot(
                    steps[0], [statistics.mean(s) for s in slopes], style, color=color,
                    label=f"{title}, layer {layer + 1}",
                )  # fmt: skip
    left.set(xlabel="training step", ylabel="slope γ (mean of seeds)", yscale="log")
    left.set_yticks([0.5, 1, 2, 4, 8], ["0.5", "1", "2", "4", "8"])
    left.minorticks_off()
    left.set_ylim(0.5, 12)
    left.legend(fontsize=7, loc="upper left", ncol=2)
    right.set(xlabel="training step", ylabel="test cross entropy")
    right.set_ylim(0, 1.4 * right.get_ylim()[1])
    right.legend(fontsize=8, loc="upper left")
    drawn.tight_layout()
    drawn.savefig(figure("compander"), dpi=120)
