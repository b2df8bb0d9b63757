"""What response layers see during a call: the shift of λ, and how to respond to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["Perturbation", "broadcast", "dropout_mask", "pack", "unpack"]


@dataclass
class Perturbation:
    """Shared by all response layers of one network; set for the time of a call.

    Attributes:
        shift: λ' - λ0 (centered) or λ' (STN), shape (n,) or (rows, n); None: no response.
        linearized: responses are carried as tangents beside the activations (forward-mode
            derivative at zero response), and the activations themselves stay unresponsive.
        values: constrained hyperparameters of the call by name.
    """

    shift: Tensor | None = None
    linearized: bool = False
    values: Mapping[str, Any] = field(default_factory=dict)

    @contextmanager
    def active(
        self, shift: Tensor | None, values: Mapping[str, Any], linearized: bool = False
    ) -> Iterator[None]:
        """Respond to a shift inside the block."""
        before = self.shift, self.linearized, self.values
        self.shift, self.linearized, self.values = shift, linearized, values
        try:
            yield
        finally:
            self.shift, self.linearized, self.values = before

    def seen(self, x: Tensor) -> Tensor:
        """Return the input that a response multiplies: x, or its value alone when linearized.

        In J(w₀)·Θε the response of one layer does not act on that of an earlier one.
        """
        return unpack(x)[0].detach() if self.linearized else x

    def through(
        self,
        x: Tensor,
        apply: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Return apply(x) for a linear or affine map, its tangent made by the linear part.

        Eager forward-mode derivatives of such maps cost several times the map itself (missing
        tangents become zero tensors, which are added in Python), so they are not used here.
        """
        if not self.linearized:
            return apply(x)
        value, tangent = unpack(x)
        y = apply(value)
        if tangent is None:
            return y
        with torch.no_grad():
            moved = (derivative or apply)(tangent.detach())
        return pack(y, moved)

    def add(self, y: Tensor, response: Tensor) -> Tensor:
        """Return y + response; when linearized, y with the response added to its tangent.

        There the value stays that of y, but keeps the response in its graph (as a zero): a
        cotangent g that comes back to y also reaches the response.  So one backward through
        the values gives d/dΘ of L(ŷ + J Θ ε) for g = ∇L(ŷ + J Θ ε): a vector-Jacobian product
        with J, and no derivative of the tangents is ever taken.
        """
        if not self.linearized:
            return y + response
        value, tangent = unpack(y)
        still = response.detach()
        moved = still if tangent is None else tangent.detach() + still
        return pack(value + (response - still), moved.expand_as(value))


def unpack(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the value of a tensor and the tangent that it carries, None for none."""
    value, tangent = forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
    return value, tangent


def pack(value: Tensor, tangent: Tensor) -> Tensor:
    """Return the tensor with a tangent."""
    return forward_ad.make_dual(value, tangent)  # type: ignore[no-any-return,no-untyped-call]


def broadcast(gate: Tensor, like: Tensor, dim: int, what: str) -> Tensor:
    """Return per-example (rows, d) or shared (d,) factors in a shape that multiplies `like`.

    Args:
        gate: the factors.
        like: an activation, its first dimension the examples.
        dim: the dimension of size d in `like`, -1 or 1.
        what: the layer, for the message.

    Raises:
        ValueError: the first dimension of `like` is not the number of perturbed examples.
    """
    if gate.dim() == 2 and (like.dim() < 2 or like.shape[0] != gate.shape[0]):
        raise ValueError(
            f"{what} got an input of {tuple(like.shape)}, but {gate.shape[0]} examples are "
            "perturbed; keep the examples in the first dimension throughout the network."
        )
    shape = [1] * like.dim()
    shape[dim] = gate.shape[-1]
    if gate.dim() == 2:
        shape[0] = gate.shape[0]
    return gate.view(shape)


def dropout_mask(rate: Tensor | float, shape: torch.Size | tuple[int, ...], like: Tensor) -> Tensor:
    """Return a mask that is 0 at a rate, and 1/(1 - rate) elsewhere.

    Args:
        rate: in [0, 1); broadcasts against the mask.
        shape: of the mask.
        like: gives dtype and device.
    """
    rate = torch.as_tensor(rate, dtype=like.dtype, device=like.device).detach()
    return (torch.rand(shape, dtype=like.dtype, device=like.device) >= rate) / (1 - rate)
