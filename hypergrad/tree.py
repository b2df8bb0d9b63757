"""Trees of tensors: names for error messages, and the autograd leaves behind a tree.

A tree is any nesting of dicts, lists, tuples, named tuples and dataclasses registered with
optree whose leaves are tensors.  `requires_grad` on a leaf of `params` says that it is
trained; other leaves are constants.  Every leaf of `hparams` must require grad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

__all__ = [
    "Leaves",
    "Tree",
    "check_tensors",
    "hyper_leaves",
    "leaf_names",
    "same_structure",
    "trainable_leaves",
]

Tree = Any
"""Nested dicts, lists and tuples of tensors."""


def leaf_names(tree: Tree, root: str) -> list[str]:
    """Return a readable name for each leaf, such as ``hparams['wd'][0]``."""
    return [accessor.codify(root) for accessor in optree.tree_accessors(tree)]


@dataclass(frozen=True)
class Leaves:
    """The leaves of a tree that a derivative is taken in, as fresh autograd leaves.

    `tensors` are detached copies that require grad (the caller's tensors are never part of
    a graph), `names` their readable names, and `rebuild(tensors)` the tree with them put back.
    """

    tensors: list[Tensor]
    names: list[str]
    rebuild: Callable[[Sequence[Tensor]], Tree]

    def tree(self) -> Tree:
        """Return the tree over `tensors`."""
        return self.rebuild(self.tensors)


def check_tensors(leaves: Sequence[Any], names: Sequence[str]) -> None:
    """Raise TypeError naming the first leaf that is no tensor."""
    for leaf, name in zip(leaves, names, strict=True):
        if not isinstance(leaf, Tensor):
            raise TypeError(f"{name} must be a tensor, but got {type(leaf).__name__}: {leaf!r}.")


def trainable_leaves(params: Tree) -> Leaves:
    """Select the leaves of `params` that require grad; the others stay constant.

    Raises:
        TypeError: a leaf is not a tensor.
        ValueError: no leaf requires grad.
    """
    flat, spec = optree.tree_flatten(params)
    names = leaf_names(params, "params")
    check_tensors(flat, names)
    index = [i for i, leaf in enumerate(flat) if leaf.requires_grad]
    if not index:
        raise ValueError(
            "params: no tensor requires grad, so there is nothing to train; "
            f"call .requires_grad_() on the trained ones of {names}."
        )
    # A tensor that stands in several places (tied weights) is one variable.
    first: dict[int, int] = {}
    tensors: list[Tensor] = []
    slot = [-1] * len(flat)
    chosen: list[str] = []
    for i in index:
        key = id(flat[i])
        if key not in first:
            first[key] = len(tensors)
            tensors.append(flat[i].detach().requires_grad_())
            chosen.append(names[i])
        slot[i] = first[key]
    constant = [leaf.detach() for leaf in flat]

    def rebuild(values: Sequence[Tensor]) -> Tree:
        return optree.tree_unflatten(
            spec, [values[s] if s >= 0 else constant[i] for i, s in enumerate(slot)]
        )

    return Leaves(tensors, chosen, rebuild)


def hyper_leaves(hparams: Tree) -> Leaves:
    """Select all leaves of `hparams`; each must be a floating tensor that requires grad.

    Raises:
        TypeError: a leaf is not a floating tensor.
        ValueError: a leaf does not require grad, or there is no leaf.
    """
    flat, spec = optree.tree_flatten(hparams)
    names = leaf_names(hparams, "hparams")
    check_tensors(flat, names)
    if not flat:
        raise ValueError(f"hparams must hold at least one tensor, but got {hparams!r}.")
    for leaf, name in zip(flat, names, strict=True):
        if not leaf.is_floating_point():
            raise TypeError(
                f"{name} has dtype {leaf.dtype}; a hypergradient needs a floating-point tensor. "
                "Integer hyperparameters belong to a sampler."
            )
        if not leaf.requires_grad:
            raise ValueError(
                f"{name} does not require grad; call .requires_grad_(), or keep constants "
                "out of hparams."
            )
    tensors = [leaf.detach().requires_grad_() for leaf in flat]
    return Leaves(tensors, names, lambda values: optree.tree_unflatten(spec, list(values)))


def same_structure(tree: Tree, like: Tree, name: str, like_name: str) -> None:
    """Check that two trees have equal structure and equal leaf shapes.

    Raises:
        ValueError: naming the first leaf that differs.
    """
    flat, spec = optree.tree_flatten(tree)
    flat_like, spec_like = optree.tree_flatten(like)
    if spec != spec_like:
        raise ValueError(
            f"{name} and {like_name} must be the same tree, but {name} has leaves "
            f"{leaf_names(tree, name)} and {like_name} has {leaf_names(like, like_name)}."
        )
    for leaf, other, leaf_name in zip(flat, flat_like, leaf_names(tree, name), strict=True):
        if leaf.shape != other.shape:
            raise ValueError(
                f"{leaf_name} has shape {tuple(leaf.shape)}, but {like_name} has "
                f"{tuple(other.shape)} there."
            )


def zeros_for_none(grads: Sequence[Tensor | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Replace the None of an unused tensor by zeros of its shape."""
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, tensors, strict=True)]
