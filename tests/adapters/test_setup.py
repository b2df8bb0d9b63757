"""What `Trainer.setup` accepts, and which states belong to it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from adapters import Trainer, registry, tasks
from bilevel import Grad, Space
from tests.adapters import methods
from tests.adapters.methods import TASK, trainer


def test_shapes_follow_the_network_and_values_may_be_tensors() -> None:
    make = registry.get("network")
    learner = make()
    learner.setup(TASK, {"width": 16, "depth": 1, "layer_decay": 0.005}, seed=0)
    assert isinstance(learner, Trainer)
    count = 64 * 16 + 16 * 10
    assert learner.hparams["weight_decay"].shape == (count,)
    assert learner.hparams["layer_decay"].tolist() == pytest.approx([0.005, 0.005])
    assert learner.space["weight_decay"].shape == (count,)  # type: ignore[attr-defined]
    assert make.space["weight_decay"].shape == ()  # type: ignore[attr-defined]
    again = make()
    given = {**learner.hparams, "width": 16, "depth": 1}
    given["layer_decay"] = torch.tensor([0.001, 0.002])
    again.setup(TASK, given, seed=0)
    assert isinstance(again, Trainer)
    assert again.hparams["layer_decay"].tolist() == pytest.approx([0.001, 0.002])
    with pytest.raises(ValueError, match="layer_decay must have shape"):
        make().setup(TASK, {"depth": 1, "layer_decay": torch.ones(3) / 200}, seed=0)


def test_a_sampled_value_stands_for_all_elements() -> None:
    make = registry.get("network")
    space = make.space.own(weight_decay="sampler", layer_decay="sampler", dropout="fixed")
    learner = make(space)
    learner.setup(TASK, {"weight_decay": 0.003}, seed=0)
    assert isinstance(learner, Trainer)
    assert not {"weight_decay", "layer_decay", "dropout"} & set(learner.hparams)
    assert math.isfinite(learner.step()["loss"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "run.seed: 0 before, 1 now"),
        ({"batch": 32}, "run.constants.batch: 64 before, 32 now"),
        ({"task": tasks.get("digits", n_train=200)}, "run.task"),
    ],
)
def test_a_state_of_another_run_is_refused(change: dict[str, Any], message: str) -> None:
    state = trainer(methods.Linear).state_dict()
    with pytest.raises(ValueError, match=message):
        trainer(methods.Linear, **change).load_state_dict(state)


def test_a_state_of_other_owners_is_refused() -> None:
    state = trainer(methods.Linear).state_dict()
    other = Trainer.of(methods.Linear)(methods.Linear.space.own(momentum="grad"))
    other.setup(TASK, {}, seed=0)
    with pytest.raises(ValueError, match=r"run\.space"):
        other.load_state_dict(state)


class Untrainable(methods.Focal):
    """A network without a trained parameter."""

    def attach(self, model: nn.Module) -> None:
        model.requires_grad_(False)


def test_bad_methods_are_refused() -> None:
    with pytest.raises(ValueError, match="no parameter requires grad"):
        trainer(Untrainable)
    with pytest.raises(TypeError, match="must have a space"):
        Trainer.of(type("Spaceless", (methods.Method,), {"name": "spaceless", "__doc__": "x"}))
    space = Space(gamma=Grad(1.0, low=0.0, high=5.0))
    without_lr = type("NoRate", (methods.Focal,), {"space": space, "__doc__": "x"})
    with pytest.raises(ValueError, match="no active hyperparameter 'lr'"):
        trainer(without_lr)
    bad_scope = {"scopes": {"gamma": "later"}, "__doc__": "x"}
    with pytest.raises(ValueError, match="unknown phase 'later'"):
        Trainer.of(type("BadScope", (methods.Focal,), bad_scope))
