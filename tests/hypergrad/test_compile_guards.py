"""What a compiled loss reads beside its arguments is watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hypergrad import module_problem
from hypergrad.compiled.guards import Guards

SCALE = torch.ones(())


def test_the_module_of_a_problem_is_watched() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))

    def loss(module: nn.Module, hparams: Any, batch: Tensor) -> Tensor:
        out: Tensor = module(batch).sum()
        return out

    guards = Guards(module_problem(net, loss, loss)[0].inner_loss)
    assert guards.hold()
    net.eval()
    assert not guards.hold()
    net.train()
    assert guards.hold()
    net[0].weight = nn.Parameter(torch.zeros(2, 2))
    assert not guards.hold()


def test_globals_and_closures_are_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"power": 2}

    def loss(params: Tensor, hparams: Any, batch: Any) -> Tensor:
        return (SCALE * params).pow(options["power"]).sum()

    guards = Guards(loss)
    assert guards.hold()
    options["power"] = 3
    assert not guards.hold()
    options["power"] = 2
    monkeypatch.setitem(globals(), "SCALE", torch.zeros(()))
    assert not guards.hold()
