"""Five tasks in sequence, digits turned by 0 to 120 degrees, LoRA on a frozen base: kept by averages.


python -m benchmarks.core.coin_digits     # benchmarks/results/coin_digits.md and docs/figures/coin_digits.png
"""

# ruff: noqa: E501

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from scipy.ndimage import rotate
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.networks import MLP
from adapters.reparam import attach
from adapters.weights import LoRA
from bilevel.balanced_ema import BalancedEMA, Fixed, LiteralRule, Polynomial, Published, Rule
from bilevel.continual import continual_metrics

ROOT = Path(__file__).parents[2]
ANGLES = (0, 30, 60, 90, 120)
STREAMS = {"even": (700,) * 5, "uneven": (700, 120, 700, 120, 350)}
SEEDS = (0, 1, 2)

WAYS: dict[str, Callable[[], Rule | None]] = {
    "fine-tuning": lambda: None,
    "EMA 0.98": lambda: Fixed(0.98),
    "EMA 0.99": lambda: Fixed(0.99),
    "EMA 0.995": lambda: Fixed(0.995),
    "EMA 0.998": lambda: Fixed(0.998),
    "released, κ = 2": lambda: Published(2.0),
    "released, κ = 0.1": lambda: Published(0.1),
    "released, κ = 0.05": lambda: Published(0.05),
    "printed, λ = 1": lambda: LiteralRule(1.0),
    "polynomial 0.3/t": lambda: Polynomial(0.3),
    "polynomial 0.2/t": lambda: Polynomial(0.2),
}


def images() -> list[Tensor]:
    """The digits turned by each angle, flat, with a task token."""
    x = load_digits().images / 16.0
    turned = []
    for task, angle in enumerate(ANGLES):
        each = rotate(x, angle, axes=(1, 2), reshape=False, order=1).reshape(len(x), -1)
        token = torch.zeros(len(x), len(ANGLES))
        token[:, task] = 1.5
        turned.append(torch.cat([torch.tensor(each, dtype=torch.float32), token], dim=1))
    return turned


@dataclass
class Outcome:
    """Accuracies after each task, the share of fallbacks, and β of the first matrix by step."""

    accuracy: Tensor
    fallback: float
    trace: list[float]


def run(way: str, sizes: tuple[int, ...], seed: int, data: list[Tensor]) -> Outcome:
    """Train the sequence once."""
    y = torch.tensor(load_digits().target)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    train, test = order[:1100], order[1100:]
    torch.manual_seed(seed)
    model = MLP((64 + len(ANGLES),), 10, width=128)
    base = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(12 * 13):
        rows = train[torch.randint(400, (32,))]
        task = torch.randint(len(ANGLES), (32,))
        x = torch.stack([data[t][i] for t, i in zip(task.tolist(), rows.tolist(), strict=True)])
        base.zero_grad(), F.cross_entropy(model(x), y[rows]).backward(), base.step()
    attach(model, LoRA(8, scale=2.0))
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rule, rows_of, trace = WAYS[way](), [], []
    ema: BalancedEMA | None = None
    for task, size in enumerate(sizes):
        optimizer = torch.optim.AdamW(params.values(), lr=3e-3)
        own = train[400:][torch.randperm(700)[:size]]
        for _ in range(6):
            for rows in own[torch.randperm(size)].split(32):
                optimizer.zero_grad()
                F.cross_entropy(model(data[task][rows]), y[rows]).backward()
                optimizer.step()
                if ema is not None:
                    ema.update()
                    trace.append(next(iter(ema.stats().last.values())))
        if ema is not None:
            ema.end_task()
        elif rule is not None:
            ema = BalancedEMA(params, rule)
        rows_of.append(accuracies(model, data, y, test))
    stats = None if ema is None else ema.stats()
    share = 0.0 if stats is None or not stats.updates else stats.fallbacks / stats.updates
    return Outcome(torch.tensor(rows_of, dtype=torch.float64), share, trace)


@torch.no_grad()
def accuracies(model: nn.Module, data: list[Tensor], y: Tensor, test: Tensor) -> list[float]:
    """Accuracy on each task."""
    return [float((model(x[test]).argmax(1) == y[test]).double().mean()) for x in data]


def main() -> None:
    """Measure, write the table and draw."""
    torch.set_num_threads(1)
    data, lines, drawn = images(), [], {}
    points: dict[str, tuple[float, float]] = {}
    for way in WAYS:
        cells = [way]
        for stream, sizes in STREAMS.items():
            found = [run(way, sizes, seed, data) for seed in SEEDS]
            metrics = [continual_metrics(each.accuracy) for each in found]
            drawn[way, stream] = found[0].trace
            average = [100 * m.average for m in metrics]
            cells.append(
                f"{statistics.fmean(average):.1f} ± {statistics.stdev(average):.1f} / "
                f"{100 * statistics.fmean(m.forgetting for m in metrics):.1f} / "
                f"{100 * statistics.fmean(m.new for m in metrics):.1f}"
            )
            if stream == "even":
                new = 100 * statistics.fmean(m.new for m in metrics)
                points[way] = (new, statistics.fmean(average))
        cells.append(f"{100 * statistics.fmean(each.fallback for each in found):.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    head = f"""# Five tasks in sequence, kept by averages

`python -m benchmarks.core.coin_digits`: scikit-learn's digits turned by {", ".join(map(str, ANGLES))} degrees, one task after the
other; a task token beside the pixels. A perceptron 69-128-128-10 is trained on 400 images of all tasks and frozen; LoRA of
rank 8 on its three layers learns each task in 6 epochs by AdamW at 3e-3. From the second task on an average is kept and put
back at the end of each task. Streams: 700 images a task ("even"), or {", ".join(map(str, STREAMS["uneven"]))} ("uneven"). Test accuracy in %,
697 images: mean over the tasks at the end ± standard deviation over seeds {SEEDS[0]}–{SEEDS[-1]} / forgetting / accuracy just after a task.
torch {torch.__version__}, one thread.

| way | even | uneven | fallbacks |
| --- | ---: | ---: | ---: |
"""
    (ROOT / "benchmarks" / "results" / "coin_digits.md").write_text(head + "\n".join(lines) + "\n")
    draw(points, drawn)


def draw(
    points: dict[str, tuple[float, float]], traces: dict[tuple[str, str], list[float]]
) -> None:
    """The trade-off of the even stream, and 1 − β over steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    markers = "osD^v<>PX*p"
    for marker, (way, (new, average)) in zip(markers, points.items(), strict=True):
        left.plot(new, average, marker, ms=8, ls="", label=way)
    left.set(xlabel="accuracy just after a task, %", ylabel="accuracy on all tasks at the end, %")
    left.legend(fontsize=7)
    for way in ("released, κ = 2", "released, κ = 0.1", "printed, λ = 1", "polynomial 0.2/t"):
        trace = [max(1e-5, 1 - beta) for beta in traces[way, "even"]]
        right.semilogy(trace, lw=0.8, label=way)
    right.set(xlabel="step from the second task on", ylabel="weight 1 − β of the new value")
    right.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "coin_digits.png", dpi=130)


if __name__ == "__main__":
    main()
