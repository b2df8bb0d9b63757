"""Modules under `torch.compile`, run eagerly where their second derivative is taken."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager

import torch
from torch import nn

__all__ = ["eagerly", "is_compiled"]


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or a part of it is compiled (`torch.compile(m)` or `m.compile()`)."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return False
    return any(
        isinstance(m, dynamo.OptimizedModule) or getattr(m, "_compiled_call_impl", None) is not None
        for m in module.modules()
    )


def eagerly() -> AbstractContextManager[None]:
    """Run compiled code as it was before: a graph of `torch.compile` has no double backward."""
    context: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return context
