"""The learner of balanced averages: the average itself, ends of tasks, resume, and derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from adapters import Trainer, registry, tasks
from bilevel import Descent, SelfTuning, tune
from hypergrad import Unrolled, check_hypergradient
from tests.adapters.battery import LEARNERS, compare_with_differences

TASK = tasks.get("digits_stream", n_train=448, n_val=70, hidden=(32,), activation="tanh")


def learner(seed: int = 0, dtype: torch.dtype = torch.float32, **hparams: Any) -> Trainer:
    made = registry.get("coin")()
    assert isinstance(made, Trainer)
    made.setup(TASK.to(dtype), {"epochs": 2, **hparams}, seed=seed)
    return made


def copied(made: Trainer) -> dict[str, torch.Tensor]:
    return {n: v.detach().clone() for n, v in made.params.items()}


def test_the_average_is_the_recursion_and_the_next_task_starts_from_it() -> None:
    """Two epochs of two batches a task; 1 − β = 0.2/t from the second task on."""
    made = learner(c=0.2)
    for _ in range(4):
        made.step()
    average = copied(made)
    for t in range(1, 5):
        previous = copied(made)
        made.step()
        if t < 4:
            now = copied(made)
            assert any(not torch.equal(now[n], previous[n]) for n in now)
            average = {n: a + 0.2 / t * (now[n] - a) for n, a in average.items()}
            kept = made.method._kept(now, {"c": 0.2})  # type: ignore[attr-defined]
            assert all(torch.allclose(kept[n], average[n], atol=1e-7) for n in average)
    # The fourth step ended the task: the weights are the average, on the way from the third one's.
    ended = copied(made)
    assert all(torch.equal(ended[n], v) for n, v in made.method.memory["average"].items())
    assert not any(bool(v.any()) for v in made.optimizer_state.values() if torch.is_tensor(v))
    assert made.method.memory["steps"] == 0


def test_fixed_ends_are_plain_training_and_no_training() -> None:
    plain, none = learner(balance="none"), learner(balance="fixed", old=0.6)
    for _ in range(4):
        plain.step(), none.step()
    assert all(torch.equal(plain.params[n], none.params[n]) for n in plain.params)
    plain.step(), none.step()
    assert dict(plain.evaluate("val")) != dict(none.evaluate("val"))


@pytest.mark.parametrize("balance", ["printed", "released", "fixed"])
def test_settings_match_differences(balance: str) -> None:
    subject = LEARNERS["coin"]
    # β of each rule must lie in (0, 1) after two steps, or its derivative is zero.
    values = {"printed": {"trade_off": 0.3}, "released": {"kappa": 0.02}, "fixed": {"old": 0.9}}
    smooth = {**subject.smooth, "balance": balance, "granularity": "global", **values[balance]}
    names = {"lr", "weight_decay", "scale", *values[balance]}
    compare_with_differences(dataclasses.replace(subject, smooth=smooth), names, last=True)


@pytest.mark.parametrize("balance", ["polynomial", "printed", "released", "fixed"])
def test_the_setting_of_each_rule_has_a_derivative_that_is_not_zero(balance: str) -> None:
    names = {"polynomial": "c", "printed": "trade_off", "released": "kappa", "fixed": "old"}
    values = {"c": 0.3, "trade_off": 0.3, "kappa": 0.02, "old": 0.9}
    name = names[balance]
    given = {name: values[name], "balance": balance, "granularity": "global", "lr": 0.01}
    made = learner(dtype=torch.float64, from_start=True, **given)
    for _ in range(3):
        made.step()
    batches = made.inner_batches(2)
    report = check_hypergradient(
        Unrolled(made.optimizer, steps=2),
        made.problem,
        made.params,
        made.hparams,
        batches.__getitem__,
        made.outer_batch(),
    )
    assert report.passed, str(report)
    loss = made.problem.outer_loss(made.params, hparams := made.hparams, made.outer_batch())
    (found,) = torch.autograd.grad(loss, [hparams[name]])
    assert float(found.abs()) > 0


@pytest.mark.parametrize("done", [3, 4, 6, 8])
@pytest.mark.parametrize("balance", ["printed", "polynomial"])
def test_resume_within_and_between_tasks(done: int, balance: str) -> None:
    one, two = learner(balance=balance), learner(balance=balance)
    for _ in range(done):
        one.step()
    two.load_state_dict(one.state_dict())
    for _ in range(7):
        assert dict(one.step()) == dict(two.step())
        assert dict(one.evaluate("val")) == dict(two.evaluate("val"))
    with pytest.raises(ValueError, match="another run"):
        learner(balance="fixed").load_state_dict(one.state_dict())


def test_the_merged_network_is_the_average() -> None:
    made = learner()
    for _ in range(6):
        made.step()
    x, y = TASK.split("val")["x"], TASK.split("val")["y"]
    accuracy = float((made.module()(x).argmax(1) == y).double().mean())
    assert accuracy == pytest.approx(made.evaluate("val")["accuracy"])


def test_a_task_without_groups_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a sequence of tasks"):
        registry.get("coin")().setup(tasks.get("digits_transfer"), {}, seed=0)


def test_tuned_by_descent_and_by_self_tuning() -> None:
    """Self-tuning moves what enters the training loss; the rule's setting does not."""
    made = learner(from_start=True)
    for _ in range(2):
        made.step()
    found = tune(made, Descent(Unrolled(steps=2)), budget=12)
    assert set(found.hparams) == {"c", "scale", "weight_decay"}
    assert float(found.hparams["c"]) != pytest.approx(0.2)
    own = registry.get("coin")(registry.get("coin").space.own(c="sampler"))
    own.setup(TASK, {"epochs": 2}, seed=0)
    tuned = tune(own, SelfTuning(), budget=12)
    assert all(bool(torch.as_tensor(v).isfinite().all()) for v in tuned.hparams.values())
