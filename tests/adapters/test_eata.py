"""EATA: the selection, the anchor, what moves and what does not."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import nn

from adapters import Trainer, artifacts, registry, tasks
from adapters.losses import entropy
from adapters.robustness.eata import EATA
from hypergrad import two_view_grad

TASK = tasks.get("digits_stream", n_train=224, n_val=70)


def learner(**hparams: Any) -> Trainer:
    found = registry.get("eata")()
    found.setup(TASK, {"batch": 32, **hparams}, seed=0)
    return cast(Trainer, found)


def test_batch_statistics_repair_most_of_the_shift() -> None:
    source = artifacts.resolve(["batchnorm_net"], TASK, 0)["batchnorm_net"]
    test = TASK.split("test")
    with torch.no_grad():
        before = float(TASK.measure(source(test["x"]), test)["accuracy"].mean())
    assert learner().evaluate("test")["accuracy"] > before + 0.15


def test_only_scales_and_shifts_of_batchnorm_move() -> None:
    found = learner(lr=0.05)
    start = {name: value.clone() for name, value in found.params.items()}
    assert set(start) == {f"features.{i}.{n}" for i in (1, 4, 7) for n in ("weight", "bias")}
    for _ in range(5):
        found.step()
    assert all(not torch.equal(start[name], value) for name, value in found.params.items())


def test_nothing_moves_where_nothing_is_selected() -> None:
    found = learner(lr=0.05)
    found.step()
    # Every later prediction has a cosine above a threshold of zero.
    found.method.setting.constants["redundancy"] = 0.0  # type: ignore[index]
    before = found.state_dict()
    metrics = found.step()
    after = found.state_dict()
    assert metrics["selected"] == 0.0 < metrics["reliable"]
    assert torch.equal(before["params"], after["params"])
    assert torch.equal(
        before["optimizer"]["momentum_buffer"], after["optimizer"]["momentum_buffer"]
    )
    assert torch.equal(before["memory"]["mean"], after["memory"]["mean"])


def test_selection_by_entropy_first_and_by_the_mean_later() -> None:
    everything = learner(margin=1.0, redundancy=2.0)
    metrics = everything.step()
    # At E₀ = ln K every sample is reliable, and ε > 1 keeps all of them.
    assert (metrics["reliable"], metrics["selected"]) == (1.0, 1.0)
    found = learner(margin=0.4, redundancy=0.3)
    first, second = found.step(), found.step()
    assert first["selected"] == first["reliable"] < 1.0
    assert second["selected"] < second["reliable"]


def test_accuracy_is_that_of_predictions_before_the_update() -> None:
    found = learner(lr=0.1)
    stream = TASK.split("train")
    model = found.module()
    with torch.no_grad():
        expected = (model(stream["x"][:32]).argmax(1) == stream["y"][:32]).double().mean()
    assert found.step()["accuracy"] == pytest.approx(float(expected))


def test_the_anchor_is_zero_at_the_start_and_holds_the_source_when_heavy() -> None:
    found = learner(anchor=9e4, lr=0.02)
    memory = found.method.memory
    assert all((value >= 0).all() for value in memory["fisher"].values())
    assert all(torch.equal(memory["start"][n], p) for n, p in found.params.items())

    def moved(trained: Trainer) -> float:
        start, fisher = trained.method.memory["start"], trained.method.memory["fisher"]
        moves = {n: p.detach() - start[n] for n, p in trained.params.items()}
        return sum(float((fisher[n] * move.square()).sum()) for n, move in moves.items())

    free = learner(anchor=1e-3, lr=0.02)
    for _ in range(28):
        found.step(), free.step()
    assert moved(found) < 0.5 * moved(free)


def test_the_closed_form_has_the_gradient_of_the_detached_weight() -> None:
    """And the second derivative that detaching loses: the published loss in two views."""
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    margin = torch.tensor(1.2, dtype=torch.float64)

    def published(moving: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        return (torch.exp(margin - entropy(frozen)) * entropy(moving)).mean()

    _, expected = two_view_grad(published, logits)
    closed = -torch.exp(margin - entropy(logits)).mean()
    (found,) = torch.autograd.grad(closed, logits, create_graph=True)
    direction = torch.randn(6, 5, dtype=torch.float64)
    assert torch.allclose(found, expected)
    seconds = [
        torch.autograd.grad((g * direction).sum(), logits, retain_graph=True)[0]
        for g in (found, expected)
    ]
    assert torch.allclose(*seconds)


def test_repeats_use_each_batch_again() -> None:
    stream = cast(EATA, learner(repeats=2).method).pool("train")
    x = TASK.split("train")["x"]
    assert torch.equal(stream["x"][:32], x[:32])
    assert torch.equal(stream["x"][32:64], x[:32])
    assert torch.equal(stream["x"][64:96], x[32:64])
    assert stream["first"][:64].tolist() == [1.0] * 32 + [0.0] * 32


def test_a_network_without_batchnorm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    monkeypatch.setattr(EATA, "network", lambda self: plain)
    with pytest.raises(ValueError, match="BatchNorm2d, but Sequential has none"):
        learner()
