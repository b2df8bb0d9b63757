"""Trees as lists of tensors and a hashable description of everything else."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import optree
import torch
from torch import Tensor

from hypergrad.compiled.report import CannotCompileError
from hypergrad.tree import Leaves, Tree

__all__ = ["Groups", "Layout", "ParamsLayout", "TensorSpec", "specs", "split_params", "split_tree"]

_STATIC = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class TensorSpec(NamedTuple):
    """What a graph is compiled for; the values are not part of it."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Slot(NamedTuple):
    """Stands for the tensor of this number."""

    index: int


class Layout(NamedTuple):
    """A tree without the values of its tensors; hashable.

    Attributes:
        spec: the structure.
        leaves: the place of each tensor, and the other leaves themselves, with their types
            (1, 1.0 and True are equal).
        tensors: the tensors' descriptions.
    """

    spec: optree.PyTreeSpec
    leaves: tuple[tuple[type, Hashable], ...]
    tensors: tuple[TensorSpec, ...]

    def rebuild(self, tensors: Sequence[Tensor]) -> Tree:
        """Put tensors back into the tree."""
        return optree.tree_unflatten(
            self.spec,
            [tensors[v.index] if isinstance(v, _Slot) else v for _, v in self.leaves],
        )


class ParamsLayout(NamedTuple):
    """The layout of params and the numbers of the trained tensors; the others are constant."""

    tree: Layout
    trained: tuple[int, ...]

    @property
    def shapes(self) -> list[torch.Size]:
        """Shapes of the trained tensors."""
        return [self.tree.tensors[i].shape for i in self.trained]

    def leaves(self, trained: Sequence[Tensor], constant: Sequence[Tensor]) -> Leaves:
        """Return autograd leaves of the trained tensors, with the constants in their places."""

        def rebuild(values: Sequence[Tensor]) -> Tree:
            rest, given = iter(constant), dict(zip(self.trained, values, strict=True))
            count = range(len(self.tree.tensors))
            return self.tree.rebuild([given[i] if i in given else next(rest) for i in count])

        return Leaves(list(trained), [f"params[{i}]" for i in self.trained], rebuild)


def specs(tensors: Sequence[Tensor]) -> tuple[TensorSpec, ...]:
    """Describe tensors."""
    return tuple([TensorSpec(t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def split_tree(tree: Tree, what: str, tie: bool = True) -> tuple[list[Tensor], Layout]:
    """Separate the tensors of a tree from the rest.

    Args:
        tree: any tree.
        what: its name for messages.
        tie: whether a tensor in several places counts as one.

    Raises:
        CannotCompileError: a leaf is neither a tensor nor a plain constant.
    """
    flat, spec = optree.tree_flatten(tree)
    tensors: list[Tensor] = []
    leaves: list[tuple[type, Hashable]] = []
    first: dict[int, _Slot] = {}
    for leaf in flat:
        if isinstance(leaf, Tensor):
            slot = first.get(id(leaf)) if tie else None
            if slot is None:
                slot = first[id(leaf)] = _Slot(len(tensors))
                tensors.append(leaf)
            leaves.append((_Slot, slot))
        elif isinstance(leaf, _STATIC):
            leaves.append((type(leaf), leaf))
        else:
            raise CannotCompileError(
                f"{what} holds a {type(leaf).__name__}; only tensors and plain constants "
                "can be told apart from one call to the next"
            )
    return [t.detach() for t in tensors], Layout(spec, tuple(leaves), specs(tensors))


def split_params(params: Tree) -> tuple[list[Tensor], list[Tensor], ParamsLayout]:
    """Return the trained tensors, the constant ones, and the layout; see `trainable_leaves`."""
    flat = [leaf for leaf in optree.tree_leaves(params) if isinstance(leaf, Tensor)]
    marks = {id(leaf): leaf.requires_grad for leaf in flat}
    order = list(marks.values())
    tensors, layout = split_tree(params, "params")
    trained = tuple([i for i, mark in enumerate(order) if mark])
    constant = [t for t, mark in zip(tensors, order, strict=True) if not mark]
    return [tensors[i] for i in trained], constant, ParamsLayout(layout, trained)


class Groups:
    """Several lists of tensors as one list, the inputs of a graph, and back."""

    def __init__(self, *groups: Sequence[Tensor]) -> None:
        self.sizes = [len(group) for group in groups]

    def split(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """Divide a list into the groups; further tensors are ignored."""
        parts, begin = [], 0
        for size in self.sizes:
            parts.append(list(tensors[begin : begin + size]))
            begin += size
        return parts
