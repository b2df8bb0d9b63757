"""Training on a sequence of tasks, and what is left of each: the loop of the CoIN studies."""

# ruff: noqa: E501

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bilevel.balanced_ema import BalancedEMA, Fixed, LiteralRule, Polynomial, Published, Rule
from bilevel.continual import (
    InstructionGroups,
    ParameterSets,
    continual_metrics,
    similarity,
)

SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Part:
    """One task of a sequence; classes are numbers of the shared last layer."""

    name: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: range
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Way:
    """How a sequence is trained.

    Attributes:
        rule: of the average; None without.
        replay: stored samples of each earlier task; half of each batch is drawn from them.
        joint: all tasks at once, with as many steps.
        gate: similarity from which a set of parameters is used again; None for one set.
        similar: how it is measured.
    """

    rule: Rule | None = None
    replay: int = 0
    joint: bool = False
    gate: float | None = None
    similar: Callable[[Sequence[str], Sequence[str]], float] = similarity


RULES: dict[str, Rule | None] = {
    "fine-tuning": None,
    "EMA 0.98": Fixed(0.98),
    "EMA 0.99": Fixed(0.99),
    "EMA 0.995": Fixed(0.995),
    "EMA 0.998": Fixed(0.998),
    "printed, λ = 1": LiteralRule(1.0),
    "released, κ = 2": Published(2.0),
    "released, κ = 0.1": Published(0.1),
    "released, κ = 0.05": Published(0.05),
    "polynomial 0.3/t": Polynomial(0.3),
    "polynomial 0.2/t": Polynomial(0.2),
}


@dataclass
class Outcome:
    """Accuracies A[t, i], the share of fallbacks, β of the largest matrix by step, and the sets."""

    accuracy: Tensor
    fallback: float
    trace: list[float] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)


class TaskSequence:
    """The tasks of a sequence with the masks of their classes."""

    def __init__(self, parts: Sequence[Part], batch: int = 64) -> None:
        self.parts, self.batch = parts, batch
        total = max(part.classes.stop for part in parts)
        self.masks = torch.full((len(parts), total), -math.inf)
        for i, part in enumerate(parts):
            self.masks[i, part.classes.start : part.classes.stop] = 0.0

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, task: Tensor) -> Tensor:
        """Cross entropy among the classes of each sample's own task."""
        return F.cross_entropy(model(x) + self.masks[task], y)

    @torch.no_grad()
    def accuracy(self, model: nn.Module, task: int) -> float:
        """Share of right test samples of a task, which is known."""
        x, y = self.parts[task].test
        return float(((model(x) + self.masks[task]).argmax(1) == y).double().mean())


def run(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    sequence: TaskSequence,
    way: Way,
    *,
    steps: int,
    lr: float,
    seed: int,
) -> Outcome:
    """Train a sequence once; AdamW starts anew with each task."""
    generator = torch.Generator().manual_seed(seed)
    parts, batch = sequence.parts, sequence.batch
    if way.joint:
        return _joint(model, params, sequence, steps, lr, generator)
    sets = (
        None
        if way.gate is None
        else ParameterSets(params, InstructionGroups(way.gate, similar=way.similar))
    )
    largest = max(params, key=lambda n: params[n].numel())
    stored: list[tuple[Tensor, Tensor, Tensor]] = []
    rows, trace, groups, updates, fallbacks = [], [], [], 0, 0
    for task, part in enumerate(parts):
        group, fresh = (0, task == 0) if sets is None else sets.open(part.instructions)
        groups.append(group)
        ema = None if way.rule is None or fresh else BalancedEMA(params, way.rule)
        optimizer = torch.optim.AdamW(params.values(), lr=lr)
        x, y = part.train
        size = batch // 2 if way.replay and stored else batch
        for _ in range(steps):
            index = torch.randint(len(y), (size,), generator=generator)
            drawn = [(x[index], y[index], torch.full((size,), task))]
            if way.replay and stored:
                old = [torch.cat(each) for each in zip(*stored, strict=True)]
                index = torch.randint(len(old[0]), (batch - size,), generator=generator)
                drawn.append((old[0][index], old[1][index], old[2][index]))
            optimizer.zero_grad()
            sequence.loss(model, *(torch.cat(e) for e in zip(*drawn, strict=True))).backward()
            optimizer.step()
            if ema is not None:
                ema.update()
                trace.append(ema.stats().last[largest])
        if ema is not None:
            ema.end_task()
            updates, fallbacks = updates + ema.stats().updates, fallbacks + ema.stats().fallbacks
        kept = torch.randperm(len(y), generator=generator)[: way.replay]
        stored.append((x[kept], y[kept], torch.full((len(kept),), task)))
        found = []
        for i in range(len(parts)):
            if sets is not None:  # a task not seen yet is tried on the set of the last one
                sets.use(groups[i] if i < len(groups) else groups[-1])
            found.append(sequence.accuracy(model, i))
        if sets is not None:
            sets.use(group)
        rows.append(found)
    share = fallbacks / updates if updates else 0.0
    return Outcome(torch.tensor(rows, dtype=torch.float64), share, trace, groups)


def _joint(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    sequence: TaskSequence,
    steps: int,
    lr: float,
    generator: torch.Generator,
) -> Outcome:
    parts, batch = sequence.parts, sequence.batch
    x, y = (torch.cat([part.train[k] for part in parts]) for k in (0, 1))
    task = torch.cat([torch.full((len(p.train[1]),), i) for i, p in enumerate(parts)])
    optimizer = torch.optim.AdamW(params.values(), lr=lr)
    for _ in range(len(parts) * steps):
        index = torch.randint(len(y), (batch,), generator=generator)
        optimizer.zero_grad()
        sequence.loss(model, x[index], y[index], task[index]).backward()
        optimizer.step()
    last = [sequence.accuracy(model, i) for i in range(len(parts))]
    return Outcome(torch.tensor([last] * len(parts), dtype=torch.float64), 0.0)


def row(name: str, found: Sequence[Outcome], joint: bool = False) -> dict[str, object]:
    """Return the figures of one way over seeds, in %: means and standard deviations."""
    metrics = [continual_metrics(each.accuracy) for each in found]
    figures: dict[str, object] = {"way": name}
    for key in ("average",) if joint else ("average", "forgetting", "backward_transfer", "new"):
        values = [100 * getattr(m, key) for m in metrics]
        figures[key] = [statistics.fmean(values), statistics.stdev(values)]
        figures[f"{key}_each"] = values
    figures["fallbacks"] = 100 * statistics.fmean(each.fallback for each in found)
    return figures


def table(rows: Sequence[Mapping[str, object]]) -> str:
    """Return a Markdown table of rows."""
    lines = [
        "| way | average accuracy | forgetting | backward transfer | just after a task | fallbacks |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in rows:
        cells = [str(each["way"])]
        for key in ("average", "forgetting", "backward_transfer", "new"):
            value = each.get(key)
            cells.append(f"{value[0]:.1f} ± {value[1]:.1f}" if isinstance(value, list) else "–")
        cells.append(f"{each['fallbacks']:.0f} %")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
