"""Curvature operators: products with the Hessian of the inner loss or its Gauss–Newton part.

All products use double backward on one retained graph: one forward and one backward pass serve
the whole solve, a product costs about one gradient, and dropout draws one mask for all of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

from hypergrad.attention import math_attention
from hypergrad.flat import FlatSpace
from hypergrad.problem import Loss, Problem, check_scalar, inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.tree import Leaves, Tree, zeros_for_none

__all__ = ["GGN", "Curvature", "Hessian", "Linearization", "vector_jacobian"]


@dataclass(frozen=True)
class Linearization:
    """The inner problem at a point: its optimality condition, and products with its derivatives.

    Attributes:
        space: the flat vectors of the parameters.
        optimality: what is zero at the inner solution, as a flat vector with a graph: ∇_w f, or
            w − T(w, h) for a `FixedPoint`.
        matvec: v -> A v on flat vectors, A = (∂optimality/∂w)ᵀ or what stands for it.
        hparams: leaves that the cross product is taken in.
        n_grad: gradient evaluations that it took.
    """

    space: FlatSpace
    optimality: Tensor
    matvec: Callable[[Tensor], Tensor]
    hparams: Leaves
    n_grad: int

    def cross(self, q: Tensor) -> list[Tensor | None]:
        """Return (∂optimality/∂h)ᵀ q for each hyperparameter; None where it does not enter."""
        return list(vector_jacobian([self.optimality], self.hparams.tensors, [q]))


class Curvature(ABC):
    """Which condition and matrix stand for an inner problem.  Subclasses are frozen dataclasses."""

    @abstractmethod
    def at(self, problem: Problem, params: Leaves, hparams: Leaves, batch: Any) -> Linearization:
        """Evaluate the inner loss once and return the products at this point."""


@dataclass(frozen=True)
class Hessian(Curvature):
    """∂²f/∂w², exact; indefinite away from a minimum."""

    def at(self, problem: Problem, params: Leaves, hparams: Leaves, batch: Any) -> Linearization:
        _, gradient = inner_gradient(problem, params, hparams, batch)
        space = FlatSpace.of(params.tensors)
        with torch.enable_grad():
            flat = space.pack(gradient)
        return Linearization(space, flat, _product(flat, params.tensors, space), hparams, 1)


@dataclass(frozen=True)
class GGN(Curvature):
    """Jᵀ (∂²ℓ/∂z²) J + ∂²R/∂w² for an inner loss f = ℓ(z(w)) + R(w), J = ∂z/∂w.

    Positive semidefinite where ℓ is convex in the outputs z and R convex in w, whatever the
    network: what the Hessian of a network is not.  Equal to the Hessian where z is linear in w.

    Attributes:
        outputs: z, ``(params, hparams, batch) -> tensor``.
        criterion: ℓ, ``(outputs, hparams, batch) -> scalar``.
        regularizer: R, ``(params, hparams, batch) -> scalar``; its exact Hessian is used.

    Source: Schraudolph 2002.
    """

    outputs: Callable[[Tree, Tree, Any], Tensor]
    criterion: Callable[[Tensor, Tree, Any], Tensor]
    regularizer: Loss | None = None

    def at(self, problem: Problem, params: Leaves, hparams: Leaves, batch: Any) -> Linearization:
        """Evaluate the loss and its parts.

        Raises:
            ValueError: criterion(outputs) + regularizer is not the inner loss.
        """
        random = RandomState.capture(t.device for t in params.tensors)
        value, gradient = inner_gradient(problem, params, hparams, batch)
        after = RandomState.capture(t.device for t in params.tensors)
        random.restore()  # the parts draw the same dropout masks as the whole
        space = FlatSpace.of(params.tensors)
        tree = hparams.tree()
        with torch.enable_grad(), math_attention():
            optimality = space.pack(gradient)
            z = self.outputs(params.tree(), tree, batch)
            z_leaf = z.detach().requires_grad_()
            criterion = self.criterion(z_leaf, tree, batch)
            check_scalar(criterion, "GGN criterion")
            (z_gradient,) = torch.autograd.grad(criterion, z_leaf, create_graph=True)
            # J v by differentiating the linear map u -> Jᵀu.
            u = torch.zeros_like(z, requires_grad=True)
            pulled = space.pack(
                zeros_for_none(
                    torch.autograd.grad(z, params.tensors, u, create_graph=True, allow_unused=True),
                    params.tensors,
                )
            )
            parts = [criterion.detach()]
            penalty = None
            if self.regularizer is not None:
                r = self.regularizer(params.tree(), tree, batch)
                check_scalar(r, "GGN regularizer")
                parts.append(r.detach())
                r_gradient = torch.autograd.grad(
                    r, params.tensors, create_graph=True, allow_unused=True
                )
                flat = space.pack(zeros_for_none(r_gradient, params.tensors))
                penalty = _product(flat, params.tensors, space)
        after.restore()
        # The parts are summed in another order than in the loss, so equal up to rounding only.
        total, size = sum(float(part) for part in parts), sum(abs(float(part)) for part in parts)
        if abs(total - float(value)) > torch.finfo(value.dtype).eps ** 0.5 * size:
            raise ValueError(
                "GGN: criterion(outputs) + regularizer must be the inner loss, but got "
                f"{total:.9g} and inner_loss {value.item():.9g}."
            )

        def product(v: Tensor) -> Tensor:
            jv = vector_jacobian([pulled], [u], [v])[0]
            hjv = None if jv is None else vector_jacobian([z_gradient], [z_leaf], [jv])[0]
            if hjv is None:  # z does not depend on w, or ℓ is linear in z
                jhjv = torch.zeros_like(v)
            else:
                jhjv = space.pack(
                    zeros_for_none(vector_jacobian([z], params.tensors, [hjv]), params.tensors)
                )
            return jhjv if penalty is None else jhjv + penalty(v)

        return Linearization(space, optimality, product, hparams, 3)


def _product(
    gradient: Tensor, tensors: Sequence[Tensor], space: FlatSpace
) -> Callable[[Tensor], Tensor]:
    """Return v -> (∂gradient/∂tensors)ᵀ v, which is H v where `gradient` is a gradient."""

    def product(v: Tensor) -> Tensor:
        return space.pack(zeros_for_none(vector_jacobian([gradient], tensors, [v]), tensors))

    return product


def vector_jacobian(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    vectors: Sequence[Tensor],
    keep: bool = True,
) -> Sequence[Tensor | None]:
    """Return (∂outputs/∂inputs)ᵀ vectors; None for an unused input; `keep` retains the graph.

    The same as `torch.autograd.grad`, whose checks and hooks in Python take as long as a quarter
    of a product with the Hessian of a small problem.
    """
    kept = [(o, v) for o, v in zip(outputs, vectors, strict=True) if o.requires_grad]
    if not kept:
        return [None] * len(inputs)
    create_graph, allow_unused, accumulate = False, True, False
    found: Sequence[Tensor | None] = Variable._execution_engine.run_backward(
        tuple([o for o, _ in kept]),
        tuple([v if v.dtype == o.dtype else v.to(o) for o, v in kept]),
        keep,
        create_graph,
        tuple(inputs),
        allow_unused,
        accumulate,
    )
    return found
