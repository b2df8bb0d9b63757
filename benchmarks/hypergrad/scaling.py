"""Cost of a hypergradient from 10 to 10⁶ hyperparameters, on one network.

The hyperparameters are weight decays of groups of weights: the same computation, whatever their
number, but for the length of the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from benchmarks.hypergrad import measure
from hypergrad import CG, SGD, Hyper, Implicit, Unrolled, module_problem

__all__ = ["NUMBERS", "measured", "table"]

NUMBERS = (10, 1_000, 100_000, 1_000_000)
STEPS, ITERATIONS, WIDTH = 10, 5, 965


def measured(repeats: int, width: int = WIDTH) -> dict[str, list[float]]:
    """Return the least CPU time in ms for each number, by estimator."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()),
        nn.Linear(width, 10),
    )
    size = sum(p.numel() for p in net.parameters())
    batches = [(torch.randn(128, 64), torch.randint(10, (128,))) for _ in range(STEPS)]

    def spread(decays: Tensor) -> Tensor:
        """Give each weight the decay of its group."""
        each = -(-size // len(decays))
        return decays.repeat_interleave(each)[:size]

    def error(module: nn.Module, hparams: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(module(batch[0]), batch[1])

    def penalized(module: nn.Module, hparams: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        flat = torch.cat([p.flatten() for p in module.parameters()])
        return error(module, hparams, batch) + 0.5 * (spread(hparams["decay"]) * flat * flat).sum()

    bare, params = module_problem(net, error, error)
    with_penalty, _ = module_problem(net, penalized, error)
    unrolled = Unrolled(SGD(0.05, 0.9, weight_decay=Hyper("decay", spread)), STEPS)
    implicit = Implicit(CG(rtol=0.0, max_iter=ITERATIONS, damping=1.0))

    def run(estimator: Any, problem: Any, batch: Any, number: int) -> Callable[[], object]:
        hparams = {"decay": torch.full((number,), 1e-3, requires_grad=True)}
        state = estimator.init(problem, params, hparams)
        return lambda: estimator(problem, params, hparams, batch, batches[-1], state)

    runs = {}
    for number in NUMBERS:
        runs[f"Unrolled({STEPS}) {number}"] = run(unrolled, bare, batches.__getitem__, number)
        runs[f"Implicit(CG {ITERATIONS}) {number}"] = run(
            implicit, with_penalty, batches[0], number
        )
    times = measure.interleaved(runs, repeats)
    found: dict[str, list[float]] = {}
    for name, seconds in times.items():
        found.setdefault(name.rsplit(" ", 1)[0], []).append(1e3 * min(seconds))
    return found


def table(found: dict[str, list[float]]) -> str:
    """Return the table: times relative to ten hyperparameters."""
    head = "| estimator | " + " | ".join(f"{n:,}" for n in NUMBERS) + " |"
    lines = [
        f"## scaling: from 10 to 10⁶ weight decays of groups of weights, MLP 64-{WIDTH}-{WIDTH}-10",
        "",
        "CPU time relative to that with 10 hyperparameters, with ms in brackets.",
        *("", head, "| --- |" + " ---: |" * len(NUMBERS)),
    ]
    for name, times in found.items():
        cells = [f"{t / times[0]:.2f} ({t:.0f})" for t in times]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(measured(int(sys.argv[1]))))
