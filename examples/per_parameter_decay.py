"""One weight decay for each of 2,410 parameters, by hypergradients through 100 steps of training.

The digits of scikit-learn, a third of the training labels random.  Compared with the best single
weight decay, chosen on the same validation set by grid search.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hypergrad import Solver, Unrolled

Batch = tuple[Tensor, Tensor]


def splits() -> tuple[Batch, Batch, Batch]:
    """Training set with wrong labels, validation and test set."""
    x, y = (torch.tensor(a) for a in load_digits(return_X_y=True))
    x = x.float() / 16
    train, val, test = ((x[i::3], y[i::3]) for i in range(3))
    noisy = torch.rand(len(y[::3])) < 1 / 3
    labels = torch.where(noisy, torch.randint(10, noisy.shape), train[1])
    return (train[0], labels), val, test


def error(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    return cross_entropy(model(batch[0]), batch[1])


def accuracy(model: nn.Module, batch: Batch) -> float:
    """Share of right answers."""
    return (model(batch[0]).argmax(1) == batch[1]).double().mean().item()


def penalized(model: nn.Module, batch: Batch, log_decay: dict[str, Tensor]) -> Tensor:
    """Training loss: one weight decay per parameter."""
    decay = sum((log_decay[k].exp() * p.square()).sum() for k, p in model.named_parameters())
    return error(model, batch) + decay


def main(outer_steps: int = 20) -> dict[str, float]:
    """Tune both ways; returns the test loss of each."""
    torch.manual_seed(0)
    train, val, test = splits()
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    solve = Solver(
        model, penalized, torch.optim.SGD, lr=0.5, momentum=0.9, method=Unrolled(steps=100)
    )

    def constant(value: float) -> dict[str, Tensor]:
        return {k: torch.full_like(p, value) for k, p in model.named_parameters()}

    with torch.no_grad():
        grid = [solve(train, constant(float(value))) for value in range(-12, -2)]
    single = min(grid, key=lambda fitted: error(fitted, val).item())

    log_decay = {k: v.requires_grad_() for k, v in constant(-6.0).items()}
    outer = torch.optim.Adam(log_decay.values(), lr=0.2)
    for step in range(outer_steps):
        outer.zero_grad()
        tuned = solve(train, log_decay)
        loss = error(tuned, val)
        loss.backward()
        outer.step()
        if step % 5 == 0:
            print(f"outer step {step:3}: validation loss {loss.item():.3f}")

    found = {}
    for name, fitted in (("one decay", single), ("one per parameter", tuned)):
        found[name] = error(fitted, test).item()
        score = accuracy(fitted, test)
        print(f"{name:18} test loss {found[name]:.3f}, test accuracy {score:.3f}")
    return found


if __name__ == "__main__":
    main()
