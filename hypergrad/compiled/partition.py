"""Splitting a graph in two: what does not depend on some of its inputs, and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from hypergrad.compiled.graph import Graph, Traced, compile_graph

__all__ = ["Early", "split"]


@dataclass(frozen=True)
class Early:
    """The compiled early part of a function of (x, u): everything that needs x alone.

    Attributes:
        graph: x -> the outputs that do not depend on u, then intermediate results.
        n_outputs: how many outputs come first.
        kept: numbers of the inputs that the late part needs, too.
    """

    graph: Graph
    n_outputs: int
    kept: tuple[int, ...]

    def __call__(self, inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
        """Return the outputs, and what the late part takes before u."""
        found = self.graph(inputs)
        given = [*inputs, *self.graph.captured]
        rest = found[self.n_outputs :]
        return found[: self.n_outputs], [*[given[i] for i in self.kept], *rest]


def split(traced: Traced, n_inputs: int, n_outputs: int) -> tuple[Early, fx.GraphModule]:
    """Split (x, u, captured) -> (outputs of x, outputs of x and u), and compile the early part.

    The late part is a graph without compilation, (what `Early` keeps, u) -> its outputs.  It
    takes views and constants anew, so that they are not passed on.

    Args:
        traced: the function.
        n_inputs: how many inputs x are.
        n_outputs: how many outputs come from x alone.
    """
    nodes = list(traced.module.graph.nodes)
    places = [n for n in nodes if n.op == "placeholder"]
    n_captured = len(traced.captured)
    given = [*places[:n_inputs], *places[len(places) - n_captured :]]
    moving = places[n_inputs : len(places) - n_captured]
    results = list(nodes[-1].args[0])

    late = set(moving)
    for node in nodes:
        if any(parent in late for parent in node.all_input_nodes):
            late.add(node)
    boundary = dict.fromkeys(_boundary(nodes, late))
    kept = [n for n in given if n in boundary]
    passed = [n for n in boundary if n not in given]
    early = _extract(traced.module, given, [*results[:n_outputs], *passed])
    inputs = [*traced.inputs[:n_inputs], *traced.captured]
    graph = compile_graph(Traced(early, inputs, traced.captured))
    rest = _extract(traced.module, [*kept, *passed, *moving], results[n_outputs:])
    return Early(graph, n_outputs, tuple([given.index(n) for n in kept])), rest


def _boundary(nodes: Sequence[fx.Node], late: set[fx.Node]) -> Iterator[fx.Node]:
    """Yield what late nodes take from early ones, seen through views and constants."""
    asked = [p for n in nodes if n in late for p in n.all_input_nodes if p not in late]
    seen: set[fx.Node] = set()
    while asked:
        node = asked.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "call_function" and _is_cheap(node):
            asked.extend(node.all_input_nodes)
        else:
            yield node


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node is a view, an entry of a tuple of views, or a constant."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return all(_is_cheap(p) for p in node.all_input_nodes)
    if not node.all_input_nodes:
        return True
    arguments = node.target._schema.arguments
    return any(a.alias_info is not None and not a.alias_info.is_write for a in arguments)


def _extract(
    module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    """Return the part of a graph between some nodes."""
    needed: set[fx.Node] = set()
    asked, stop = [n for n in outputs if isinstance(n, fx.Node)], set(inputs)
    while asked:
        node = asked.pop()
        if node not in needed and node not in stop:
            needed.add(node)
            asked.extend(node.all_input_nodes)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for i, node in enumerate(inputs):
        copies[node] = graph.placeholder(f"input_{i}")
        copies[node].meta = dict(node.meta)
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, lambda parent: copies[parent])
    graph.output([copies[n] if isinstance(n, fx.Node) else n for n in outputs])
    return fx.GraphModule(module, graph)
