"""`ProblemInner`: the inner level made of a bare `Problem`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import optree
import torch
from torch import Tensor

from bilevel.domains import Grad
from bilevel.metrics import Cost, Metrics
from bilevel.space import Space
from hypergrad import Problem
from hypergrad.optimizers import Optimizer
from hypergrad.problem import Loss, check_scalar
from hypergrad.training import train
from hypergrad.tree import Tree, hyper_leaves, same_structure, trainable_leaves

__all__ = ["ProblemInner"]


class ProblemInner:
    """An `Inner` that trains the parameters of a `Problem`.

    Hyperparameters are declared by a `space`, or given as a plain tree of tensors, which then
    move without bounds.  The losses see the tree that was given; elsewhere a nested tree is a
    flat dict with joined names: ``{"l2": {"layer.0": ...}}`` is ``"l2__layer_0"``.

    A batch that is callable is a stream, called with 0, 1, 2, ...  If what it returns depends on
    that number and the global random state alone, then a resumed run sees the same batches.

    Args:
        problem: the two losses.
        params: initial weights, copied; leaves that require grad are trained.
        optimizer: the update rule of the inner level.
        hparams: a tree of floating tensors; where there is a `space`, initial values by name.
        space: domains, all owned by the gradient.
        inner_batch: batch or stream for the inner loss.
        outer_batch: batch or stream for the outer loss.
        val_batch: all validation data, for the outer loss.  Default: `outer_batch`, where that
            is no stream.
        test_batch: all test data, for the outer loss.

    Raises:
        ValueError: neither `space` nor `hparams`; a hyperparameter of the space that the
            gradient does not own, or a value outside its domain; no parameter to train.
        TypeError: a leaf that is not a floating tensor.
    """

    def __init__(
        self,
        problem: Problem,
        params: Tree,
        *,
        optimizer: Optimizer,
        hparams: Tree | None = None,
        space: Space | None = None,
        inner_batch: Any = None,
        outer_batch: Any = None,
        val_batch: Any = None,
        test_batch: Any = None,
    ) -> None:
        first = trainable_leaves(params).tensors[0]
        if space is not None:
            values = _initial(space, hparams, first)
        elif hparams is not None:
            space, values, problem = _unbounded(problem, hparams)
        else:
            raise ValueError("give the hyperparameters: a space, or hparams, a tree of tensors.")
        self._space, self._problem, self._optimizer = space, problem, optimizer
        self._params = _refill(params, [leaf.detach().clone() for leaf in _leaves(params)])
        self._optimizer_state: Any = None
        self._hparams = {name: value.detach().clone() for name, value in values.items()}
        self._inner_batch, self._outer_batch = inner_batch, outer_batch
        self._drawn = {"inner": 0, "outer": 0}
        self._splits: dict[str, tuple[Loss, Any]] = {}
        if not callable(inner_batch):
            self._splits["train"] = (problem.inner_loss, inner_batch)
        if val_batch is not None or not callable(outer_batch):
            val_batch = outer_batch if val_batch is None else val_batch
            self._splits["val"] = (problem.outer_loss, val_batch)
        if test_batch is not None:
            self._splits["test"] = (problem.outer_loss, test_batch)

    @property
    def space(self) -> Space:
        """See `Inner.space`."""
        return self._space

    @property
    def splits(self) -> tuple[str, ...]:
        """Names that `evaluate` takes: those with a fixed batch."""
        return tuple(self._splits)

    @property
    def problem(self) -> Problem:
        """See `Inner.problem`."""
        return self._problem

    @property
    def params(self) -> Tree:
        """See `Inner.params`."""
        return self._params

    @property
    def optimizer(self) -> Optimizer:
        """See `Inner.optimizer`."""
        return self._optimizer

    @property
    def optimizer_state(self) -> Any:
        """See `Inner.optimizer_state`."""
        return self._optimizer_state

    @property
    def hparams(self) -> dict[str, Tensor]:
        """See `Inner.hparams`."""
        return dict(self._hparams)

    def set_hparams(self, values: Mapping[str, Tensor]) -> None:
        """See `Inner.set_hparams`.

        Raises:
            ValueError: unknown names or other shapes.
        """
        merged = {**self._hparams, **{name: value.detach() for name, value in values.items()}}
        same_structure(merged, self._hparams, "hparams", "the current hparams")
        self._hparams = {name: merged[name].clone() for name in self._hparams}

    def step(self) -> Metrics:
        """See `Inner.step`."""
        (batch,) = self.inner_batches(1)
        done = train(
            self._problem,
            self._params,
            _requiring_grad(self._hparams),
            self._optimizer,
            batch,
            1,
            self._optimizer_state,
        )
        self._params, self._optimizer_state = done.params, done.optimizer_state
        return Metrics({"loss": float(done.losses[-1])}, cost=Cost(steps=1, gradients=1))

    def inner_batches(self, count: int) -> list[Any]:
        """See `Inner.inner_batches`."""
        return [self._draw("inner", self._inner_batch) for _ in range(count)]

    def outer_batch(self) -> Any:
        """See `Inner.outer_batch`."""
        return self._draw("outer", self._outer_batch)

    def _draw(self, which: str, batch: Any) -> Any:
        if not callable(batch):
            return batch
        self._drawn[which] += 1
        return batch(self._drawn[which] - 1)

    def adopt(self, params: Tree, optimizer_state: Any, steps: int) -> None:
        """See `Inner.adopt`."""
        same_structure(params, self._params, "params", "the current params")
        self._params, self._optimizer_state = params, optimizer_state

    def evaluate(self, split: str) -> Metrics:
        """See `Inner.evaluate`: "train" is the inner loss on `inner_batch`.

        Raises:
            ValueError: an unknown split, or one without a fixed batch.
        """
        if split not in self._splits:
            raise ValueError(
                f"split must be one of {list(self._splits)}, which have a fixed batch, but got "
                f"{split!r}; pass val_batch and test_batch for the others."
            )
        loss, batch = self._splits[split]
        with torch.no_grad():
            value = loss(self._params, self._hparams, batch)
        check_scalar(value, f"loss on {split!r}")
        return Metrics({"loss": float(value)})

    def state_dict(self) -> dict[str, Any]:
        """See `Inner.state_dict`."""
        return {
            "params": _leaves(self._params),
            "optimizer": self._optimizer_state,
            "hparams": dict(self._hparams),
            "drawn": dict(self._drawn),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Inner.load_state_dict`.

        Raises:
            ValueError: the state is that of other params or hparams.
        """
        params = _refill(self._params, state["params"])
        same_structure(params, self._params, "saved params", "params")
        self.set_hparams(state["hparams"])
        self._params, self._optimizer_state = params, state["optimizer"]
        self._drawn = dict(state["drawn"])


