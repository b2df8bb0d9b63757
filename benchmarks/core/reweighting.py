"""Weights from losses and learned ones: redundant rows, wrong labels, a corpus.

python -m benchmarks.core.reweighting [rows] [images] [language]   # all without a name

Parts are kept in benchmarks/results/reweighting.json, from which benchmarks/results/reweighting.md is
written; "language" draws docs/figures/reweighting.png.
"""

# ruff: noqa: E501

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from adapters import tasks
from benchmarks.core.reweighting_data import (
    RULES,
    STRATEGIES,
    classify,
    corpus,
    learned,
    read,
    regression,
)

ROOT = Path(__file__).parents[2]
SEEDS, READERS, STEPS, READING = range(5), range(3), 300, 200
IMAGES = {
    "digits": {"n_train": 400, "n_val": 100},
    "mnist": {"n_train": 1000, "n_val": 100},
}
KINDS = ("clean", "duplicated", "corrupted")


def spread(values: list[float], digits: int = 3) -> str:
    """Return mean ± standard deviation."""
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def redundant_rows() -> dict[str, Any]:
    """Errors of linear regression after 50, 200 and 400 steps, 20 seeds."""
    return {
        strategy: {
            f"{'wrong' if wrong else 'right'} {steps}": [
                regression(strategy, wrong, seed, steps) for seed in range(20)
            ]
            for wrong in (False, True)
            for steps in (50, 200, 400)
        }
        for strategy in STRATEGIES
    }


def wrong_labels() -> dict[str, Any]:
    """Accuracies and the weight on wrong labels, by data set, noise and way."""
    found: dict[str, Any] = {}
    for name, sizes in IMAGES.items():
        for noise in (0.0, 0.3):
            cell: dict[str, Any] = {}
            for seed in SEEDS:
                task = tasks.get(name, noise=noise, seed=seed, **sizes)
                runs = {way: classify(task, rule, seed, STEPS) for way, rule in RULES.items()}
                runs["uniform, validation samples too"] = classify(
                    task, RULES["uniform"], seed, STEPS, trusted=True
                )
                runs["learned weights"] = learned(task, seed, STEPS)
                for way, (accuracy, share) in runs.items():
                    cell.setdefault(way, []).append([accuracy, share])
            found[f"{name} {noise:.0%}"] = cell
            print(name, noise, {w: spread([a for a, _ in v]) for w, v in cell.items()}, flush=True)
    return found


def language() -> tuple[dict[str, Any], dict[str, Any]]:
    """Held-out losses by corpus and way, and what is drawn (seed 0)."""
    found: dict[str, Any] = {}
    drawn: dict[str, Any] = {}
    for kind in KINDS:
        cell: dict[str, Any] = {}
        for seed in READERS:
            task, bad = corpus(kind, seed)
            for way, rule in RULES.items():
                if kind == "clean" and way == "oracle":
                    continue  # there it is uniform
                loss, shares, last = read(task, bad, rule, seed, READING)
                cell.setdefault(way, []).append([loss, statistics.fmean(shares[-50:])])
                if seed == 0:
                    drawn[f"{kind} {way}"] = (shares, last)
        found[kind] = cell
        print(kind, {w: spread([a for a, _ in v]) for w, v in cell.items()}, flush=True)
    return found, drawn


def tables(found: dict[str, Any]) -> str:
    """Return the page, without the parts that were not measured."""
    pages = {"rows": rows_table, "images": images_table, "language": language_table}
    lines = [
        "# Weights from losses, and learned ones",
        "",
        f"`python -m benchmarks.core.reweighting`, torch {torch.__version__}, one thread. Where not said otherwise r = 0.4 after 30",
        "steps at r = 100. Nothing was tuned but the learned weights, and those on validation samples; a look at test figures of an",
        "earlier run (rows, and digits with other steps of burn-in) came before these settings. ± is the standard deviation over",
        'seeds. "plain min-max": w ∝ (ℓ − min)/(max − min); "oracle": uniform over what is right, told which.',
    ]
    for part, table in pages.items():
        if part in found:
            lines += ["", *table(found[part])]
    return "\n".join(lines) + "\n"


