"""How much a differentiable step holds, and how many steps to hold at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import optree
import psutil
import torch
from torch import Tensor

__all__ = ["SHARE", "Footprint", "Memory", "fitting_length", "free_bytes"]

Memory = Literal["auto", "graph", "replay", "segments", "forward"]

SHARE = 0.25
"""Part of the free memory that "auto" lets the graphs of all steps take."""


class Footprint:
    """Counts the bytes that a graph built in `watched` keeps alive, each storage once.

    Args:
        without: trees of tensors that are held anyway, and do not count.
    """

    def __init__(self, *without: Any) -> None:
        self.bytes = 0
        leaves: list[Any] = optree.tree_leaves(without)  # type: ignore[arg-type]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self._seen = {t.untyped_storage().data_ptr() for t in tensors}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Count what is saved for a backward pass in this block."""

        def count(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._seen:
                self._seen.add(storage.data_ptr())
                self.bytes += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            yield


def free_bytes(device: torch.device) -> int:
    """Return the memory that is free on a device; for those but CUDA, that of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of some tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


def fitting_length(steps: int, graph: int, state: int, limit: float) -> int:
    """Return how many of K steps to hold at a time, of which each keeps g bytes of graph.

    All, if K (g + s) fits the limit.  Otherwise segments of the length L that holds the least,

        K/L · s + L (g + s),   L = √(K s / (g + s)),

    at most √K and, where the graph of a step is much larger than its state of s bytes, 1.

    Args:
        steps: K ≥ 1.
        graph: g, bytes of the graph of one step.
        state: s, bytes of the parameters and the optimizer state.
        limit: bytes.
    """
    each = graph + state
    if steps * each <= limit:
        return steps
    return max(1, round(math.sqrt(steps * state / each)))
