"""Matrix products in the form that is fastest on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

__all__ = ["rewrite_products"]

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


def rewrite_products(module: fx.GraphModule) -> None:
    """Replace C + A B by a sum of two, A b by a sum, and A B by (Bᵀ Aᵀ)ᵀ where B is thin.

    The library copies C before it adds to it, where inductor fuses the sum with what follows.
    The last layer of a classifier and the products of its derivatives are thin.
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.target not in (_ATEN.mm.default, _ATEN.addmm.default):
            continue
        if node.meta["val"].device.type != "cpu":
            continue
        with graph.inserting_before(node):
            replacement = _added(node) if node.target is _ATEN.addmm.default else _product(node)
        if replacement is not None:
            node.replace_all_uses_with(replacement)
            graph.erase_node(node)
    module.recompile()


def _added(node: fx.Node) -> fx.Node | None:
    """C + α A B, with the product as a node of its own."""
    c, a, b = node.args
    if node.kwargs.get("beta", 1) != 1:
        return None
    product = _insert(_ATEN.mm.default, a, b)
    replacement = _product(product)
    if replacement is not None:
        node.graph.erase_node(product)
    alpha = node.kwargs.get("alpha", 1)
    return _insert(_ATEN.add.Tensor, c, replacement or product, alpha=alpha)


def _product(node: fx.Node) -> fx.Node | None:
    """A B in the form that is fastest; None where it has it."""
    return _sum(node) or _transposed(node)


def _sum(node: fx.Node) -> fx.Node | None:
    """A b = Σ_j A_ij b_j, and aᵀ B likewise, for a small matrix."""
    a, b = node.args
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)  # noqa: PT018
    rows, columns = node.meta["val"].shape
    if min(rows, columns) != 1 or a.meta["val"].numel() * columns > ENTRIES:
        return None
    vector, matrix, axis = (b, a, 1) if columns == 1 else (a, b, 0)
    return _insert(
        _ATEN.sum.dim_IntList, _insert(_ATEN.mul.Tensor, matrix, _t(vector)), [axis], True
    )


def _transposed(node: fx.Node) -> fx.Node | None:
    """(Bᵀ Aᵀ)ᵀ for a thin B."""
    rows, columns = node.meta["val"].shape
    if columns >= min(rows, WIDTH + 1):
        return None
    a, b = node.args
    return _t(_insert(_ATEN.mm.default, _t(b), _t(a)))


def _t(node: Any) -> fx.Node:
    return _insert(_ATEN.permute.default, node, [1, 0])


def _insert(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """Add an operation where the graph is open for insertion, with its result on fake tensors."""
    first = next(a for a in args if isinstance(a, fx.Node))
    node = first.graph.call_function(target, args, kwargs)
    values = [a.meta["val"] if isinstance(a, fx.Node) else a for a in args]
    node.meta["val"] = target(*values, **kwargs)
    return node
