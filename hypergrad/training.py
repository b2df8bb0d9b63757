"""Plain training of the inner level: T optimizer steps at fixed hyperparameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypedDict

import optree
import torch
from torch import Tensor

from hypergrad.attention import math_attention
from hypergrad.optimizers import Optimizer, State, as_optimizer
from hypergrad.optimizers.flat import flatten, flatten_params, unflatten
from hypergrad.optimizers.values import Values, constants
from hypergrad.problem import Problem, check_finite, inner_gradient
from hypergrad.traced import is_traced
from hypergrad.tree import Leaves, Tree, leaf_names, trainable_leaves

__all__ = ["Trained", "UnrolledState", "check_optimizer", "check_steps", "train"]


class UnrolledState(TypedDict):
    """What continues from one call to the next.

    Attributes:
        optimizer: state of the inner optimizer after the last step; None before the first call.
    """

    optimizer: State | None


@dataclass(frozen=True)
class Trained:
    """What plain training left.

    Attributes:
        params: the last iterate, detached, with the caller's `requires_grad` marks.
        optimizer_state: to continue from.
        losses: inner loss before each step, shape (steps,).
    """

    params: Tree
    optimizer_state: State
    losses: Tensor


def train(
    problem: Problem,
    params: Tree,
    hparams: Tree,
    optimizer: Optimizer,
    batch: Any,
    steps: int,
    optimizer_state: State | None = None,
) -> Trained:
    """Minimize the inner loss for some steps, without a graph.

    The numbers are bit for bit those of the forward pass of `Unrolled`.

    Args:
        problem: its inner loss is minimized.
        params: where to start; leaves that require grad are trained, others constant.
        hparams: hyperparameters of the loss and of the optimizer, held fixed.
        optimizer: the update rule: ours or a TorchOpt transformation.
        batch: third argument of the loss, or a callable t -> batch for another one at each step.
        steps: T ≥ 1.
        optimizer_state: from an earlier call, to continue; None starts anew.

    Raises:
        ValueError: a bad number of steps, a state of other params, or nothing to train.
        FloatingPointError: a loss, gradient or parameter is not finite; names step and tensor.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, but got {steps}.")
    optimizer = as_optimizer(optimizer)
    leaves = trainable_leaves(params)
    fixed = _constant_leaves(hparams)
    with torch.no_grad():
        values = constants(optimizer.resolve(hparams, leaves))
    loop = Loop(problem, leaves, fixed, optimizer, values, batch)
    flat, state = loop.start(optimizer_state)
    losses = []
    with math_attention():
        for t in range(steps):
            loss, flat, state = loop.step(t, flat, state)
            losses.append(loss)
    return Trained(loop.params(flat), state, torch.stack(losses))


@dataclass(frozen=True)
class Loop:
    """The inner loop at fixed hyperparameters, over one flat vector."""

    problem: Problem
    leaves: Leaves
    hparams: Leaves
    optimizer: Optimizer
    values: Values
    batch: Any

    def start(self, optimizer_state: State | None) -> tuple[Tensor, State]:
        """Return the flat vector and the optimizer state before the first step."""
        flat = flatten_params(self.leaves)
        return flat, self.optimizer.start(optimizer_state, flat)

    def at(self, flat: Tensor) -> Leaves:
        """Return fresh autograd leaves at a flat vector."""
        views = unflatten(flat.detach(), self.leaves.tensors)
        tensors = [v.requires_grad_() for v in views]
        return Leaves(tensors, self.leaves.names, self.leaves.rebuild)

    def batch_at(self, t: int) -> Any:
        """Return the batch of step t."""
        return self.batch(t) if callable(self.batch) else self.batch

    def held(self) -> Any:
        """Return the batch that all steps share; None where each step fetches its own."""
        return None if callable(self.batch) else self.batch

    def step(self, t: int, flat: Tensor, state: State) -> tuple[Tensor, Tensor, State]:
        """Take one plain step; returns the loss before it and the next iterate and state."""
        loss, grads = inner_gradient(
            self.problem,
            self.at(flat),
            self.hparams,
            self.batch_at(t),
            f" at step {t}",
            create_graph=False,
        )
        return loss, *self.move(t, flat, flatten(grads), state)

    def move(self, t: int, flat: Tensor, grad: Tensor, state: State) -> tuple[Tensor, State]:
        """Apply the optimizer to a gradient, and check the outcome."""
        with torch.no_grad():
            after, state = self.optimizer.update(flat, grad, state, self.values)
        check_move(t, grad, after, self.leaves)
        return after, state

    def params(self, flat: Tensor) -> Tree:
        """Return the params tree at a flat vector, detached, with the caller's marks."""
        copies = [v.clone() for v in unflatten(flat.detach(), self.leaves.tensors)]
        return self.leaves.rebuild([c.requires_grad_() for c in copies])


def check_move(t: int, grad: Tensor, after: Tensor, leaves: Leaves) -> None:
    """Raise FloatingPointError unless the params after step t are finite; names the tensor."""
    if not is_finite(after):
        for vector, what in ((grad, "the gradient of inner_loss"), (after, "the update")):
            check_finite(unflatten(vector, leaves.tensors), leaves.names, f"{what} at step {t}")


def is_finite(vector: Tensor) -> bool:
    """Whether all entries are finite; ten times faster than `isfinite().all()` where they are."""
    return is_traced() or math.isfinite(vector.sum()) or bool(torch.isfinite(vector).all())


def detached(leaves: Leaves) -> Leaves:
    """Return the same leaves as constants."""
    return Leaves([t.detach() for t in leaves.tensors], leaves.names, leaves.rebuild)


def _constant_leaves(hparams: Tree) -> Leaves:
    flat, spec = optree.tree_flatten(hparams)
    return Leaves(
        [t.detach() for t in flat],
        leaf_names(hparams, "hparams"),
        lambda values: optree.tree_unflatten(spec, list(values)),
    )


def check_steps(name: str, steps: int) -> None:
    """Raise ValueError unless the number of inner steps is a positive integer."""
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"{name} steps must be an integer of at least 1, but got {steps!r}.")


def check_optimizer(name: str, optimizer: Optimizer | None) -> Optimizer:
    """Return the optimizer.

    Raises:
        ValueError: there is none.
    """
    if optimizer is None:
        raise ValueError(
            f"{name} has optimizer=None, which stands for the rule of an inner learner and is "
            "filled in by an outer algorithm; pass one here, such as "
            f"{name}(SGD(lr=0.1), steps=10)."
        )
    return optimizer
