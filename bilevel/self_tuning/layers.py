"""Feed-forward layers whose weights respond to the hyperparameters.

Each parameter p of a layer has a response R of the same shape and a gate G, shape (rows, n):

    p(s) = p + diag(G s) R,        s the shift of λ, see `Perturbation`,

rows being output units (columns for an embedding).  For a Linear layer and one shift per example

    y_b = W x_b + b + (U s_b) ⊙ (W_R x_b) + (V s_b) ⊙ b_R,

two matrix products for any number of different weights (MacKay et al. 2019, eq. 9–10; Bae &
Grosse 2020, eq. 14).  Without a shift a layer is the plain one, at the plain cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bilevel.self_tuning.perturbation import Perturbation, broadcast, dropout_mask

__all__ = [
    "Response",
    "ResponseConv1d",
    "ResponseConv2d",
    "ResponseEmbedding",
    "ResponseLinear",
    "initial_response",
    "materialize",
]


def initial_response(
    name: str, shape: tuple[int, ...], fan_in: int, mode: str, generator: torch.Generator
) -> Tensor:
    """Return the initial value of a response or a gate, by its name.

    Responses are uniform in ±1/√fan_in, as the weights of the plain layers are.  Gates are zero
    in Δ-STN, which starts as the plain network, and N(0, 0.01²) in STN.
    """
    if name.startswith("gate_"):
        gate = torch.zeros(shape)
        return gate if mode == "delta" else gate.normal_(0.0, 0.01, generator=generator)
    bound = 1 / math.sqrt(max(1, fan_in))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def materialize(weight: Tensor, response: Tensor, gate: Tensor, shift: Tensor, dim: int) -> Tensor:
    """Return weight + diag(gate · shift) response, `dim` the dimension that the gate scales.

    Args:
        weight: p.
        response: R, like p.
        gate: G, shape (p.shape[dim], n).
        shift: s, shape (n,).
        dim: 0 for rows, 1 for columns.
    """
    factor = F.linear(shift, gate)
    shape = [1] * weight.dim()
    shape[dim] = len(factor)
    return torch.addcmul(weight, factor.view(shape), response)


class Response(nn.Module):
    """What response layers share.  `convert` turns a plain layer into one.

    Attributes:
        perturbation: shared by the network.
        responding: names of the parameters with a response.
        dropconnect: hyperparameter that is the rate at which weights are dropped; None for none.
        plain_type: what the layer was before.
        gated_dim: dimension of a parameter that the gate scales.
    """

    perturbation: Perturbation
    responding: tuple[str, ...]
    dropconnect: tuple[str, int | None] | None
    plain_type: type[nn.Module]
    gated_dim: ClassVar[int] = 0

    def attach(self, n: int, perturbation: Perturbation, respond: bool = True) -> None:
        """Add responses and gates for n hyperparameters to a plain layer; none if not `respond`."""
        self.perturbation, self.dropconnect = perturbation, None
        own = {
            k: p
            for k, p in self._parameters.items()
            if respond and p is not None and p.requires_grad
        }
        self.responding = tuple(own)
        for name, weight in own.items():
            gate = weight.new_zeros(weight.shape[self.gated_dim], n)
            self.register_parameter(
                f"response_{name}", nn.Parameter(torch.zeros_like(weight), requires_grad=False)
            )
            self.register_parameter(f"gate_{name}", nn.Parameter(gate, requires_grad=False))

    def detach(self) -> None:
        """Take responses and gates away again, and be the plain layer."""
        for name in self.responding:
            del self._parameters[f"response_{name}"], self._parameters[f"gate_{name}"]
        self.__class__ = self.plain_type  # type: ignore[assignment]
        del self.perturbation, self.responding, self.dropconnect, self.plain_type

    def response_shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return shape and fan-in of each response and gate."""
        found = {}
        fan_in = self._fan_in()
        for name in self.responding:
            for key in (f"response_{name}", f"gate_{name}"):
                found[key] = (tuple(cast(Tensor, self._parameters[key]).shape), fan_in)
        return found

    def _fan_in(self) -> int:
        widest = max((p for p in self.parameters(recurse=False)), key=lambda p: p.dim())
        return widest[0].numel()

    def pair(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return a parameter, its response and its gate; None where it has none."""
        found = [self._parameters.get(f"{kind}_{name}") for kind in ("response", "gate")]
        return cast(Tensor, self._parameters[name]), found[0], found[1]

    def effective(self, shift: Tensor) -> dict[str, Tensor]:
        """Return the parameters at a shift of shape (n,)."""
        found = {}
        for name in self.responding:
            weight, response, gate = self.pair(name)
            assert response is not None
            assert gate is not None
            found[name] = materialize(weight, response, gate, shift, self.gated_dim)
        return found

    def factor(self, name: str) -> Tensor | None:
        """Return G s of a parameter, shape (d,) or (rows, d); None without response or shift."""
        shift, gate = self.perturbation.shift, self._parameters.get(f"gate_{name}")
        return None if shift is None or gate is None else F.linear(shift, gate)

    def moved(self, name: str) -> Tensor | None:
        """Return (G s) ⊙ R of a bias, shape (d,) or (rows, d); None as `factor`."""
        factor, response = self.factor(name), self._parameters.get(f"response_{name}")
        return None if factor is None or response is None else factor * response

    def masked(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Return a parameter and its response, both under one DropConnect mask in training."""
        weight, response, _ = self.pair(name)
        if self.dropconnect is None or not self.training:
            return weight, response
        rate = pick(self.perturbation.values, self.dropconnect)
        mask = dropout_mask(rate, self._mask_shape(weight), weight)
        return weight * mask, None if response is None else response * mask

    def _mask_shape(self, weight: Tensor) -> torch.Size | tuple[int, ...]:
        return weight.shape


def pick(values: Mapping[str, Any], key: tuple[str, int | None]) -> Any:
    """Return a hyperparameter, or one element of it, from the values of a call."""
    name, index = key
    value = values[name]
    return value if index is None else value[..., index]


def affine(
    layer: Response,
    x: Tensor,
    apply: Any,
    weight: str,
    bias: str | None,
    dim: int = -1,
    dropconnect: bool = True,
) -> Tensor:
    """Return apply(x, weight, bias) with the response of both.

    Args:
        layer: holds the parameters.
        x: input.
        apply: ``(x, weight, bias) -> y``, linear in weight and bias.
        weight: name of the weight.
        bias: name of the bias; None for none.
        dim: dimension of the outputs in y.
        dropconnect: whether the layer's DropConnect acts on this weight.
    """
    w, response = layer.masked(weight) if dropconnect else layer.pair(weight)[:2]
    b = None if bias is None else cast(Tensor, layer._parameters[bias])
    p = layer.perturbation
    y = p.through(x, lambda v: apply(v, w, b), lambda v: apply(v, w, None))
    total: Tensor | None = None
    factor = layer.factor(weight)
    what = type(layer).__name__
    if factor is not None and response is not None:
        scale, product = broadcast(factor, y, dim, what), apply(p.seen(x), response, None)
        if p.linearized:
            total = scale * product
        else:
            y = torch.addcmul(y, scale, product)
    offset = None if bias is None else layer.moved(bias)
    if offset is not None:
        moved = broadcast(offset, y, dim, what)
        total = moved if total is None else total + moved
    return y if total is None else p.add(y, total)


class ResponseLinear(Response, nn.Linear):
    """`torch.nn.Linear` that responds; rows of the weight are scaled."""

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Linear`; the first dimension holds the examples."""
        bias = None if self.bias is None else "bias"
        return affine(self, input, F.linear, "weight", bias)


class _ResponseConv(Response):
    def forward(self, input: Tensor) -> Tensor:
        """See the plain layer; batched inputs only."""
        bias = None if self._parameters["bias"] is None else "bias"
        return affine(self, input, self._conv_forward, "weight", bias, dim=1)


class ResponseConv1d(_ResponseConv, nn.Conv1d):
    """`torch.nn.Conv1d` that responds; output channels are scaled."""


class ResponseConv2d(_ResponseConv, nn.Conv2d):
    """`torch.nn.Conv2d` that responds; output channels are scaled."""


class ResponseEmbedding(Response, nn.Embedding):
    """`torch.nn.Embedding` that responds; columns are scaled, DropConnect drops whole rows."""

    gated_dim: ClassVar[int] = 1

    def forward(self, input: Tensor) -> Tensor:
        """See `torch.nn.Embedding`; the first dimension holds the examples."""

        def look(index: Tensor, weight: Tensor, bias: None) -> Tensor:
            return F.embedding(index, weight, self.padding_idx)

        p = self.perturbation
        weight, response = self.masked("weight")
        y, factor = look(input, weight, None), self.factor("weight")
        if factor is None or response is None:
            return y
        return p.add(y, broadcast(factor, y, -1, "Embedding") * look(input, response, None))

    def _fan_in(self) -> int:
        return 1  # the plain layer starts at N(0, 1)

    def _mask_shape(self, weight: Tensor) -> tuple[int, ...]:
        return (len(weight), 1)