def _leaves(tree: Tree) -> list[Tensor]:
    return cast(list[Tensor], optree.tree_leaves(tree))


def _refill(tree: Tree, values: Sequence[Tensor]) -> Tree:
    """Return the tree with other values; trained and shared leaves stay trained and shared."""
    leaves, spec = optree.tree_flatten(tree)
    if len(leaves) != len(values):
        raise ValueError(f"params has {len(leaves)} tensors, but the saved state {len(values)}.")
    filled: dict[int, Tensor] = {}
    for leaf, value in zip(leaves, values, strict=True):
        copied = value.detach().to(leaf.device).requires_grad_(leaf.requires_grad)
        filled.setdefault(id(leaf), copied)
    return optree.tree_unflatten(spec, [filled[id(leaf)] for leaf in leaves])


def _requiring_grad(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().requires_grad_() for name, value in values.items()}


def _initial(space: Space, given: Any, like: Tensor) -> dict[str, Tensor]:
    """Return the checked initial values of a space that the gradient owns alone.

    They are on the device of the weights and as precise, but at least float32.
    """
    others = [name for name in space if name not in space.grad]
    if others:
        raise ValueError(
            f"space: {others} are not owned by the gradient, and a bare Problem has no other "
            "hyperparameters; put constants into the losses, or write a learner."
        )
    dtype = torch.promote_types(like.dtype, torch.float32)
    return space.validate(dict(given or {}), dtype=dtype, device=like.device)


def _unbounded(problem: Problem, tree: Tree) -> tuple[Space, dict[str, Tensor], Problem]:
    """Return space, values and problem of a plain tree of hyperparameters, as a flat dict."""
    flat, spec = optree.tree_flatten(tree)
    paths = optree.tree_paths(tree)
    names = [_identifier(path) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"hparams: two tensors share a name in {names}; rename one.")
    values = dict(zip(names, flat, strict=True))
    hyper_leaves({k: v.detach().requires_grad_() if _floats(v) else v for k, v in values.items()})
    space = Space({name: Grad(0.0, shape=tuple(value.shape)) for name, value in values.items()})

    def nested(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def evaluate(first: Any, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
            given = optree.tree_unflatten(spec, [hparams[name] for name in names])
            return loss(first, given, batch)

        return evaluate

    losses = [f.name for f in fields(problem) if f.name.endswith("loss")]
    wrapped = {name: nested(getattr(problem, name)) for name in losses}
    return space, values, replace(problem, **wrapped)


def _identifier(path: Sequence[Any]) -> str:
    """Return the keys to a leaf of a tree as the name of a hyperparameter."""
    name = "__".join(re.sub(r"\W", "_", str(key)) for key in path) or "hparams"
    return name if name.isidentifier() else f"_{name}"


def _floats(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
