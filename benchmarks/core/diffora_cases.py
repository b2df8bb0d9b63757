"""What the selection of modules is measured on: a digits transformer twice, and stories260K.

Each case is a pretrained, frozen network, its candidate modules, and data to adapt it to.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import artifacts, tasks
from adapters.reparam import adaptable
from bilevel.selection import layer_rows
from hypergrad import seeded

__all__ = ["CASES", "Case"]

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Case:
    """A network to adapt.

    Attributes:
        base: the pretrained network; take copies by `fresh`.
        rows: names of its candidate modules, one row a layer.
        head: pattern of what is trained beside the adapters; () for nothing.
        train, val, test: inputs and targets; the search halves `train`, `val` chooses the learning
            rate, `test` is reported.
        batch: samples of a batch.
        search_steps, tune_steps: steps of the search and of adaptation.
        rates: learning rates of Adam to choose from.
    """

    base: nn.Module
    rows: list[list[str]]
    head: tuple[str, ...]
    train: Data
    val: Data
    test: Data
    batch: int
    search_steps: int
    tune_steps: int
    rates: tuple[float, ...]

    @property
    def names(self) -> list[str]:
        """The candidate modules in the order of the matrix."""
        return [name for row in self.rows for name in row]

    def fresh(self) -> nn.Module:
        """Return a copy of the pretrained network."""
        return copy.deepcopy(self.base)

    def halves(self) -> tuple[Data, Data]:
        """The samples of the weights and those of the gates."""
        x, y = self.train
        return (x[::2], y[::2]), (x[1::2], y[1::2])


def loss(model: nn.Module, data: Data) -> Tensor:
    """Cross entropy of a batch."""
    return F.cross_entropy(model(data[0]).flatten(0, -2), data[1].flatten())


@torch.no_grad()
def score(model: nn.Module, data: Data) -> tuple[float, float]:
    """Mean loss and accuracy."""
    outputs = torch.cat([model(x) for x in data[0].split(64)]).flatten(0, -2)
    y = data[1].flatten()
    return float(F.cross_entropy(outputs, y)), float((outputs.argmax(1) == y).double().mean())


class Block(nn.Module):
    """A transformer layer with six linear maps of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.f1, self.f2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, h: Tensor) -> Tensor:
        """Attention and a perceptron, each behind a norm."""
        x = self.first(h)
        q, k, v = (
            f(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        h = h + self.o(mixed)
        return h + self.f2(F.gelu(self.f1(self.second(h))))


class DigitsTransformer(nn.Module):
    """A vision transformer on 8×8 images: 16 patches of 2×2, width 32, three layers, four heads."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.patch = nn.Linear(4, 32)
        self.place = nn.Parameter(0.1 * torch.randn(16, 32))
        self.blocks = nn.ModuleList(Block(32, 4) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, shape (batch, classes), of images, shape (batch, 1, 8, 8)."""
        patches = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(len(x), 16, 4)
        h = self.patch(patches) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h.mean(dim=1)))  # type: ignore[no-any-return]


def _fit(model: nn.Module, params: list[nn.Parameter], data: Data, steps: int, lr: float) -> None:
    optimizer = torch.optim.AdamW(params, lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        rows = torch.randint(len(data[1]), (32,))
        optimizer.zero_grad()
        loss(model, (data[0][rows], data[1][rows])).backward()
        optimizer.step()


def _digits(name: str, n_train: int, seed: int) -> Case:
    task: Any = tasks.get(name, n_train=n_train, n_val=200, seed=seed)
    data = {split: (task.split(split)["x"], task.split(split)["y"]) for split in
            ("source", "train", "val", "test")}  # fmt: skip
    with seeded(seed):
        model = DigitsTransformer(task.source_classes)
        _fit(model, list(model.parameters()), data["source"], 400, 3e-3)
        if task.new_head:  # trained on the frozen features, as every way would at once
            model.head = nn.Linear(32, task.n_classes)
            _fit(model, list(model.head.parameters()), data["train"], 100, 1e-2)
    names = [n for n in adaptable(model) if n.startswith("blocks.")]
    head = ("head.*",) if task.new_head else ()
    return Case(
        model, layer_rows(names), head, data["train"], data["val"], data["test"],
        32, 100, 200, (5e-3, 1.5e-2),
    )  # fmt: skip


def rotated(seed: int) -> Case:
    """Digits turned by 90 degrees, after upright ones; 300 to adapt to, the last layer frozen."""
    return _digits("digits_rotated", 300, seed)


def shifted(seed: int) -> Case:
    """Digits 5-9, after 0-4; 100 to adapt to, with a new last layer."""
    return _digits("digits_transfer", 100, seed)


def stories(seed: int) -> Case:
    """Shakespeare, after children's stories: windows of 64 tokens; the real stories260K."""
    import adapters.language  # noqa: F401  (registers the pretrained network)

    task = tasks.get("stories", n_train=512, seed=seed)
    model: Any = artifacts.resolve(["stories_net"], task, seed)["stories_net"]
    data = [(task.split(s)["x"], task.split(s)["y"]) for s in ("train", "val", "test")]
    names = [n for n in adaptable(model) if n.rpartition(".")[2].endswith("_proj")]
    train, val, test = data
    return Case(
        model.eval(), layer_rows(names), (), train, (val[0][:128], val[1][:128]),
        (test[0][:384], test[1][:384]), 8, 100, 120, (5e-3, 1.5e-2),
    )  # fmt: skip


CASES: dict[str, Callable[[int], Case]] = {
    "rotated": rotated,
    "shifted": shifted,
    "stories": stories,
}
