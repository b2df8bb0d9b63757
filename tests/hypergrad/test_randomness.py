"""Seeded scopes and recorded random states."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hypergrad import seeded
from hypergrad.randomness import RandomState


def test_draws_depend_on_the_seed_alone() -> None:
    def draw(seed: int | Tensor) -> Tensor:
        with seeded(seed):
            return torch.nn.functional.dropout(torch.ones(50), 0.5) + torch.rand(50)

    first = draw(3)
    torch.rand(7)
    assert torch.equal(draw(3), first)
    assert torch.equal(draw(torch.tensor(3)), first)
    assert not torch.equal(draw(4), first)


def test_the_state_outside_does_not_notice() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with seeded(1), seeded(2):
        torch.rand(5)
    assert torch.equal(torch.rand(3), expected)


def test_the_state_is_put_back_after_an_error() -> None:
    before = torch.get_rng_state()
    with pytest.raises(KeyError), seeded(1):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), before)


def test_capture_and_restore() -> None:
    state = RandomState.capture(["cpu"])
    first = torch.rand(3)
    with state.restored_after():
        torch.rand(100)
    assert torch.equal(torch.rand(3), first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generator() -> None:
    def draw() -> Tensor:
        with seeded(3, ["cuda:0"]):
            return torch.rand(5, device="cuda:0")

    before = torch.cuda.get_rng_state()
    assert torch.equal(draw(), draw())
    assert torch.equal(torch.cuda.get_rng_state(), before)
