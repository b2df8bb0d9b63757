"""Data hyper-cleaning: a weight for each training sample, by implicit differentiation.

The digits of scikit-learn, 40 % of the training labels random; the validation set is clean.  The
weights find the wrong labels, which nothing has told them.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hypergrad import CG, Implicit, Solver

Batch = tuple[Tensor, Tensor]


def error(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> float:
    """Share of right answers."""
    return (model(batch[0]).argmax(1) == batch[1]).double().mean().item()


def weighted(model: nn.Module, batch: Batch, logits: Tensor) -> Tensor:
    """Training loss: each sample has a weight between 0 and 1."""
    losses = cross_entropy(model(batch[0]), batch[1], reduction="none")
    decay = sum(p.square().sum() for p in model.parameters())
    return (logits.sigmoid() * losses).mean() + 1e-3 * decay


def main(outer_steps: int = 20) -> dict[str, float]:
    """Clean the data; returns what came of it."""
    torch.manual_seed(0)
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    train, val, test = ((x[i::3], y[i::3]) for i in range(3))
    random = torch.randint(10, train[1].shape)
    labels = torch.where(torch.rand(train[1].shape) < 0.4, random, train[1])
    wrong = labels != train[1]
    noisy = train[0], labels

    solve = Solver(
        nn.Linear(64, 10), weighted, torch.optim.SGD, lr=1.0, momentum=0.9,
        method=Implicit(CG(max_iter=20)), steps=100, warm_start=True,
    )  # fmt: skip
    logits = torch.zeros(len(labels), requires_grad=True)
    outer = torch.optim.Adam([logits], lr=0.5)
    found = {"accuracy before": accuracy(solve(noisy, logits), test)}
    for step in range(outer_steps):
        outer.zero_grad()
        fitted = solve(noisy, logits)
        loss = error(fitted, val)
        loss.backward()
        outer.step()
        if step % 5 == 0 and solve.report:
            residual = f"residual {solve.report.residual:.0e}, {solve.report.n_hvp} products"
            print(f"outer step {step:3}: validation loss {loss.item():.3f}, {residual}")

    low = logits < 0
    found |= {
        "accuracy after": accuracy(fitted, test),
        "wrong labels found": low[wrong].double().mean().item(),
        "right labels kept": (~low)[~wrong].double().mean().item(),
    }
    for name, value in found.items():
        print(f"{name:18} {value:.3f}")
    return found


if __name__ == "__main__":
    main()
