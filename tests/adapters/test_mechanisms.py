"""Losses, blends, anchors, attacks and calibration against closed forms and brute force."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

from adapters.attacks import pgd
from adapters.blending import add_scaled, blend, fisher_diagonal, quadratic_anchor
from adapters.calibration import (
    area_under_risk_coverage,
    expected_calibration_error,
    rescued,
)
from adapters.losses import entropy, kl_to_anchor, mixed, smoothed_targets, soft_cross_entropy


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_soft_cross_entropy_and_smoothing() -> None:
    logits, y = random(6, 4).requires_grad_(), torch.tensor([0, 1, 2, 3, 0, 1])
    share = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    q = smoothed_targets(y, 4, share)
    assert torch.allclose(q.sum(1), torch.ones(6, dtype=torch.float64))
    loss = soft_cross_entropy(logits, q)
    plain = F.cross_entropy(logits, y, reduction="none")
    assert torch.allclose(loss, 0.7 * plain - 0.3 * logits.log_softmax(1).mean(1))
    (grad,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    assert torch.allclose(grad, logits.softmax(1) - q)
    (slope,) = torch.autograd.grad(loss.sum(), share)
    assert torch.allclose(slope, (-logits.log_softmax(1).mean(1) - plain).sum())
    with pytest.raises(ValueError, match="one shape"):
        soft_cross_entropy(logits, q[:3])


def test_the_anchor_costs_nothing_at_the_start() -> None:
    logits = random(5, 3).requires_grad_()
    loss = kl_to_anchor(logits, logits.detach()).sum()
    assert loss.abs() < 1e-14
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-14
    away = random(5, 3, seed=1)
    p = away.softmax(1)
    assert torch.allclose(
        kl_to_anchor(logits, away), (p * (p.log() - logits.log_softmax(1))).sum(1)
    )
    assert torch.allclose(entropy(torch.zeros(1, 8)), torch.tensor(8.0).log())


def test_mixing_is_one_permutation_and_one_share() -> None:
    x, q = random(7, 3), torch.eye(7, dtype=torch.float64)
    assert mixed(x, q, concentration=0.0) == (x, q)
    torch.manual_seed(0)
    mixed_x, mixed_q = mixed(x, q, concentration=0.5)
    assert torch.allclose(mixed_x, mixed_q @ x)
    assert torch.allclose(mixed_q.sum(1), torch.ones(7, dtype=torch.float64))


def test_blends_are_affine_and_exact_at_their_ends() -> None:
    start = {"a": random(3, 2), "n": torch.tensor(3)}
    end = {"a": random(3, 2, seed=1), "n": torch.tensor(5)}
    assert torch.equal(blend(start, end, 0.0)["a"], start["a"])
    assert torch.equal(blend(start, end, 1.0)["a"], end["a"])
    one, other = blend(start, end, 0.3)["a"], blend(start, end, 0.7)["a"]
    assert torch.allclose(one + other, start["a"] + end["a"])
    assert blend(start, end, 0.3)["n"] == 5
    w = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    loss = blend(start, end, {"a": w, "n": w})["a"].pow(3).sum()
    slope = (3 * (0.6 * start["a"] + 0.4 * end["a"]).square() * (end["a"] - start["a"])).sum()
    assert torch.allclose(torch.autograd.grad(loss, w)[0], slope)
    assert torch.allclose(add_scaled(start, {"a": end["a"]}, 2.0)["a"], start["a"] + 2 * end["a"])
    with pytest.raises(ValueError, match="only one has 'b'"):
        blend(start, {**end, "b": end["a"]}, 0.5)
    with pytest.raises(ValueError, match="one shape on both ends"):
        blend(start, {**end, "a": random(2, 2)}, 0.5)


def test_fisher_conventions_and_the_quadratic_anchor() -> None:
    w = random(3).requires_grad_()
    batches = list(random(4, 5, 3, seed=2))
    found = fisher_diagonal(lambda x: (x @ w).mean(), {"w": w}, batches)["w"]
    assert torch.allclose(found, torch.stack([b.mean(0).square() for b in batches]).mean(0))
    singles = fisher_diagonal(lambda x: (x @ w).mean(), {"w": w}, batches[0].split(1))["w"]
    assert torch.allclose(singles, batches[0].square().mean(0))
    pull = quadratic_anchor({"w": w + 2}, {"w": w.detach()}, {"w": found})
    assert torch.allclose(pull, 4 * found.sum())
    with pytest.raises(ValueError, match="at least one batch"):
        fisher_diagonal(lambda x: x, {"w": w}, [])


def test_attacks_stay_in_the_ball_and_never_lower_the_loss() -> None:
    x, v = torch.rand(8, 4, dtype=torch.float64), random(4)
    bad = pgd(lambda z: z @ v, x, 0.1, 5)
    assert (bad - x).abs().max() <= 0.1 + 1e-12
    # A linear loss is maximized at a corner of the ball, cut by the box.
    assert torch.allclose(bad, (x + 0.1 * v.sign()).clamp(0, 1))
    generator = torch.Generator().manual_seed(0)
    curved = pgd(lambda z: -(z - 0.5).square().sum(1), x, 0.2, 3, generator=generator)
    assert ((curved - 0.5).square().sum(1) <= (x - 0.5).square().sum(1) + 1e-12).all()
    assert torch.equal(pgd(lambda z: z @ v, x, 0.0, 1), x)
    with pytest.raises(ValueError, match="epsilon must be at least 0"):
        pgd(lambda z: z @ v, x, -0.1, 1)


def test_calibration() -> None:
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 0.5], [0.5, 0.0]])
    labels = torch.tensor([0, 1, 1, 1])
    high, low = torch.sigmoid(torch.tensor([2.0, 0.5])).tolist()
    expected = (abs(1 - 2 * high) + abs(1 - 2 * low)) / 4
    assert expected_calibration_error(logits, labels) == pytest.approx(expected, abs=1e-6)
    # Errors at ranks 2 and 4 of 4.
    risks = [0, 1 / 2, 1 / 3, 2 / 4]
    assert area_under_risk_coverage(logits, labels) == pytest.approx(250 * sum(risks))
    first, second = torch.tensor([[1.0, 0.0, 0.9]]), torch.tensor([[0.0, 1.0, 0.9]])
    third = torch.tensor([2])
    assert rescued(first, second, (first + second) / 2, third) == 1.0
    assert rescued(first, second, first, third) == 0.0
