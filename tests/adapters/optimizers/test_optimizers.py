"""FRUGAL, GaLore, DCT-AdamW and GradNormLoRP as methods: limits and exact gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import Trainer, registry, tasks
from adapters.optimizers.frugal import frugal_projector

D = torch.float64
TASK = tasks.get("digits_transfer", hidden=(32, 16), activation="tanh").to(D)


def trained(name: str, steps: int = 12, **values: Any) -> tuple[Trainer, dict[str, Tensor]]:
    made = registry.get(name)()
    made.setup(TASK, {"lr": 0.01, **values}, seed=0)
    assert isinstance(made, Trainer)
    for _ in range(steps):
        made.step()
    return made, made.params


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[name] - two[name]).detach().abs().max()) for name in one)


def test_frugal_at_full_density_is_adam() -> None:
    _, adam = trained("finetune")
    for projector in ("block", "columns", "rows", "entries"):
        values = {"projector": projector, "density": 1.0, "refresh": 1000}
        _, found = trained("frugal", **values)
        assert difference(adam, found) < 1e-12, projector


def test_frugal_without_remainder_is_galore() -> None:
    square = tasks.get("digits_transfer", hidden=(32, 32), activation="tanh").to(D)
    options = {"refresh": 1000, "lr": 0.01}
    frugal = {"projector": "svd", "density": 0.25, "remainder": "none", "projected_scale": 0.5}
    found = []
    for name, values in (("frugal", frugal), ("galore", {"rank": 8, "scale": 0.5})):
        made = registry.get(name)()
        made.setup(square, {**options, **values}, seed=0)
        assert isinstance(made, Trainer)
        for _ in range(12):
            made.step()
        found.append(made.params)
    assert difference(*found) < 1e-12


def test_one_galore_step_lies_in_r_directions() -> None:
    made = registry.get("galore")()
    made.setup(TASK, {"rank": 3}, seed=0)
    assert isinstance(made, Trainer)
    before = made.params
    made.step()
    for name in ("layers.0.weight", "layers.1.weight"):
        change = (made.params[name] - before[name]).detach()
        assert int(torch.linalg.matrix_rank(change, rtol=1e-9)) == 3


def test_gradnormlorp_starts_at_the_network_and_its_gradients_are_tangent() -> None:
    """∂v ⟂ v in each row; the released code leaves that part out."""
    made = registry.get("gradnormlorp")()
    made.setup(TASK, {}, seed=0)
    plain = registry.get("finetune")()
    plain.setup(TASK, {}, seed=0)
    assert isinstance(made, Trainer)
    assert made.evaluate("val")["loss"] == pytest.approx(plain.evaluate("val")["loss"], rel=1e-12)
    batch = made.inner_batches(1)[0]
    params = made.params
    loss = made.problem.inner_loss(params, made.hparams, batch)
    name = "layers.0.parametrizations.weight.original1"
    v = params[name]
    (grad,) = torch.autograd.grad(loss, v)
    assert float((grad * v.detach()).sum(dim=1).abs().max()) < 1e-12
    assert float(grad.norm()) > 1e-6


def test_gradnormlorp_merges_to_a_plain_network() -> None:
    made, _ = trained("gradnormlorp", 5)
    x = TASK.split("val")["x"]
    model = made.module()
    assert set(model.state_dict()) == {
        f"layers.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")
    }
    loss = torch.nn.functional.cross_entropy(model(x), TASK.split("val")["y"])
    assert float(loss.detach()) == pytest.approx(made.evaluate("val")["loss"], rel=1e-9)


def test_bad_projectors() -> None:
    with pytest.raises(ValueError, match="projector must be 'block'"):
        frugal_projector("dct", 0.5)
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], but got 2"):
        frugal_projector("columns", 2.0)
