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


def test_frugal_keeps_a_state_of_some_tensor_at_its_default_density() -> None:
    """round(0.25 · 2) = 0 of two hidden layers."""
    made, _ = trained("frugal", 1)
    layers = {n: p.numel() for n, p in made.params.items()}
    split = [layers["layers.0.weight"], layers["layers.1.weight"]]
    state = made.state_dict()["optimizer"]["support/index"]
    assert len(state) - (sum(layers.values()) - sum(split)) in split


@pytest.mark.parametrize("name", ["galore", "gradnormlorp", "dct_adamw"])
def test_a_rank_above_the_smaller_side_raises_in_setup(name: str) -> None:
    made = registry.get(name)()
    with pytest.raises(ValueError, match="rank must be at most 16"):
        made.setup(TASK, {"rank": 17}, seed=0)


@pytest.mark.slow
def test_what_is_projected_out_is_worth_a_step() -> None:
    """FRUGAL's remainder and DCT-AdamW's feedback lower the training loss, for every projector."""
    deep = {s: tasks.get("digits_rotated", seed=s, hidden=(64, 64, 64, 64)) for s in range(3)}

    def loss(name: str, **values: Any) -> float:
        total = 0.0
        for seed, task in deep.items():
            made = registry.get(name)()
            assert isinstance(made, Trainer)
            made.setup(task, {"lr": 3e-3, **values}, seed=seed)
            for _ in range(75):
                made.step()
            total += made.evaluate("train")["loss"] / len(deep)
        return total

    for projector in ("block", "columns", "svd", "dct"):
        shared = {"projector": projector, "refresh": 25, "free_scale": 1.0}
        full = loss("frugal", remainder="sign", **shared)
        assert full < loss("frugal", remainder="none", **shared) - 0.2, projector
    with_feedback = loss("dct_adamw", rank=8, lr=1e-2)
    assert with_feedback < loss("dct_adamw", rank=8, lr=1e-2, error_feedback=False) - 0.1


def test_bad_projectors() -> None:
    with pytest.raises(ValueError, match="projector must be 'block'"):
        frugal_projector("fft", 0.5)
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], but got 2"):
        frugal_projector("columns", 2.0)
