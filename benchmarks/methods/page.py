"""docs/methods.md from what was measured."""

# ruff: noqa: E501

from __future__ import annotations

import platform
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from adapters import registry

if TYPE_CHECKING:
    from benchmarks.methods.__main__ import Line

__all__ = ["page"]

NOTE = """
AdaLoRA prunes ranks inside the unrolled window, which a hypergradient does not see: its gradient runs can end badly.

With three to five hyperparameters, the learning rate among them, a search of 30 trials is the better way here. Windows of
ten steps favor small learning rates (short-horizon bias), and one run has one start; unrolling all 250 steps from the same
start for ten outer steps (`restart=True`) was no better on three of the methods. Hypergradients pay where hyperparameters are
many: the [README](../README.md) has thousands.
"""

HEAD = """\
# Methods

Every learner of the registry that fine-tunes a pretrained network, on one task: a perceptron 64-128-128-64-5 trained on
the digits 0–4 (`digits_transfer`) adapts its three hidden layers and a new last layer to the digits 5–9, by 250 steps of 32
of 100 samples. Written by `python -m benchmarks.methods`. {conditions}

The learning rate (1e-3, 3e-3, 1e-2 or 3e-2) is chosen by validation accuracy on seeds 0–2; everything else is at its
default. Mean ± standard deviation over the fresh seeds 5–14, each with its own split, networks and draws.

- **trained**: numbers that are trained, the last layer's 325 included; sparse methods count the tensors they choose from.
- **state**: bytes of the optimizer's state.
- **step**: CPU time of a step relative to full fine-tuning.
- **retention**: accuracy on the source with the source's last layer put back.
- **intruders**: singular vectors, of ten of each hidden weight, that no pretrained one resembles; see
  [weight adapters](weight-adapters.md#intruder-dimensions).

One task and one network size: the ranking is not a claim about large models. Differences below about 0.01 are noise.
Rows can be measured one by one (`--only`): those of adalora and sorsa are later than the others, so their step column, a ratio
to a time of another run, is not comparable.

| method | trained | state | step | lr | test accuracy | retention | intruders |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
"""

SEARCH = """
## Tuning each weight adapter

The smooth hyperparameters of each weight adapter, learning rate and decay among them, at equal cost on seeds 0–2: a random
search of 30 trials of 250 steps, the first at the defaults, against one run of 7,500 equivalent steps (gradients + 2 ·
Hessian-vector products) of `Descent(Unrolled(steps=10), lr=0.1)`, which keeps the network of its best validation loss. Test
loss in nats, chosen by validation loss.

| method | smooth | defaults | random search | gradient | gradient, accuracy |
| --- | ---: | ---: | ---: | ---: | ---: |
"""


def page(lines: Sequence[Line], searched: Sequence[dict[str, Any]]) -> str:
    """Return the page."""
    conditions = f"torch {torch.__version__}, Python {platform.python_version()}, one thread."
    full = next(line for line in lines if line.name == "finetune")
    rows = []
    for line in sorted(lines, key=lambda item: -statistics.fmean(item.accuracy)):
        cells = [
            f"[{line.name}](../{source(line.name)})",
            f"{line.trained:,}",
            f"{line.state:,}",
            f"{line.step_ms / full.step_ms:.2f}",
            f"{line.lr:g}",
            spread(line.accuracy),
            f"{statistics.fmean(line.retention):.3f}",
            f"{statistics.fmean(line.intruders):.1f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    more = []
    for each in searched:
        cells = [
            each["name"],
            str(each["smooth"]),
            spread(each["defaults"]),
            spread(each["random"]),
            spread(each["gradient"]),
            spread(each["gradient accuracy"]),
        ]
        more.append("| " + " | ".join(cells) + " |")
    better = sum(statistics.fmean(e["gradient"]) < statistics.fmean(e["random"]) for e in searched)
    verdict = (
        f"\nThe gradient has the lower mean test loss for {better} of {len(searched)} methods.\n"
    )
    return (
        HEAD.format(conditions=conditions)
        + "\n".join(rows)
        + "\n"
        + SEARCH
        + "\n".join(more)
        + "\n"
        + verdict
        + NOTE
    )


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}"


def source(name: str) -> str:
    """Return the file of a method."""
    kind: Any = registry.get(name)
    return str(kind.method_type.__module__.replace(".", "/")) + ".py"