def rows_table(rows: dict[str, Any]) -> list[str]:
    """Linear regression."""
    lines = [
        "## Linear regression with redundant rows",
        "",
        "1,000 rows of 10 features, 800 of them near-copies of one; batches of 64, learning rate 0.05, no burn-in. Median test error",
        "after 50, 200 and 400 steps (quartiles after 50), 20 seeds; wrong labels: 5 % of all, in the rows that are no copies.",
        "",
        "| strategy | 50 | 200 | 400 | wrong, 50 | 200 | 400 |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for way, cells in rows.items():
        shown = []
        for name, values in cells.items():
            low, middle, high = statistics.quantiles(values, n=4)
            shown.append(
                f"{middle:.3g}" + (f" ({low:.3g}–{high:.3g})" if name.endswith(" 50") else "")
            )
        lines.append(f"| {way} | " + " | ".join(shown) + " |")
    return lines


def images_table(images: dict[str, Any]) -> list[str]:
    """Digits and MNIST."""
    lines = [
        "## Images with wrong labels",
        "",
        f"A perceptron 64-64 (tanh), {STEPS} steps of 64 by SGD at 0.05 with momentum 0.9, weight decay 1e-4. Digits: 400 training",
        f"samples; MNIST: 1,000. Test accuracy, {len(SEEDS)} seeds / share of the weight that wrong labels have in the last 50 steps (in the",
        "end, for learned weights). Learned weights see 100 validation samples with right labels besides, tuned by",
        f"`Descent(Unrolled(steps=5), lr=0.1)` with a budget of {STEPS} training steps; the row above them trains on the same samples.",
        "",
        "| weights | " + " | ".join(f"{name.replace('%', ' %')} wrong" for name in images) + " |",
        "| --- |" + " ---: |" * len(images),
    ]
    for way in next(iter(images.values())):
        shown = [
            spread([a for a, _ in cell[way]])
            + (f" / {statistics.fmean(s for _, s in cell[way]):.2f}" if " 30" in name else "")
            for name, cell in images.items()
        ]
        lines.append(f"| {way} | " + " | ".join(shown) + " |")
    return lines


def language_table(texts: dict[str, Any]) -> list[str]:
    """The corpora."""
    lines = [
        "## Language modeling",
        "",
        "Characters of tinyshakespeare, 4,000 training windows of 48, two causal convolutions of 96 channels, "
        f"{READING} steps of 32 by Adam at 5e-3",
        "(cosine). Duplicated: 60 % of the windows are copies of 40 of them; corrupted: 30 % are random characters. Nats a character",
        f"on 800 held-out windows, {len(READERS)} seeds / share of the weight on the copies or the noise in the last 50 steps. The oracle",
        "leaves the copies or the noise out. Learned weights were not run here.",
        "",
        "| weights | " + " | ".join(KINDS) + " |",
        "| --- |" + " ---: |" * len(KINDS),
    ]
    for way in RULES:
        shown = [
            "as uniform"
            if way not in texts[kind]
            else spread([a for a, _ in texts[kind][way]])
            + (
                ""
                if kind == "clean"
                else f" / {statistics.fmean(s for _, s in texts[kind][way]):.2f}"
            )
            for kind in KINDS
        ]
        lines.append(f"| {way} | " + " | ".join(shown) + " |")
    return lines


def draw(drawn: dict[str, Any]) -> None:
    """Weight against loss in a last batch, and the weight of what was replaced over time."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8))
    for way in (*STRATEGIES, "plain min-max"):
        losses, weights = drawn[f"corrupted {way}"][1]
        order = losses.argsort()
        axes[0].plot(losses[order], len(losses) * weights[order], ".-", ms=4, lw=0.8, label=way)
        for axis, kind in zip(axes[1:], ("duplicated", "corrupted"), strict=True):
            shares = torch.tensor(drawn[f"{kind} {way}"][0])
            axis.plot(torch.arange(24, len(shares)), shares.unfold(0, 25, 1).mean(1), label=way)
    axes[0].set(
        xlabel="loss of a window, nats", ylabel="batch size × weight", title="corrupted, last batch"
    )
    axes[1].set(xlabel="step", ylabel="weight on the copies", title="duplicated")
    axes[2].set(xlabel="step", ylabel="weight on the noise", title="corrupted")
    lines, names = axes[0].get_legend_handles_labels()
    figure.legend(lines, names, loc="upper center", ncols=len(names), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(ROOT / "docs" / "figures" / "reweighting.png", dpi=110)


def main() -> None:
    """Measure the parts that are named, write the page from all there are, and draw."""
    torch.set_num_threads(1)
    kept = ROOT / "benchmarks" / "results" / "reweighting.json"
    parts = sys.argv[1:] or ["rows", "images", "language"]
    for part in parts:
        if part == "language":
            found, drawn = language()
            draw(drawn)
        else:
            found = {"rows": redundant_rows, "images": wrong_labels}[part]()
        everything = json.loads(kept.read_text()) if kept.exists() else {}
        kept.write_text(json.dumps({**everything, part: found}, indent=1) + "\n")
    page = tables(json.loads(kept.read_text()))
    kept.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()
