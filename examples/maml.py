"""MAML: an initialization from which three steps on five images are enough.

A task of scikit-learn's digits: one image each of five classes, in an order that only the task
knows.  Tested on images that meta-training has not seen.

Source: Finn, Abbeel and Levine, ICML 2017.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hypergrad import Solver, Unrolled

Batch = tuple[Tensor, Tensor]
WAYS, SHOTS, QUERIES = 5, 1, 10


def draw_task(x: Tensor, y: Tensor) -> tuple[Batch, Batch]:
    """Five classes in random order; a support set to adapt on, a query set to judge by."""
    rows = torch.stack(
        [
            (y == digit).nonzero()[:, 0][torch.randperm(int((y == digit).sum()))[: SHOTS + QUERIES]]
            for digit in torch.randperm(10)[:WAYS]
        ]
    )
    labels = torch.arange(WAYS)[:, None].expand_as(rows)
    support, query = (
        (x[rows[:, part]].flatten(0, 1), labels[:, part].flatten())
        for part in (slice(SHOTS), slice(SHOTS, None))
    )
    return support, query


def error(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def main(outer_steps: int = 200, tasks_per_step: int = 4) -> dict[str, float]:
    """Meta-train; returns the accuracy after adaptation, before and after."""
    torch.manual_seed(0)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    held_out = [draw_task(x[1::2], y[1::2]) for _ in range(100)]

    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, WAYS))
    adapt = Solver(model, error, torch.optim.SGD, lr=0.5, method=Unrolled(steps=3))
    meta = torch.optim.Adam(model.parameters(), lr=1e-2)

    @torch.no_grad()
    def score() -> float:
        right = [adapt(support)(query[0]).argmax(1) == query[1] for support, query in held_out]
        return torch.cat(right).double().mean().item()

    found = {"random initialization": score()}
    for step in range(outer_steps):
        meta.zero_grad()
        for support, query in (draw_task(x[::2], y[::2]) for _ in range(tasks_per_step)):
            (error(adapt(support), query) / tasks_per_step).backward()
        meta.step()
        if step % 50 == 49:
            print(f"outer step {step + 1:3}: accuracy on new tasks {score():.3f}")
    found["meta-trained"] = score()
    for name, value in found.items():
        print(f"{name:22} accuracy {value:.3f}")
    return found


if __name__ == "__main__":
    main()
