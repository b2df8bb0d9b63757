"""PS-KD: the schedule, the table, and its limits."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from adapters import Trainer, registry, tasks
from adapters.calibration import area_under_risk_coverage
from adapters.objectives.ps_kd import PSKD
from bilevel import Descent, tune
from hypergrad import Unrolled

TASK = tasks.get("digits", noise=0.2, n_train=128)


def learner(**hparams: Any) -> Trainer:
    found = registry.get("ps_kd")()
    found.setup(TASK, {"epochs": 6, **hparams}, seed=0)
    return cast(Trainer, found)


def test_the_schedule() -> None:
    method = cast(PSKD, learner().method)
    base = {"softening": 0.6, "epochs": 6, "delay": 0.0, "shape": "power", "exponent": 1.0}
    found = [method.softening(base, epoch) for epoch in range(1, 7)]
    assert found == pytest.approx([0.1 * t for t in range(1, 7)])
    assert method.softening({**base, "exponent": 0.0}, 1) == 0.6
    assert method.softening({**base, "shape": "cosine"}, 6) == pytest.approx(0.6)
    assert method.softening({**base, "delay": 0.5}, 3) == 0.0
    assert method.softening({**base, "delay": 0.5}, 4) == pytest.approx(0.4)
    # Two batches an epoch; epochs beyond the last keep its weight.
    assert [method.epoch(step) for step in (0, 1, 2, 11, 12, 99)] == [1, 1, 2, 6, 6, 6]


def test_the_first_epoch_is_plain_cross_entropy_then_it_is_not() -> None:
    soft, plain = learner(softening=0.9), learner(softening=1e-9)
    for _ in range(2):
        assert soft.step()["loss"] == pytest.approx(plain.step()["loss"], abs=1e-6)
    for name, value in plain.params.items():
        assert torch.allclose(soft.params[name], value, atol=1e-6)
    assert abs(soft.step()["loss"] - plain.step()["loss"]) > 1e-3


def test_the_table_holds_the_predictions_of_the_step_itself() -> None:
    found = learner()
    hot = F.one_hot(TASK.split("train")["y"], 10).float()
    assert torch.equal(found.method.memory["table"], hot)
    x = TASK.split("train")["x"]
    with torch.no_grad():
        before = found.module()(x).softmax(1)
    found.step()
    table = found.method.memory["table"]
    changed = (table != hot).any(1)
    assert int(changed.sum()) == 64
    assert torch.allclose(table[changed], before[changed], atol=1e-6)
    assert torch.equal(table[~changed], hot[~changed])
    for _ in range(5):
        found.step()
    assert torch.allclose(found.method.memory["table"].sum(1), torch.ones(128), atol=1e-6)


def test_the_gradient_shrinks_where_the_table_agrees_with_the_network() -> None:
    found = learner(epochs=1, softening=0.4)
    batch = {**found.inner_batches(1)[0], "kept": {}}
    network = found.module()
    logits = network(batch["x"])
    found.method.memory["table"][batch["index"]] = logits.detach().softmax(1)
    loss = found.method.loss(network, {**found.method.setting.constants, **found.hparams}, batch)
    plain = F.cross_entropy(logits, batch["y"])
    weight = network.layers[0].weight  # type: ignore[index, union-attr]
    grads = [torch.autograd.grad(each, weight, retain_graph=True)[0] for each in (loss, plain)]
    assert torch.allclose(grads[0], 0.6 * grads[1], atol=1e-6)


def test_bad_values() -> None:
    for bad in ({"epochs": 0}, {"softening": 1.0}, {"batch": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            learner(**bad)


@pytest.mark.slow
def test_errors_and_risk_fall_with_softening_under_label_noise() -> None:
    """Three seeds, 10 % wrong labels, 40 epochs: means over seeds."""
    found: dict[float, list[tuple[float, float]]] = {0.01: [], 0.9: []}
    for seed in range(3):
        task = tasks.get("digits", noise=0.1, n_train=700, seed=seed)
        test = task.split("test")
        for softening, results in found.items():
            trained = cast(Trainer, registry.get("ps_kd")())
            trained.setup(task, {"softening": softening, "epochs": 40}, seed=seed)
            for _ in range(40 * (700 // 64)):
                trained.step()
            risk = area_under_risk_coverage(trained.module()(test["x"]), test["y"])
            results.append((trained.evaluate("test")["accuracy"], risk))
    means = {a: torch.tensor(r).mean(0).tolist() for a, r in found.items()}
    assert means[0.9][0] > means[0.01][0]
    assert means[0.9][1] < means[0.01][1]


def test_the_delay_can_be_tuned_through() -> None:
    found = tune(cast(Any, learner(delay=0.5)), Descent(Unrolled(steps=2), lr=0.1), 4)
    assert found.status.value == "max_iter"
    assert found.trace[0]["grad_norm/softening"] == 0.0
