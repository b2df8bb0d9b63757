"""What the algorithm needs of a network whose weights respond to the hyperparameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from bilevel.inner import Inner
from bilevel.self_tuning.layout import Layout
from hypergrad.tree import Tree

__all__ = ["Mode", "ResponseModel", "Responsive", "Tensors", "response_model"]

Mode = Literal["stn", "delta"]

Tensors = dict[str, Tensor]
"""Responses and gates by name."""


class ResponseModel(ABC):
    """Weights w(s) = w + Θ s of an inner level, and its losses at them.

    Attributes:
        layout: of λ.
        can_linearize: whether `training_loss` has a linearized form.
        elsewhere: names that act on the data before it comes here.
    """

    layout: Layout
    can_linearize: bool
    elsewhere: tuple[str, ...] = ()

    @abstractmethod
    def initial(self, mode: Mode, generator: torch.Generator) -> Tensors:
        """Return responses and gates before training.

        Raises:
            ValueError: the network cannot be tuned in this mode.
        """

    @abstractmethod
    def draw(self) -> tuple[Any, Tensor | None]:
        """Return a training batch, and the λ' that it was augmented with, shape (rows, n)."""

    @abstractmethod
    def rows(self, batch: Any) -> int | None:
        """Return how many perturbations a batch takes; None: one for all examples."""

    @abstractmethod
    def training_loss(
        self,
        params: Tree,
        response: Tensors | None,
        shift: Tensor | None,
        coordinates: Tensor,
        batch: Any,
        linearized: bool = False,
    ) -> Tensor:
        """Return L_T at the weights w(shift) and the hyperparameters λ' = coordinates.

        Args:
            params: w.
            response: Θ; None for none.
            shift: s, shape (n,) or (rows, n); None for none.
            coordinates: λ', of the same shape, or (n,).
            batch: training batch.
            linearized: evaluate L_T at ŷ(w) + J Θ s, the first-order outputs, instead.
        """

    @abstractmethod
    def outer_loss(
        self, params: Tree, response: Tensors, shift: Tensor, coordinates: Tensor, batch: Any
    ) -> Tensor:
        """Return L_V at w(shift), in evaluation mode; differentiable in shift."""

    @abstractmethod
    def effective(self, params: Tree, response: Tensors, shift: Tensor) -> Tree:
        """Return the weights w(shift) for a shift of shape (n,)."""

    @abstractmethod
    def publish(self, center: Tensor, sigma: Tensor) -> None:
        """Tell the data side where λ is and how far to perturb it."""


@runtime_checkable
class Responsive(Protocol):
    """An inner level with response layers of its own."""

    def response_model(self) -> ResponseModel:
        """Return the network as the algorithm sees it."""
        ...


def response_model(inner: Inner) -> ResponseModel:
    """Return the response of an inner level: its own, or one on its parameter tensors."""
    if isinstance(inner, Responsive):
        return inner.response_model()
    from bilevel.self_tuning.leaves import LeafResponse

    return LeafResponse(inner)


def pairs(tensors: Mapping[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return response and gate of a parameter."""
    return tensors[f"response_{name}"], tensors[f"gate_{name}"]
