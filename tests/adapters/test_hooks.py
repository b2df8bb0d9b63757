"""Hooks of a method: edits, detached quantities, schedules, periodic hooks, artifacts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import Trainer, artifacts, every
from adapters.method import State
from bilevel import Grad, Space, tune
from bilevel.coordinates import interpolate
from bilevel.descent import Descent
from hypergrad import Unrolled, check_hypergradient
from hypergrad.optimizers import SGD, Optimizer, Value
from tests.adapters import methods
from tests.adapters.methods import TASK, trainer


def check(learner: Trainer, steps: int, tol: float = 1e-6) -> None:
    """Compare the unrolled hypergradient with central differences through real training."""
    batches = learner.inner_batches(steps)
    report = check_hypergradient(
        Unrolled(learner.optimizer, steps=steps),
        learner.problem,
        learner.params,
        learner.hparams,
        batches.__getitem__,
        learner.outer_batch(),
        tol=tol,
    )
    assert report.passed, str(report)


def test_edited_gradients_reach_the_right_tensors() -> None:
    learner, twin = trainer(methods.Scaled), trainer(methods.Scaled)
    [batch] = twin.inner_batches(1)
    before = {name: value.detach().clone() for name, value in learner.params.items()}
    params = twin.params
    loss = twin.problem.inner_loss(params, twin.hparams, batch)
    grads = dict(zip(params, torch.autograd.grad(loss, list(params.values())), strict=True))
    learner.step()
    for name, value in learner.params.items():
        expected = before[name]
        if name.endswith("weight"):
            expected = expected - 0.1 * grads[name] * expected.norm()
        torch.testing.assert_close(value.detach(), expected)


class Weighted(methods.Confident):
    """The same weights with a gradient: what `detached` must not be."""

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Any) -> Tensor:
        return super().loss(model, hparams, {**batch, **self.detached(model, hparams, batch)})


class Unweighted(methods.Confident):
    """`Tensor.detach` inside the loss: right in training, wrong in hypergradients."""

    def detached(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Any
    ) -> dict[str, Tensor]:
        p = model(batch["x"]).softmax(dim=1).gather(1, batch["y"][:, None])[:, 0]
        return {"weight": p.detach() ** hparams["omega"]}


def hypergradient(learner: Trainer) -> float:
    batches = learner.inner_batches(6)
    estimator = Unrolled(learner.optimizer, steps=6)
    args = (learner.problem, learner.params, learner.hparams)
    found, _ = estimator(*args, batches.__getitem__, learner.outer_batch(), estimator.init(*args))
    return float(found.grad["omega"])


def test_detached_quantities_have_no_gradient_in_training_and_a_full_one_outside() -> None:
    task = TASK.to(torch.float64)
    learner, stopped, full = (
        trainer(kind, task) for kind in (methods.Confident, Unweighted, Weighted)
    )
    exact, wrong = hypergradient(learner), hypergradient(stopped)
    check(trainer(methods.Confident, task), steps=6)
    assert abs(exact - wrong) > 1e-3 * abs(exact)  # `check` is a thousand times finer
    for _ in range(5):
        assert learner.step() == pytest.approx(dict(stopped.step()))
        full.step()
    same, other = (x.evaluate("val")["loss"] for x in (stopped, full))
    assert learner.evaluate("val")["loss"] == pytest.approx(same, rel=1e-12)
    assert learner.evaluate("val")["loss"] != pytest.approx(other, rel=1e-6)


class Annealed(methods.Linear):
    """Learning rate, momentum and penalty that follow knots."""

    name = "annealed"
    space = Space(
        {
            **methods.Linear.space,
            "lr": Grad([0.3, 0.1, 0.02], low=1e-3, high=1.0, scale="log", schedule=3),
            "momentum": Grad([0.2, 0.8], low=0.0, high=0.99, schedule=2),
            "decay": Grad([0.05, 0.5], low=1e-3, high=1.0, scale="log", schedule=2),
        }
    )


def annealed(space: Space = Annealed.space, horizon: int | None = 8) -> Trainer:
    learner = Trainer.of(Annealed)(space, horizon=horizon)
    learner.setup(TASK.to(torch.float64), {}, seed=0)
    return learner


def test_schedules_are_followed_in_losses_and_optimizer() -> None:
    learner, twin = annealed(), annealed()
    model = learner.module().train()
    rule = torch.optim.SGD(model.parameters(), lr=1.0, momentum=1.0)
    values, space = twin.hparams, twin.space
    for t, batch in enumerate(twin.inner_batches(11)):
        now = {
            name: interpolate(cast(Grad, space[name]), value, min(1.0, t / 8)).item()
            for name, value in values.items()
        }
        rule.param_groups[0].update(lr=now["lr"], momentum=now["momentum"])
        loss = F.cross_entropy(model(batch["x"]), batch["y"])
        loss = loss + 0.5 * now["decay"] * sum(p.square().sum() for p in model.parameters())
        rule.zero_grad()
        loss.backward()
        rule.step()
        assert learner.step()["loss"] == pytest.approx(loss.item(), rel=1e-12)
    for name, value in model.named_parameters():
        torch.testing.assert_close(learner.params[name], value, rtol=1e-11, atol=1e-13)


def test_hypergradients_reach_every_knot() -> None:
    learner = annealed()
    learner.step()
    check(learner, steps=7)


def test_equal_knots_are_no_schedule() -> None:
    flat = annealed()
    for name, value in (("lr", 0.1), ("momentum", 0.5), ("decay", 0.01)):
        flat.set_hparams({name: torch.full_like(flat.hparams[name], value)})
    plain = trainer(methods.Linear, TASK.to(torch.float64))
    for _ in range(10):
        assert flat.step()["loss"] == pytest.approx(plain.step()["loss"], rel=1e-12)


def test_a_schedule_that_nobody_tunes_is_followed_too() -> None:
    fixed = annealed(Annealed.space.own(lr="fixed", momentum="fixed", decay="fixed"))
    moving = annealed()
    assert fixed.hparams == {}
    for _ in range(10):
        assert fixed.step()["loss"] == pytest.approx(moving.step()["loss"], rel=1e-12)


def test_a_schedule_needs_a_horizon() -> None:
    with pytest.raises(ValueError, match="lr, momentum, decay has a schedule"):
        annealed(horizon=None)
    with pytest.raises(ValueError, match="horizon must be at least 1"):
        annealed(horizon=0)


def test_tuning_moves_the_knots() -> None:
    learner = annealed()
    result = tune(learner, Descent(Unrolled(steps=4), lr=0.1), 8)
    assert result.schedule["lr"].shape[1:] == (3,)


def test_periodic_hooks_run_on_time_and_after_adoption() -> None:
    learner = trainer(methods.Normalized, interval=3)
    for _ in range(10):
        learner.step()
    assert learner.method.memory["calls"] == [3, 6, 9]
    assert learner.method.memory["steps"] == 10
    learner.inner_batches(7)
    learner.adopt(learner.params, learner.optimizer_state, 7)  # passes 12 and 15
    assert learner.method.memory["calls"] == [3, 6, 9, 17]


def test_hooks_edit_weights_and_optimizer_state() -> None:
    learner, twin = trainer(methods.Normalized, interval=2), trainer(methods.Normalized, interval=9)
    for _ in range(2):
        learner.step(), twin.step()
    for name, value in twin.params.items():
        torch.testing.assert_close(learner.params[name], 0.99 * value)
    assert learner.optimizer_state["momentum_buffer"] is None
    assert twin.optimizer_state["momentum_buffer"] is not None


class BadInterval(methods.Focal):
    """A hook whose interval is no hyperparameter."""

    @every("interval")
    def hook(self, state: State) -> None:
        raise AssertionError


def test_a_hook_needs_a_positive_interval() -> None:
    with pytest.raises(ValueError, match=r"BadInterval.hook: every\('interval'\)"):
        trainer(BadInterval)


class Counted(methods.Focal):
    """Asks for an artifact."""

    needs = ("counted",)

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        return SGD(lr=hyper("lr"))


made: list[tuple[str, int]] = []


@artifacts.register("counted")
def counted(task: Any, seed: int) -> nn.Module:
    """Says when it is made."""
    made.append((task.fingerprint, seed))
    torch.manual_seed(seed)
    return nn.Linear(2, 2)


def test_artifacts_are_made_once_for_a_task_and_seed_and_frozen() -> None:
    made.clear()
    one, two, other = (trainer(Counted, seed=seed) for seed in (0, 0, 1))
    trainer(Counted, TASK.to(torch.float64))
    assert len(made) == len(set(made)) == 3
    nets = [cast(nn.Linear, x.method.setting.artifacts["counted"]) for x in (one, two, other)]
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert not torch.equal(nets[0].weight, nets[2].weight)
    assert nets[0].weight.data_ptr() != nets[1].weight.data_ptr()  # copies
    assert not any(net.training or net.weight.requires_grad for net in nets)


def test_an_unknown_artifact_is_refused() -> None:
    kind = type("Needy", (methods.Focal,), {"needs": ("count",), "__doc__": "x"})
    with pytest.raises(ValueError, match="unknown artifact 'count'; did you mean 'counted'"):
        trainer(kind)


def test_the_adapter_merges_to_a_plain_network() -> None:
    learner = trainer(methods.Adapter, rank=2)
    for _ in range(3):
        learner.step()
    merged = learner.module()
    assert [n for n, _ in merged.named_parameters()] == [
        f"layers.{i}.{kind}" for i in (0, 1) for kind in ("bias", "weight")
    ]
    data = TASK.split("val")
    loss = F.cross_entropy(merged(data["x"]), data["y"])
    assert learner.evaluate("val")["loss"] == pytest.approx(loss.item(), rel=1e-5)
