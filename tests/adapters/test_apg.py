"""APG: its limits, invariances, and derivatives through the sampler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import tasks
from adapters.generation.apg import APG, frechet_distance, guided, sample
from adapters.generation.denoiser import Denoiser
from adapters.iteration import solve

GUIDANCE: dict[str, Any] = {"scale": 3.0, "parallel": 0.4, "cap": 0.8, "beta": -0.5}


def predictions(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(5, 2, 3, generator=generator, dtype=torch.float64) for _ in range(3)]
    return made[0], made[1], made[2]


def test_limits() -> None:
    conditional, unconditional, momentum = predictions()
    plain = {"scale": 4.0, "parallel": 1.0, "cap": None, "beta": 0.0}
    found, after = guided(conditional, unconditional, momentum, **plain)
    assert torch.allclose(found, unconditional + 4 * (conditional - unconditional))
    assert torch.equal(after, conditional - unconditional)
    one, _ = guided(conditional, unconditional, momentum, **{**GUIDANCE, "scale": 1.0})
    assert torch.equal(one, conditional)


def test_projection_cap_and_momentum() -> None:
    conditional, unconditional, momentum = predictions()
    across, after = guided(
        conditional, unconditional, momentum, **{**GUIDANCE, "parallel": 0.0, "scale": 2.0}
    )
    update = (across - conditional).flatten(1)
    assert (update * conditional.flatten(1)).sum(1).abs().max() < 1e-12
    assert torch.allclose(after, conditional - unconditional - 0.5 * momentum)
    full, _ = guided(
        conditional, unconditional, momentum, **{**GUIDANCE, "parallel": 1.0, "scale": 2.0}
    )
    norms = (full - conditional).flatten(1).norm(dim=1)
    expected = after.flatten(1).norm(dim=1).clamp(max=0.8)
    assert torch.allclose(norms, expected)
    # A constant difference accumulates to Δ (1 − βⁿ)/(1 − β).
    m = torch.zeros_like(conditional)
    for _ in range(7):
        _, m = guided(conditional, unconditional, m, **GUIDANCE)
    ratio = (1 - (-0.5) ** 7) / 1.5
    assert torch.allclose(m, ratio * (conditional - unconditional))


def test_equivariance_and_guards() -> None:
    conditional, unconditional, momentum = predictions()
    found, _ = guided(conditional, unconditional, momentum, **GUIDANCE)
    times = 2.5
    scaled, _ = guided(
        times * conditional,
        times * unconditional,
        times * momentum,
        **{**GUIDANCE, "cap": times * GUIDANCE["cap"]},
    )
    assert torch.allclose(scaled, times * found)
    alone, _ = guided(conditional[2:3], unconditional[2:3], momentum[2:3], **GUIDANCE)
    assert torch.allclose(alone, found[2:3])
    zero = torch.zeros_like(conditional)
    assert guided(zero, zero, zero, **GUIDANCE)[0].isfinite().all()


class Mixture(nn.Module):
    """The exact denoiser of one point a class: D = Σ_i softmax(−‖z − x_i‖²/2σ²)_i x_i."""

    n_classes = 3

    def __init__(self) -> None:
        super().__init__()
        self.points = torch.tensor([[1.0, 0.2], [-0.5, 0.9], [-0.6, -0.8]], dtype=torch.float64)

    def forward(self, z: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        # Classes overlap a little, so that conditioning is soft and guidance acts.
        away = -(z[:, None] - self.points).square().sum(2) / (2 * (sigma**2 + 0.3))
        prior = torch.where(labels[:, None] == torch.arange(3), 1.5, 0.0)
        return (away + prior).softmax(1) @ self.points


def run(values: Tensor, noise: Tensor, **more: Any) -> Tensor:
    names = ("scale", "parallel", "cap", "momentum")
    hparams = {**dict(zip(names, values, strict=True)), "capped": True, "steps": 8}
    hparams |= {"first": 0.0, "last": 1.0, **more}
    return sample(Mixture(), noise, torch.arange(len(noise)) % 3, hparams)  # type: ignore[arg-type]


def test_samples_are_differentiable_in_the_guidance() -> None:
    noise = torch.randn(9, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.randn(9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        return (weights * run(values, noise)).sum()

    values = torch.tensor([3.0, 0.4, 0.2, -0.5], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(values), values)
    steps = 1e-5 * torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        differences = torch.stack([(loss(values + e) - loss(values - e)) / 2e-5 for e in steps])
    assert torch.allclose(found, differences, rtol=1e-7, atol=1e-8)
    assert (found.abs() > 1e-4).all()
    loose = torch.tensor([3.0, 0.4, 50.0, -0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(loss(loose), loose)[0][2] == 0.0  # an inactive cap


def test_trajectories_do_not_share_momentum_and_intervals_switch_guidance_off() -> None:
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.tensor([5.0, 1.0, 1.0, -0.5], dtype=torch.float64)
    assert torch.equal(run(values, noise), run(values, noise))
    off = run(values, noise, first=0.5, last=0.5)
    one = torch.tensor([1.0, 1.0, 1.0, -0.5], dtype=torch.float64)
    assert torch.allclose(off, run(one, noise))


def test_the_distance_of_gaussians() -> None:
    """Against the closed form of commuting covariances."""
    one, two = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 1.0, 0.25])
    mean = torch.tensor([1.0, 2.0, 0.0])
    found = frechet_distance(mean, torch.diag(one), torch.zeros(3), torch.diag(two))
    assert found == pytest.approx(5.0 + float((one.sqrt() - two.sqrt()).square().sum()), rel=1e-5)
    assert abs(frechet_distance(mean, torch.diag(one), mean, torch.diag(one))) < 1e-5


def test_the_denoiser_returns_the_input_where_there_is_no_noise() -> None:
    torch.manual_seed(0)
    net = Denoiser(4, 3, width=8)
    z = torch.randn(5, 4)
    labels = torch.tensor([0, 1, 2, 3, 0])
    assert torch.allclose(net(z, torch.full((5, 1), 1e-6), labels), z, atol=1e-5)
    assert net(z, torch.full((5, 1), 1e4), labels).abs().max() < 5.0


@pytest.mark.slow
@pytest.mark.parametrize("scale", [3.0, 8.0])
def test_cap_and_negative_momentum_beat_plain_guidance(scale: float) -> None:
    task = tasks.get("digits", n_train=1000, n_val=480)
    plain = {"parallel": 1.0, "capped": False, "momentum": 0.0}
    careful = {"parallel": 1.0, "cap": 2.0, "momentum": -0.5}
    distance = {
        name: solve(APG, task, {"scale": scale, "batch": 500, **v}, max_steps=2).entries["loss"]
        for name, v in (("plain", plain), ("careful", careful))
    }
    assert distance["careful"] < 0.8 * distance["plain"]
