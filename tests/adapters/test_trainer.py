"""The trainer: hooks, phases, buffers, schedules, artifacts and the registry."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import Method, Trainer, artifacts, every, registry, tasks
from bilevel import Descent, Fixed, Grad, Space, tune
from hypergrad import Hyper, Unrolled
from hypergrad.optimizers import SGD, Optimizer


class Plain(Method):
    """Cross entropy, nothing else."""

    name = "plain"
    space = Space(lr=Grad(0.1, low=0.0, high=1.0))


def start(method: type[Method], seed: int = 0, **options: Any) -> Trainer:
    learner = Trainer.of(method)(**options)
    learner.setup(tasks.get("digits", n_train=100), {}, seed=seed)
    return learner


def test_steps_are_those_of_torch_optim() -> None:
    learner = start(Plain)
    net = learner.module().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    twin = start(Plain)
    for _ in range(5):
        (batch,) = twin.inner_batches(1)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch["x"]), batch["y"]).backward()
        optimizer.step()
        learner.step()
    for name, parameter in net.named_parameters():
        assert torch.equal(learner.params[name], parameter)


class Edited(Plain):
    """Ignores the gradient of all biases."""

    name = "edited"

    def after_backward(
        self, grads: dict[str, Tensor], params: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        assert grads.keys() == params.keys()
        assert all(grads[name].shape == params[name].shape for name in grads)
        return {n: g if n.endswith("weight") else torch.zeros_like(g) for n, g in grads.items()}


def test_after_backward_sees_each_gradient_under_its_own_name() -> None:
    learner = start(Edited)
    before = {name: value.clone() for name, value in learner.params.items()}
    learner.step()
    for name, value in learner.params.items():
        assert torch.equal(value, before[name]) == name.endswith("bias"), name


class Hooked(Plain):
    """Counts its steps, and keeps one weight matrix at zero."""

    name = "hooked"

    def attach(self, model: nn.Module) -> None:
        self.memory["calls"] = []

    def after_step(self, state: Any) -> None:
        state.params["layers.0.weight"].zero_()

    @every(3)
    def record(self, state: Any) -> None:
        self.memory["calls"].append(state.step)


def test_hooks_edit_weights_by_name_and_run_at_their_interval() -> None:
    learner = start(Hooked)
    for _ in range(7):
        learner.step()
    assert learner.method.memory["calls"] == [3, 6]
    assert not learner.params["layers.0.weight"].any()
    assert learner.params["layers.1.weight"].any()
    again = start(Hooked)
    again.load_state_dict(learner.state_dict())
    again.step(), again.step()
    assert again.method.memory["calls"] == [3, 6, 9]


class TwoPhases(Plain):
    """Trains everything for four steps, then the last layer only."""

    name = "two-phases"
    phases = ("all", "head")

    def done(self, state: Any) -> bool:
        return bool(state.step == 4)

    def begin(self, phase: str, state: Any) -> None:
        for name, parameter in state.model.named_parameters():
            parameter.requires_grad_(name.startswith("layers.2"))


def test_a_later_phase_trains_what_it_says_and_resumes() -> None:
    learner = start(TwoPhases)
    for _ in range(4):
        learner.step()
    assert set(learner.params) == {"layers.2.weight", "layers.2.bias"}
    frozen = learner.module().layers[0].weight.clone()
    learner.step()
    state = learner.state_dict()
    rest = [dict(learner.step()) for _ in range(3)]
    assert torch.equal(learner.module().layers[0].weight, frozen)
    again = start(TwoPhases)
    again.load_state_dict(state)
    assert [dict(again.step()) for _ in range(3)] == rest
    assert dict(again.evaluate("test")) == dict(learner.evaluate("test"))


class Normalized(Plain):
    """A network with BatchNorm."""

    name = "normalized"

    def network(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))


def test_running_statistics_move_with_steps_and_not_with_pure_losses() -> None:
    learner = start(Normalized)
    statistics = dict(learner._model.named_buffers())["2.running_mean"]
    learner.step()
    assert statistics.any()
    kept = statistics.clone()
    hparams = {k: v.requires_grad_() for k, v in learner.hparams.items()}
    estimator = Unrolled(learner.optimizer, steps=3)
    args = (learner.problem, learner.params, hparams)
    batches = learner.inner_batches(3)
    found, state = estimator(
        *args, batches.__getitem__, learner.outer_batch(), estimator.init(*args)
    )
    learner.evaluate("val")
    assert torch.equal(statistics, kept)
    learner.adopt(found.params, state["optimizer"], steps=3)
    assert not torch.equal(statistics, kept)


class Scheduled(Method):
    """An L2 penalty with three knots."""

    name = "scheduled"
    space = Space(decay=Grad(0.1, low=0.0, schedule=3), lr=Fixed(0.1))

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        assert hparams["decay"].shape == ()
        squares = sum(p.square().sum() for p in model.parameters())
        return hparams["decay"] * squares  # type: ignore[no-any-return]


def test_knots_of_a_schedule_get_their_own_hypergradient() -> None:
    with pytest.raises(ValueError, match="decay has a schedule, so scheduled needs a horizon"):
        start(Scheduled)
    learner = start(Scheduled, horizon=40)
    found = tune(learner, Descent(Unrolled(steps=5), lr=0.1), 40)
    assert found.hparams["decay"].shape == (3,)
    assert len({round(float(v), 4) for v in found.hparams["decay"]}) == 3


class ScheduledRate(Plain):
    """A scheduled learning rate, which the update rule cannot follow inside a step."""

    name = "scheduled-rate"
    space = Space(lr=Grad(0.1, low=0.0, schedule=3))


def test_a_scheduled_optimizer_hyperparameter_is_refused() -> None:
    with pytest.raises(ValueError, match="lr has schedule=3"):
        start(ScheduledRate, horizon=10)


def test_artifacts_are_made_once_frozen_and_copied() -> None:
    made = []

    @artifacts.register("test_net")
    def make(task: Any, seed: int) -> nn.Module:
        made.append(seed)
        return nn.Linear(2, 2)

    class Needy(Plain):
        """Needs a frozen network."""

        name = "needy"
        needs = ("test_net",)

    one, two = start(Needy, 1), start(Needy, 1)
    start(Needy, 2)
    nets = [learner.method.setting.artifacts["test_net"] for learner in (one, two)]
    assert made == [1, 2]
    assert nets[0] is not nets[1]
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert not nets[0].weight.requires_grad

    class Unmet(Plain):
        """Needs something nobody makes."""

        name = "unmet"
        needs = ("no_such_artifact",)

    with pytest.raises(ValueError, match="unknown artifact 'no_such_artifact'"):
        start(Unmet)


class Frozen(Plain):
    """Nothing is left to train."""

    name = "frozen"

    def attach(self, model: nn.Module) -> None:
        model.requires_grad_(False)


def test_bad_methods_and_values() -> None:
    with pytest.raises(ValueError, match="no parameter requires grad"):
        start(Frozen)
    learner = start(Plain)
    with pytest.raises(ValueError, match="'decay' is not owned by the gradient"):
        learner.set_hparams({"decay": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"lr must have shape \(\), but got \(2,\)"):
        learner.set_hparams({"lr": torch.ones(2)})
    with pytest.raises(ValueError, match="has no hyperparameter 'other'"):
        Trainer.of(Plain)(Space(other=Grad(1.0)))
    with pytest.raises(TypeError, match="must have a name"):
        Trainer.of(type("Nameless", (Method,), {"__doc__": "x", "space": Space()}))


def test_registry_names_what_it_knows() -> None:
    with pytest.raises(ValueError, match=r"unknown learner 'netwrok'.*network"):
        registry.get("netwrok")
    assert registry.get("network") is registry.get("network")
    assert registry.describe()["network"].startswith("Perceptron")
    with pytest.raises(ValueError, match="there is a learner 'network' already"):
        registry.register(type("Other", (Plain,), {"name": "network", "__doc__": "x"}))
    registry.register(Plain)
    assert registry.get("plain").name == "plain"
    registry._registered.pop("plain")


class Own(Plain):
    """An update rule of its own."""

    name = "own"

    def optimizer(self, hyper: Any) -> Optimizer:
        assert hyper("lr") == Hyper("lr")
        return SGD(lr=hyper("lr"))


def test_another_update_rule() -> None:
    learner = start(Own)
    assert learner.optimizer == SGD(lr=Hyper("lr"))
    learner.step()
