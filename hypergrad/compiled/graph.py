"""Tensor functions as graphs: traced on fake tensors, checked, and compiled by inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from hypergrad.attention import math_attention
from hypergrad.compiled.products import rewrite_products
from hypergrad.compiled.report import CannotCompileError
from hypergrad.randomness import RandomState

__all__ = ["Graph", "Traced", "compile_graph", "retarget", "trace"]

TensorFunction = Callable[..., Sequence[Tensor]]


@dataclass(frozen=True)
class Traced:
    """A function of tensors as a graph of ATen operations without state.

    Attributes:
        module: the graph; its placeholders are the inputs, then the captured tensors.
        inputs: as many tensors as `module` has placeholders, to compile for.
        captured: tensors that the function read without being given them, by reference, so
            that a compiled call sees their values of that time.
    """

    module: fx.GraphModule
    inputs: list[Tensor]
    captured: list[Tensor]


@dataclass(frozen=True)
class Graph:
    """A compiled function of tensors of fixed shapes, strides, dtypes and devices."""

    function: Callable[[list[Tensor]], Sequence[Tensor]]
    captured: list[Tensor]

    def __call__(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return the outputs; inputs must not require grad under grad mode."""
        return self.function([*inputs, *self.captured])


def trace(function: TensorFunction, inputs: Sequence[Tensor]) -> Traced:
    """Record what `function` does with tensors such as `inputs`, whatever their values.

    Fake tensors have no values, so that nothing which depends on them can be recorded as a
    constant: `.item()`, `.numpy()` and branches on tensors end the trace.

    Raises:
        CannotCompileError: the trace ended early, the function draws random numbers, or it
            changes a tensor that it did not make.
    """
    import torch._inductor.lowering  # some decompositions look it up
    from torch._functorch.compile_utils import fx_graph_cse
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    # make_fx takes two inputs that are one object for one variable.
    distinct = [t.detach().view_as(t) for t in inputs]
    random = RandomState.capture({t.device for t in inputs})
    try:
        with random.restored_after(), math_attention(), torch.no_grad():
            module = make_fx(
                function,
                tracing_mode="fake",
                decomposition_table=select_decomp_table(),
                _allow_non_fake_inputs=True,
            )(*distinct)
    except Exception as error:
        raise CannotCompileError(f"it cannot be traced: {_first_line(error)}") from error
    captured = _lift_constants(module)
    if _check_pure(module):
        functional = torch.func.functionalize(module)
        module = make_fx(functional, tracing_mode="fake")(*distinct, *captured)
    module.graph = fx_graph_cse(module.graph)
    module.recompile()
    return Traced(module, [*distinct, *captured], captured)


def compile_graph(traced: Traced) -> Graph:
    """Compile a trace.

    Raises:
        CannotCompileError: inductor or the C++ compiler failed, or there is none.
    """
    try:
        with torch.no_grad():
            return Graph(_inductor(traced.module, traced.inputs), traced.captured)
    except Exception as error:
        raise CannotCompileError(f"inductor failed: {_first_line(error)}") from error


def _inductor(
    module: fx.GraphModule, inputs: Sequence[Tensor]
) -> Callable[[list[Tensor]], Sequence[Tensor]]:
    """Return what inductor makes of a graph of ATen operations.

    On a CPU the code that calls the kernels is in C++ too: a call of a small graph spends most
    of its time in allocations from Python otherwise.
    """
    import torch._inductor.config
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    # Inductor keeps graphs on disk for the next process only where it finds a shape environment.
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with tracing(TracingContext(fake)):
        like = [fake.from_tensor(t, static_shapes=True) for t in inputs]
        FakeTensorProp(module, fake).propagate_dont_convert_inputs(*like)
        # A view is what inductor takes a reshape for, in any memory order.
        retarget(module, torch.ops.aten.reshape.default, torch.ops.aten.view.default)
        rewrite_products(module)
        module = joint_graph_passes(module)
        cpu = all(t.device.type == "cpu" for t in inputs)
        # Inductor's patterns would put C + A B together again.
        with torch._inductor.config.patch(pattern_matcher=not cpu):
            function = compile_fx_inner(module, like, is_inference=True, cpp_wrapper=cpu)
    return cast(Callable[[list[Tensor]], Sequence[Tensor]], function)


def retarget(module: fx.GraphModule, before: Any, after: Any) -> None:
    """Replace an operation by another one."""
    for node in module.graph.nodes:
        if node.target is before:
            node.target = after
    module.recompile()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _lift_constants(module: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that a trace holds into inputs after the others."""
    graph = module.graph
    last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
    captured: list[Tensor] = []
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(module, str(node.target))
        if not isinstance(value, Tensor):
            raise CannotCompileError(f"it uses {node.target}, a {type(value).__name__}")
        with graph.inserting_after(last):
            last = graph.placeholder(f"captured_{len(captured)}")
        last.meta = dict(node.meta)
        node.replace_all_uses_with(last)
        graph.erase_node(node)
        captured.append(value.detach())
    module.recompile()
    return captured


def _check_pure(module: fx.GraphModule) -> bool:
    """Refuse random draws, values of tensors in Python, and changes of tensors from outside.

    Returns:
        Whether it changes tensors of its own in place.
    """
    given: set[fx.Node] = set()
    changes = False
    for node in module.graph.nodes:
        if node.op == "placeholder":
            given.add(node)
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        for tag, what in _REFUSED.items():
            if tag in node.target.tags:
                raise CannotCompileError(f"it {what} ({node.target})")
        for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
            if argument.alias_info is None:
                continue
            if not argument.alias_info.is_write:
                if value in given:
                    given.add(node)  # a view
                continue
            if value in given:
                raise CannotCompileError(f"it changes a tensor in place ({node.target})")
            changes = True
    return changes


_REFUSED = {
    torch.Tag.nondeterministic_seeded: "draws random numbers",
    torch.Tag.data_dependent_output: "reads the value of a tensor into Python",
    torch.Tag.dynamic_output_shape: "makes a tensor whose shape depends on values",
}
