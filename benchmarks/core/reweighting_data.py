"""Data and single runs of the studies of loss-based weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import Trainer, registry, tasks
from adapters.networks import MLP
from bilevel import Descent, tune
from bilevel.reweighting import Reweighter, Temperature
from bilevel.sample_losses import sequence_losses
from hypergrad import Unrolled

__all__ = ["RULES", "classify", "corpus", "learned", "read", "regression"]

R, BURN_IN = 0.4, 30
STRATEGIES = ("uniform", "linupper", "upper", "quadratic", "extremes")

Rule = Callable[[Tensor, Tensor, int], Tensor]
"""(detached losses, which are corrupted, step) -> weights, sum 1."""


def _strategy(name: str, temperature: float = R, norm: str = "minmax") -> Rule:
    schedule = Temperature(temperature, burn_in=BURN_IN)
    rule = Reweighter(name, schedule, norm=norm)  # type: ignore[arg-type]
    return lambda losses, wrong, step: rule.weigh(losses, step=step).weights


def _min_max(losses: Tensor, wrong: Tensor, step: int) -> Tensor:
    """w ∝ (ℓ − min)/(max − min), after the same burn-in."""
    if step < BURN_IN:
        return torch.full_like(losses, 1 / len(losses))
    share = losses - losses.min()
    return share / share.sum()


def _oracle(losses: Tensor, wrong: Tensor, step: int) -> Tensor:
    """Uniform over the samples that are right; it is told which."""
    right = (~wrong).to(losses)
    return right / right.sum().clamp(min=1.0)


RULES: Mapping[str, Rule] = {
    **{name: _strategy(name) for name in STRATEGIES},
    "linupper, r = 1": _strategy("linupper", 1.0),
    "linupper, rank": _strategy("linupper", norm="rank"),
    "plain min-max": _min_max,
    "oracle": _oracle,
}


def regression(strategy: str, corrupted: bool, seed: int, steps: int) -> float:
    """Test error on linear regression, four fifths of the rows near-copies of one."""
    g = torch.Generator().manual_seed(seed)
    truth, x = torch.randn(10, generator=g), torch.randn(1000, 10, generator=g)
    x[:800] = x[0] + 0.02 * torch.randn(800, 10, generator=g)
    y = x @ truth
    if corrupted:
        wrong = 800 + torch.randperm(200, generator=g)[:50]
        y[wrong] = 8 * torch.randn(50, generator=g)
    fresh = torch.randn(500, 10, generator=g)
    theta, rule = torch.zeros(10), Reweighter(strategy, R)  # type: ignore[arg-type]
    for _ in range(steps):
        rows = torch.randint(1000, (64,), generator=g)
        w = rule.weights((x[rows] @ theta - y[rows]).square())
        theta = theta - 0.05 * 2 * x[rows].T @ (w * (x[rows] @ theta - y[rows]))
    return float((fresh @ (theta - truth)).square().mean())


def classify(
    task: tasks.Classification, rule: Rule, seed: int, steps: int, trusted: bool = False
) -> tuple[float, float]:
    """Test accuracy of a perceptron, and the mean share of weight on wrong labels at the end.

    Args:
        task: with wrong labels in training.
        rule: weights.
        seed: of the network and the batches.
        steps: of SGD at 0.05 with momentum 0.9, batches of 64.
        trusted: train on the validation samples, too.
    """
    torch.manual_seed(seed)
    model, data = MLP(task.input_shape, task.n_classes, activation="tanh"), task.split("train")
    x, y, wrong = data["x"], data["y"], task.corrupted
    if trusted:
        more = task.split("val")
        x, y = torch.cat([x, more["x"]]), torch.cat([y, more["y"]])
        wrong = torch.cat([wrong, torch.zeros(len(more["y"]), dtype=torch.bool)])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    share = 0.0
    for step in range(steps):
        rows = torch.randint(len(y), (64,))
        losses = F.cross_entropy(model(x[rows]), y[rows], reduction="none")
        w = rule(losses.detach(), wrong[rows], step)
        optimizer.zero_grad()
        (w * losses).sum().backward()
        optimizer.step()
        if step >= steps - 50:
            share += float(w[wrong[rows]].sum()) / 50
    return _accuracy(model, task), share


def learned(task: tasks.Classification, seed: int, steps: int) -> tuple[float, float]:
    """The same with a weight for each sample, tuned on the validation samples while training."""
    learner = registry.get("learned_weights")()
    assert isinstance(learner, Trainer)
    learner.setup(task, {}, seed=seed)
    tune(learner, Descent(Unrolled(steps=5), lr=0.1), steps)
    weights = learner.hparams["logit"].detach().sigmoid()
    share = float(weights[task.corrupted].sum() / weights.sum())
    return float(learner.evaluate("test")["accuracy"]), share


def _accuracy(model: nn.Module, task: tasks.Classification) -> float:
    data = task.split("test")
    with torch.no_grad():
        return float((model(data["x"]).argmax(1) == data["y"]).double().mean())


def corpus(kind: str, seed: int) -> tuple[tasks.Sequences, Tensor]:
    """Windows of Shakespeare's plays, and which were replaced.

    Args:
        kind: "clean"; "duplicated", 60 % of the windows copies of 40 of them; or "corrupted", 30 %
            of the windows random characters.
        seed: of everything.
    """
    task = cast(tasks.Sequences, tasks.get("shakespeare", length=48, n_train=4000, seed=seed))
    g = torch.Generator().manual_seed(seed)
    train = {name: value.clone() for name, value in task.split("train").items()}
    share = {"clean": 0.0, "duplicated": 0.6, "corrupted": 0.3}[kind]
    bad = torch.zeros(4000, dtype=torch.bool)
    rows = torch.randperm(4000, generator=g)[: round(share * 4000)]
    bad[rows] = True
    if kind == "duplicated":
        source = rows[torch.randint(40, (len(rows),), generator=g)]
        train = {name: value.index_put((rows,), value[source]) for name, value in train.items()}
    elif kind == "corrupted":
        noise = torch.randint(task.n_tokens, (len(rows), 49), generator=g)
        train["x"][rows], train["y"][rows] = noise[:, :-1], noise[:, 1:]
    splits = {**task.splits, "train": train}
    return tasks.Sequences("corpus", splits, n_tokens=task.n_tokens), bad


class Causal(nn.Module):
    """Characters -> two causal convolutions of kernel 6 and 96 channels -> logits."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(n_tokens, 32), nn.Linear(96, n_tokens)
        self.layers = nn.ModuleList([nn.Conv1d(32, 96, 6), nn.Conv1d(96, 96, 6)])

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape (batch, length, tokens)."""
        h = self.embed(x).transpose(1, 2)
        for layer in self.layers:
            h = F.gelu(layer(F.pad(h, (5, 0))))
        return cast(Tensor, self.head(h.transpose(1, 2)))


def read(
    task: tasks.Sequences, bad: Tensor, rule: Rule, seed: int, steps: int
) -> tuple[float, list[float], tuple[Tensor, Tensor]]:
    """Held-out nats a character; weight on replaced windows by step; losses, weights of the end."""
    torch.manual_seed(seed)
    model, data = Causal(task.n_tokens), task.split("train")
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shares: list[float] = []
    for step in range(steps):
        rows = torch.randint(len(bad), (32,))
        losses, _ = sequence_losses(model(data["x"][rows]), data["y"][rows])
        w = rule(losses.detach(), bad[rows], step)
        optimizer.zero_grad()
        (w * losses).sum().backward()
        optimizer.step(), cosine.step()
        shares.append(float(w[bad[rows]].sum()))
    test = task.split("test")
    with torch.no_grad():
        found, _ = sequence_losses(model(test["x"][:800]), test["y"][:800])
    return float(found.mean()), shares, (losses.detach(), w)
