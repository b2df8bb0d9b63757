"""Orderings between methods that small studies call safe, over paired seeds."""

from __future__ import annotations

import statistics
from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from adapters import Trainer, artifacts, registry, tasks
from adapters.measure import intruders
from adapters.networks import MLP

SEEDS = range(20, 26)

pytestmark = pytest.mark.slow


@cache
def outcome(name: str, **values: Any) -> tuple[list[float], list[float], list[int]]:
    """Test accuracy, source accuracy with the old head, and intruder dimensions of each seed."""
    accuracy, retention, count = [], [], []
    for seed in SEEDS:
        task = tasks.get("digits_transfer", seed=seed)
        learner = registry.get(name)()
        assert isinstance(learner, Trainer)
        learner.setup(task, values, seed=seed)
        for _ in range(150):
            learner.step()
        accuracy.append(learner.evaluate("test")["accuracy"])
        source = cast(MLP, artifacts.resolve(["source_net"], task, seed)["source_net"])
        model = cast(MLP, learner.module())
        pairs = zip(source.layers[:-1], model.layers[:-1], strict=True)
        count.append(
            sum(
                intruders(cast(Tensor, a.weight), cast(Tensor, b.weight).detach()).count
                for a, b in pairs
            )
        )
        model.layers[-1] = source.layers[-1]
        data = task.split("source_test")
        with torch.no_grad():
            hits = model(data["x"]).argmax(1) == data["y"]
        retention.append(float(hits.double().mean()))
    return accuracy, retention, count


def test_every_adapter_beats_the_head_alone() -> None:
    """The head alone: full fine-tuning's network with all hidden layers frozen, .65 in studies."""
    for name in ("lora", "svfit", "lora_sb"):
        assert statistics.fmean(outcome(name, lr=0.03)[0]) > 0.8


def test_the_first_step_is_a_better_frame_than_the_weight() -> None:
    """LoRA-SB keeps more of the source than LoRA-XS, at no less accuracy."""
    update = outcome("lora_sb", lr=0.03)
    weight = outcome("lora_sb", lr=0.03, basis="weight", first_step=1e-5)
    kept = [a - b for a, b in zip(update[1], weight[1], strict=True)]
    better = [a - b for a, b in zip(update[0], weight[0], strict=True)]
    assert statistics.fmean(kept) > 0.03
    assert statistics.fmean(better) > -0.01


def test_singular_values_alone_forget_little_and_bring_no_intruder() -> None:
    _, retention, count = outcome("svfit", lr=0.03)
    assert statistics.fmean(retention) > 0.9
    assert sum(count) == 0
    assert statistics.fmean(retention) > statistics.fmean(outcome("lora", lr=0.03)[1]) + 0.1


def test_relative_updates_forget_less_than_low_rank_ones() -> None:
    """HUT against LoRA, paired."""
    pairs = zip(outcome("hut", lr=0.03)[1], outcome("lora", lr=0.03)[1], strict=True)
    assert statistics.fmean(a - b for a, b in pairs) > 0


def test_structured_sparsity_keeps_more_of_the_source_than_dense_training() -> None:
    kept = {n: statistics.fmean(outcome(n, lr=0.01)[1]) for n in ("s2ft", "lift", "finetune")}
    assert kept["s2ft"] > kept["finetune"]
    assert kept["lift"] > kept["finetune"]
