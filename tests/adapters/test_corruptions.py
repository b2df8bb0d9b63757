"""Corruptions: the formulas, no change at strength zero, and seeds."""

from __future__ import annotations

import pytest
import torch

from adapters.corruptions import CORRUPTIONS, corrupt, corrupt_randomly

X = torch.rand(50, 2, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_strength_and_seed_decide(name: str) -> None:
    assert torch.equal(corrupt(X, name, 0.0, seeded()), X)
    once, again = (corrupt(X, name, 0.9, seeded()) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.equal(once, X)
    assert once.shape == X.shape
    assert 0.0 <= float(once.min()) <= float(once.max()) <= 1.0
    single = corrupt(X.float(), name, 0.9, seeded())
    assert torch.allclose(single, once.float(), atol=1e-6)


def test_formulas() -> None:
    assert torch.allclose(corrupt(X, "inversion", 1.0, seeded()), 1 - X)
    assert torch.allclose(corrupt(X, "contrast", 1.0, seeded()), 0.5 + 0.15 * (X - 0.5))
    assert torch.allclose(corrupt(X, "brightness", 0.5, seeded()), 0.7 * X + 0.3)
    blank = (corrupt(X, "dropout", 1.0, seeded()) == 0).double().mean()
    assert abs(blank - 0.35) < 0.02
    extreme = corrupt(X, "salt_pepper", 1.0, seeded())
    assert abs(((extreme == 0) | (extreme == 1)).double().mean() - 0.25) < 0.02
    flat = torch.ones(1, 1, 5, 5)
    assert torch.allclose(corrupt(flat, "blur", 1.0, seeded())[0, 0, 1:4, 1:4], torch.ones(3, 3))
    # A shifted image keeps what stays inside, pixel for pixel.
    dot = torch.zeros(40, 1, 9, 9)
    dot[:, :, 4, 4] = 1.0
    moved = corrupt(dot, "shift", 1.0, seeded())
    assert moved.sum() == 40
    places = {tuple(p[1:].tolist()) for p in moved[:, 0].nonzero()}
    assert places <= {(i, j) for i in range(2, 7) for j in range(2, 7)}
    assert len(places) > 5


def test_each_image_by_one_of_the_names() -> None:
    out = corrupt_randomly(X, ["inversion"], 1.0, 0.5, seeded())
    changed = (out != X).flatten(1).any(1)
    assert torch.allclose(out[changed], 1 - X[changed])
    assert 10 < int(changed.sum()) < 40


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"unknown corruption 'blurr'.*blur"):
        corrupt(X, "blurr", 1.0, seeded())
    with pytest.raises(ValueError, match=r"strength must lie in \[0, 1\], but got 1.5"):
        corrupt(X, "blur", 1.5, seeded())
    with pytest.raises(ValueError, match="must have shape"):
        corrupt(X[0], "blur", 1.0, seeded())
