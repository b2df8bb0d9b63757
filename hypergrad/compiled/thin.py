"""Products with one thin factor, in the form that is fastest on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["rewrite_thin_products"]

WIDTH = 48
"""Columns up to which a product is transposed.

Measured with MKL in float32: A B for B of 1 to 48 columns takes 1.2 to 6 times as long as
(Bᵀ Aᵀ)ᵀ, whatever the memory order of A and B, and about as long for more columns.
"""

ENTRIES = 2**16
"""Entries of a matrix up to which its product with a vector becomes a sum.

Inductor fuses the sum with what stands around it, so that there is no call of a library; measured
in float32 on matrices of 4,096 to 65,536 entries, that takes 0.3 to 0.5 times as long.
"""

_ATEN = torch.ops.aten


def rewrite_thin_products(module: fx.GraphModule) -> None:
    """Replace A b by a sum, and A B by (Bᵀ Aᵀ)ᵀ and C + A B likewise where B is thin and A not.

    The last layer of a classifier and the products of its derivatives are such.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in (_ATEN.mm.default, _ATEN.addmm.default):
            continue
        if node.meta["val"].device.type != "cpu":
            continue
        with graph.inserting_before(node):
            replacement = _sum(node) or _transposed_product(node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    module.recompile()


def _sum(node: fx.Node) -> fx.Node | None:
    """A b = Σ_j A_ij b_j, and aᵀ B likewise, for a small matrix."""
    if node.target is not _ATEN.mm.default:
        return None
    a, b = node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)  # noqa: PT018
    rows, columns = node.meta["val"].shape
    if min(rows, columns) != 1 or a.meta["val"].numel() * columns > ENTRIES:
        return None
    vector, matrix, axis = (b, a, 1) if columns == 1 else (a, b, 0)
    return _insert(
        _ATEN.sum.dim_IntList, _insert(_ATEN.mul.Tensor, matrix, _t(vector)), [axis], True
    )


def _transposed_product(node: fx.Node) -> fx.Node | None:
    """(Bᵀ Aᵀ)ᵀ, or (Cᵀ + Bᵀ Aᵀ)ᵀ."""
    *bias, a, b = node.args
    rows, columns = node.meta["val"].shape
    if not columns < min(rows, WIDTH + 1) or any(c.meta["val"].dim() != 2 for c in bias):  # type: ignore[union-attr]
        return None
    assert callable(node.target)
    return _t(_insert(node.target, *map(_t, (*bias, b, a)), **node.kwargs))


def _t(node: Any) -> fx.Node:
    return _insert(_ATEN.permute.default, node, [1, 0])


def _insert(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Add an operation where the graph is open for insertion, with its result on fake tensors."""
    first = next(a for a in args if isinstance(a, fx.Node))
    node = first.graph.call_function(target, args, kwargs)
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    node.meta["val"] = target(*values, **kwargs)
    return node
