"""The explicit part of a hypergradient alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypergrad.attention import math_attention
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem
from hypergrad.status import Status
from hypergrad.tree import Tree, hyper_leaves, trainable_leaves

__all__ = ["Explicit"]


@dataclass(frozen=True)
class Explicit(Estimator[dict[str, Any]]):
    """dF/dh ≈ ∂F/∂h: the weights do not answer to h.

    For hyperparameters that are part of the network, such as gates or the bounds of companded
    weights, where the outer loss itself depends on h.  One gradient of the outer loss; the inner
    loss is not evaluated.  Bias: all of (dw*/dh)ᵀ ∂F/∂w, which vanishes only where F is at its
    own minimum in w, so the fixed point is that of the joint descent of w on f and of h on F.

    Source: Liu, Simonyan and Yang, DARTS, ICLR 2019, section 2.3 (first-order approximation).

    Raises:
        ValueError: the outer loss does not depend on a hyperparameter, such as a weight decay.
    """

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> dict[str, Any]:
        """Return the empty state."""
        return {}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: dict[str, Any],
    ) -> tuple[Hypergradient, dict[str, Any]]:
        """See `Estimator`."""
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        with math_attention():
            value, _, direct = outer_gradients(problem, w, h, outer_batch)
        for name, part in zip(h.names, direct, strict=True):
            if part is None:
                raise ValueError(
                    f"{name} is not part of outer_loss, so Explicit sees nothing of it; use "
                    "Unrolled, Implicit or SAMA."
                )
        grad = total_gradient(h, direct, [None] * len(direct), "")
        return (
            Hypergradient(value, grad, w.tree(), None, None, 0, 1, Status.APPROXIMATE),
            {},
        )
