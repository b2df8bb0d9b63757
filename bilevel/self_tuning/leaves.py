"""A response on the parameter tensors of any inner level, with one perturbation per batch.

    p(s) = p + diag(G s) R        for each trained tensor p, rows along its first dimension.

It needs nothing but the losses, so every `Trainer` learner and every bare `Problem` can be tuned.
For a vector p the response is unstructured: any Jacobian (d, n) can be represented.
"""

from __future__ import annotations

from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.inner import Inner
from bilevel.self_tuning.layers import initial_response, materialize
from bilevel.self_tuning.layout import Layout
from bilevel.self_tuning.response import Mode, ResponseModel, Tensors, pairs
from hypergrad.tree import Tree, trainable_leaves

__all__ = ["LeafResponse"]


class LeafResponse(ResponseModel):
    """Responses of the trained tensors of an inner level; see the module.

    Args:
        inner: any inner level.

    Raises:
        ValueError: the gradient owns nothing, or too much.
    """

    can_linearize = False

    def __init__(self, inner: Inner) -> None:
        self._inner = inner
        self.layout = Layout.of(inner.space, list(inner.hparams))
        self._leaves = trainable_leaves(inner.params)
        self._slots = optree.tree_leaves(self._leaves.rebuild(range(len(self._leaves.names))))  # type: ignore[arg-type]

    def initial(self, mode: Mode, generator: torch.Generator) -> Tensors:
        """See `ResponseModel.initial`; the response of a vector starts at 1."""
        found: Tensors = {}
        for name, leaf in zip(self._leaves.names, self._leaves.tensors, strict=True):
            shape = tuple(leaf.shape) or (1,)
            fan_in = leaf.numel() // shape[0]
            for key, size in (
                (f"response_{name}", shape),
                (f"gate_{name}", (shape[0], self.layout.size)),
            ):
                value = initial_response(key, size, fan_in, mode, generator)
                if len(shape) == 1 and key.startswith("response_"):
                    value = torch.ones(size)
                found[key] = value.to(leaf)
        return found

    def draw(self) -> tuple[Any, Tensor | None]:
        """See `ResponseModel.draw`."""
        return self._inner.inner_batches(1)[0], None

    def rows(self, batch: Any) -> int | None:
        """None: one perturbation for all examples."""
        return None

    def training_loss(
        self,
        params: Tree,
        response: Tensors | None,
        shift: Tensor | None,
        coordinates: Tensor,
        batch: Any,
        linearized: bool = False,
    ) -> Tensor:
        """See `ResponseModel.training_loss`."""
        if response is not None and shift is not None:
            params = self.effective(params, response, shift)
        values = self.layout.values(coordinates)
        return self._inner.problem.inner_loss(params, values, batch)

    def outer_loss(
        self, params: Tree, response: Tensors, shift: Tensor, coordinates: Tensor, batch: Any
    ) -> Tensor:
        """See `ResponseModel.outer_loss`; includes what F depends on directly."""
        values = self.layout.values(coordinates)
        return self._inner.problem.outer_loss(
            self.effective(params, response, shift), values, batch
        )

    def effective(self, params: Tree, response: Tensors, shift: Tensor) -> Tree:
        """See `ResponseModel.effective`."""
        moved: list[Tensor | None] = [None] * len(self._leaves.names)
        for slot, leaf in zip(self._slots, optree.tree_leaves(params), strict=True):
            if isinstance(slot, int):
                r, gate = pairs(response, self._leaves.names[slot])
                moved[slot] = materialize(leaf.reshape(r.shape), r, gate, shift, 0).view(leaf.shape)
        return self._leaves.rebuild(moved)  # type: ignore[arg-type]

    def publish(self, center: Tensor, sigma: Tensor) -> None:
        """Nobody to tell: the inner level draws its own batches."""
