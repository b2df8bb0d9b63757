"""The inner solution as a differentiable function w_T(w₀, h): one node of torch's graph."""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from hypergrad.attention import math_attention
from hypergrad.compiled.report import CompileReport
from hypergrad.first_order import devices
from hypergrad.optimizers import Optimizer, State
from hypergrad.optimizers.flat import flatten, unflatten
from hypergrad.optimizers.values import constants
from hypergrad.problem import Problem, inner_gradient
from hypergrad.status import Status
from hypergrad.training import Loop, detached
from hypergrad.tree import Leaves

__all__ = ["Grads", "Report", "Run", "aliases", "descend", "direct_grads", "solution"]

Grads = Sequence[Tensor | None]
"""Adjoints of some tensors; None where nothing depends on one."""


@dataclass
class Report:
    """How a solution, and the last hypergradient through it, were obtained.

    Attributes:
        steps: inner steps taken.
        grad_norm: ‖∂f/∂w‖₂ at the solution, where a tolerance was asked for.
        residual: of the linear system, where one was solved.
        n_hvp: Hessian-vector products of the last backward pass.
        status: of the last backward pass; None before there was one.
        compiled: what compiling did for it, where it was asked for.
    """

    steps: int
    grad_norm: float | None = None
    residual: float | None = None
    n_hvp: int = 0
    status: Status | None = None
    compiled: CompileReport | None = None


@dataclass
class Run(ABC):
    """One inner training run: its forward pass and its vector-Jacobian products.

    Attributes:
        problem: its inner loss is minimized.
        params: leaves at w₀.
        hparams: leaves at h.
        optimizer: the update rule.
        optimizer_state: before the first step; after `forward`, after the last one.
        batch: third argument of the loss, or a callable t -> batch.
        report: see `Report`.
    """

    problem: Problem
    params: Leaves
    hparams: Leaves
    optimizer: Optimizer
    optimizer_state: State | None
    batch: Any
    report: Report = field(default_factory=lambda: Report(0))

    @property
    def devices(self) -> set[torch.device]:
        """Where the losses may draw random numbers."""
        return devices(self.params, self.hparams)

    @abstractmethod
    def forward(self) -> list[Tensor]:
        """Train; returns w_T."""

    @abstractmethod
    def pullback(self, bars: list[Tensor], end: list[Tensor]) -> tuple[Grads, Grads]:
        """Return (dw_T/dw₀)ᵀ w̄ and (dw_T/dh)ᵀ w̄, given w_T."""

    @abstractmethod
    def differentiable_pullback(
        self, bars: list[Tensor], end: list[Tensor], start: list[Tensor], hyper: list[Tensor]
    ) -> tuple[Grads, Grads]:
        """Return the same as a differentiable function of w̄, w_T, w₀ and h.

        The pullback is linear in w̄ and depends on the others through second derivatives of f;
        all of them may be attached to a graph.
        """


class _Solution(Function):
    @staticmethod
    def forward(ctx: Any, run: Run, split: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        end = tuple(run.forward())
        ctx.run, ctx.split = run, split
        ctx.save_for_backward(*inputs, *end)
        return end

    @staticmethod
    def backward(ctx: Any, *bars: Tensor) -> tuple[Any, ...]:
        run, split = ctx.run, ctx.split
        saved = list(ctx.saved_tensors)  # raises where the graph was freed already
        inputs, end = saved[: -len(bars)], saved[-len(bars) :]
        if torch.is_grad_enabled():  # create_graph=True
            start, hyper = inputs[:split], inputs[split:]
            found = run.differentiable_pullback([*bars], end, start, hyper)
        else:
            found = run.pullback([*bars], end)
        grads = [*found[0], *found[1]]
        cast = [None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)]
        return None, None, *cast


def solution(run: Run, start: Sequence[Tensor], hyper: Sequence[Tensor]) -> list[Tensor]:
    """Run it and return w_T, attached to the caller's tensors w₀ and h.

    Derivatives of every order exist: a backward pass with ``create_graph=True`` is attached too.
    """
    apply: Callable[..., tuple[Tensor, ...]] = _Solution.apply
    return list(apply(run, len(start), *start, *hyper))


def aliases(leaves: Leaves, tensors: Sequence[Tensor]) -> Leaves:
    """Return leaves over views of `tensors`.

    A gradient in the views is one in this place alone, even where the tensors depend on each
    other or stand elsewhere too, and with ``create_graph=True`` it is attached to the tensors.
    """
    with torch.enable_grad():
        return replace(leaves, tensors=[t.view_as(t) for t in tensors])


def direct_grads(
    output: Tensor, inputs: Sequence[Tensor], bar: Tensor, create_graph: bool
) -> list[Tensor | None]:
    """Return (∂output/∂inputs)ᵀ bar; None for an input without a gradient."""
    wanted = [x for x in inputs if x.requires_grad]
    found: Sequence[Tensor | None] = [None] * len(wanted)
    if output.requires_grad and wanted:
        found = torch.autograd.grad(
            output, wanted, bar.to(output), create_graph=create_graph, allow_unused=True
        )
    rest = iter(found)
    return [next(rest) if x.requires_grad else None for x in inputs]


def descend(run: Run, steps: int, grad_norm: float | None) -> list[Tensor]:
    """Train without a graph, at most `steps` steps or until ‖∇_w f‖₂ ≤ `grad_norm`; returns w.

    A tolerance that was not reached gives a RuntimeWarning.
    """
    with torch.no_grad():
        values = constants(run.optimizer.resolve(run.hparams.tree(), run.params))
    fixed = detached(run.hparams)
    loop = Loop(run.problem, run.params, fixed, run.optimizer, values, run.batch)
    flat, state = loop.start(run.optimizer_state)
    run.report = Report(steps)
    norm = math.inf
    with math_attention():
        for t in range(steps if grad_norm is None else steps + 1):
            at = loop.at(flat)
            batch, where = loop.batch_at(t), f" at step {t}"
            _, grads = inner_gradient(run.problem, at, fixed, batch, where, create_graph=False)
            grad = flatten(grads)
            if grad_norm is not None:
                norm = float(grad.norm())
                run.report = Report(t, grad_norm=norm)
                if norm <= grad_norm or t == steps:
                    break
            flat, state = loop.move(t, flat, grad, state)
    run.optimizer_state = state
    if grad_norm is not None and norm > grad_norm:
        warnings.warn(
            f"inner training took all {steps} steps and stopped at a gradient norm of "
            f"{norm:.1e}, above grad_norm={grad_norm:.1e}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return [t.clone() for t in unflatten(flat, run.params.tensors)]
