"""Tensors in the places of a module's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hypergrad.swap import Swap


class Tied(nn.Module):
    """One matrix as encoder and decoder, and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(3, 3, bias=False)
        self.decode = nn.Linear(3, 3, bias=False)
        self.decode.weight = self.encode.weight
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1
        out: Tensor = self.decode(self.encode(x))
        return out


def test_tied_weights_are_one_and_replaced_buffers_come_back() -> None:
    net, x, weight = Tied(), torch.randn(2, 3), torch.randn(3, 3)
    swap, own = Swap(net), net.encode.weight
    with swap.filled({"encode.weight": weight}):
        assert torch.allclose(net(x), x @ weight.T @ weight.T)
    assert net.encode.weight is own
    assert net.decode.weight is own
    with swap.filled({"count": torch.ones(())}):
        net(x)
        assert net.count == 2
    assert net.count == 1


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_against_functional_call(kind: type[nn.RNNBase]) -> None:
    net, x = kind(3, 4), torch.randn(5, 2, 3)
    swapped = {n: torch.randn_like(p).requires_grad_() for n, p in net.named_parameters()}
    with Swap(net).filled(swapped):
        ours = net(x)[0]
    reference = torch.func.functional_call(net, swapped, (x,))[0]
    assert torch.equal(ours, reference)
    for a, b in zip(
        torch.autograd.grad(ours.sum(), list(swapped.values())),
        torch.autograd.grad(reference.sum(), list(swapped.values())),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_the_module_is_whole_again_after_an_error() -> None:
    net = Tied()
    own = net.encode.weight
    with pytest.raises(RuntimeError), Swap(net).filled({"encode.weight": torch.randn(2, 2)}):
        net(torch.randn(2, 3))
    assert net.encode.weight is own
    with (
        pytest.raises(ValueError, match="'weight' is not a tensor of the module"),
        Swap(net).filled({"encode.weight": torch.randn(3, 3), "weight": torch.randn(3, 3)}),
    ):
        pass
    assert net.encode.weight is own
