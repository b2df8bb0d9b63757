"""ALLoRA: the scaled gradients, and hypergradients through them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from adapters import Trainer, registry, tasks
from adapters.reparam import attach, maps
from adapters.weights import ALLoRA, LoRA
from hypergrad import Unrolled, check_hypergradient

D = torch.float64
ETA_SQ = 2.0


def parts(rows: int = 5, columns: int = 7, rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"A": (rank, columns), "A0": (rank, columns), "B": (rows, rank)}
    return {
        k: torch.randn(s, generator=generator, dtype=D).requires_grad_(k != "A0")
        for k, s in shapes.items()
    }


def gradients(reparam: ALLoRA, given: dict[str, Tensor], g: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        increment = reparam.increment(given)
        frozen = reparam.factor(increment), increment
    w = torch.zeros(5, 7, dtype=D)
    out = dataclasses.replace(reparam, frozen=frozen).weight(w, given)
    assert torch.allclose(out, increment, atol=1e-13), "the forward is that of LoRA"
    found = torch.autograd.grad((out * g).sum(), [given["A"], given["B"]])
    return found[0], found[1]


def test_gradients_are_scaled_row_by_row() -> None:
    """∂A = Bᵀ G̃ and ∂B = G̃ Aᵀ, G̃_i = G_i/√(‖M_i‖ + 1/η²), the norm not squared."""
    given, g = parts(), torch.randn(5, 7, dtype=D)
    reparam = ALLoRA(3, eta_sq=ETA_SQ)
    a = given["A"] + given["A0"]
    norms = (given["B"] @ a).norm(dim=1, keepdim=True)
    scaled = g / (norms + 1 / ETA_SQ).sqrt()
    found = gradients(reparam, given, g)
    assert torch.allclose(found[0], given["B"].T @ scaled, atol=1e-12)
    assert torch.allclose(found[1], scaled @ a.T, atol=1e-12)


def test_at_the_start_the_factor_is_eta() -> None:
    given, g = parts(), torch.randn(5, 7, dtype=D)
    given["B"] = torch.zeros(5, 3, dtype=D, requires_grad=True)
    a = given["A"] + given["A0"]
    of_a, of_b = gradients(ALLoRA(3, eta_sq=ETA_SQ), given, g)
    assert torch.allclose(of_b, ETA_SQ**0.5 * g @ a.T, atol=1e-12)
    assert not of_a.any()
    matrix = ALLoRA(3, granularity="matrix").factor(torch.ones(5, 7, dtype=D))
    assert torch.allclose(matrix, torch.full((5, 1), (35**0.5 + 0.5) ** -0.5, dtype=D))


def test_on_a_model_of_your_own_the_gradient_is_scaled_and_the_forward_is_loras() -> None:
    """Once a row has moved, its gradient is that of LoRA times (‖M_i‖ + 1/η²)^(−1/2)."""
    x, grads, outs = torch.randn(6, 7, dtype=D), [], []
    moved = torch.randn(5, 3, dtype=D)
    for reparam in (ALLoRA(3, eta_sq=ETA_SQ), LoRA(3)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5)).double()
        attach(model, reparam, generator=torch.Generator().manual_seed(3))
        part = maps(model)["0"]
        with torch.no_grad():
            part.parts["B"].copy_(moved)
            increment = model[0].weight - model[0].parametrizations["weight"].original
        out = model(x)
        outs.append(out.detach())
        grads.append(torch.autograd.grad(out.square().sum(), part.parts["B"])[0])
    assert torch.allclose(*outs, atol=1e-13)
    factor = (increment.norm(dim=1, keepdim=True) + 1 / ETA_SQ) ** -0.5
    assert torch.allclose(grads[0], factor * grads[1], atol=1e-10)


def test_hypergradient_of_eta_is_exact_and_a_detached_factor_is_not() -> None:
    """A plain stop-gradient is wrong by several percent; two views are exact."""
    learner = registry.get("allora")()
    assert isinstance(learner, Trainer)
    task = tasks.get("digits_transfer", hidden=(16, 16), activation="tanh")
    learner.setup(task.to(D), {"lr": 0.05}, seed=0)
    batches = learner.inner_batches(6)
    report = check_hypergradient(
        Unrolled(learner.optimizer, steps=6),
        learner.problem,
        learner.params,
        learner.hparams,
        batches.__getitem__,
        learner.outer_batch(),
        tol=1e-6,
    )
    assert report.passed, str(report)


def test_eta_is_positive() -> None:
    with pytest.raises(ValueError, match="eta_sq"):
        registry.get("allora")().setup(tasks.get("digits_transfer"), {"eta_sq": -1.0}, seed=0)
