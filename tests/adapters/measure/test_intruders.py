"""Intruder dimensions: known constructions, monotonicity, invariances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adapters.measure import effective_rank, intruder_penalty, intruders, shrink_intruders

D = torch.float64


def matrix(rows: int = 64, columns: int = 128, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=D)


def rank_one(c: float, w: Tensor) -> Tensor:
    """W₀ + c σ₁ u vᵀ for random unit u, v."""
    u, v = matrix(64, 1, 3), matrix(128, 1, 4)
    return w + c * torch.linalg.svdvals(w)[0] * (u / u.norm()) @ (v / v.norm()).T


@pytest.mark.parametrize("side", ["left", "right"])
def test_none_without_new_directions(side: str) -> None:
    w = matrix()
    assert intruders(w, w, side=side).count == 0  # type: ignore[arg-type]
    assert intruders(w, -3 * w, side=side).count == 0  # type: ignore[arg-type]
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    moved = (u * (sigma * torch.linspace(0.5, 2, 64, dtype=D))) @ vt
    assert intruders(w, moved, side=side).count == 0  # type: ignore[arg-type]


def test_a_strong_random_direction_is_exactly_one_intruder() -> None:
    w = matrix()
    assert [intruders(w, rank_one(c, w)).count for c in (0.1, 0.5, 1.0, 3.0)] == [0, 0, 1, 1]


def test_counts_grow_with_epsilon_and_k_and_do_not_see_rotations() -> None:
    w, noisy = matrix(), matrix() + matrix(seed=5)
    by_epsilon = [intruders(w, noisy, epsilon=e).count for e in (0.2, 0.4, 0.6, 0.8, 0.95)]
    by_k = [intruders(w, noisy, epsilon=0.6, k=k).count for k in (1, 5, 10, 40, 64)]
    assert by_epsilon == sorted(by_epsilon)
    assert by_k == sorted(by_k)
    assert by_epsilon[-1] > by_epsilon[0]
    q, _ = torch.linalg.qr(matrix(64, 64, 7))
    p, _ = torch.linalg.qr(matrix(128, 128, 8))
    turned = intruders(q @ w @ p, q @ noisy @ p, epsilon=0.6)
    assert torch.allclose(turned.similarity, intruders(w, noisy).similarity, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_shrinking_is_linear_and_removes_exactly_the_intruders(side: str) -> None:
    w = matrix()
    after = rank_one(2.0, w)
    found = intruders(w, after, side=side)  # type: ignore[arg-type]
    assert found.count == 1
    assert torch.equal(shrink_intruders(w, after, 1.0, side=side), after)  # type: ignore[arg-type]
    sigma = torch.linalg.svdvals(after)[:10][found.found]
    for factor in (0.0, 0.4):
        shrunk = shrink_intruders(w, after, factor, side=side)  # type: ignore[arg-type]
        distance = float((shrunk - after).norm())
        assert distance == pytest.approx((1 - factor) * float(sigma.norm()), rel=1e-9)
    assert found.energy == pytest.approx(float(sigma.square().sum() / after.square().sum()))
    factor = torch.tensor(0.7, dtype=D, requires_grad=True)
    target = matrix(seed=9)
    (shrink_intruders(w, after, factor, side=side) * target).sum().backward()  # type: ignore[arg-type]
    removed = after - shrink_intruders(w, after, 0.0, side=side)  # type: ignore[arg-type]
    assert factor.grad is not None
    assert float(factor.grad) == pytest.approx(float((removed * target).sum()), rel=1e-9)


def test_the_surrogate_follows_the_count_and_has_a_derivative() -> None:
    w = matrix(16, 20)
    after = (w + 0.5 * matrix(16, 20, 2)).requires_grad_()
    (grad,) = torch.autograd.grad(intruder_penalty(w, after, k=5), after)
    direction = matrix(16, 20, 6)

    def at(t: float) -> float:
        return float(intruder_penalty(w, after.detach() + t * direction, k=5))

    slope = float((grad * direction).sum())
    assert slope == pytest.approx((at(1e-5) - at(-1e-5)) / 2e-5, rel=1e-6)
    big = matrix()
    assert intruder_penalty(big, big) < intruder_penalty(big, rank_one(3.0, big))


def test_effective_rank() -> None:
    assert effective_rank(torch.eye(5, dtype=D)) == pytest.approx(5.0)
    assert effective_rank(torch.zeros(3, 4)) == 0.0
    assert effective_rank(torch.outer(torch.ones(3), torch.ones(4))) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must lie in 1 ... 64, but got 0"),
        ({"k": 65}, "k must lie in 1 ... 64, but got 65"),
        ({"epsilon": 1.0}, r"epsilon must lie in \(0, 1\), but got 1.0"),
        ({"side": "both"}, "side must be 'left' or 'right'"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        intruders(matrix(), matrix(), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="matrices of one shape"):
        intruders(matrix(), matrix(64, 127))
