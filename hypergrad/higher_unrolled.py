"""Unrolling an imperative inner loop over a stateful module, by way of the library `higher`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from hypergrad.attention import math_attention
from hypergrad.eager import is_compiled
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.optimizers import Optimizer, State, Values, as_optimizer
from hypergrad.optimizers.flat import flatten, flatten_params, unflatten
from hypergrad.outer import total_gradient
from hypergrad.problem import ModuleProblem, Problem, check_scalar
from hypergrad.status import Status
from hypergrad.training import check_move, check_optimizer, check_steps
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves, zeros_for_none

__all__ = ["HigherUnrolled"]


class HigherState(TypedDict):
    """What continues from one call to the next; None before the first call.

    Attributes:
        optimizer: state of the inner optimizer.
        buffers: buffers of the module by name.
    """

    optimizer: State | None
    buffers: dict[str, Tensor] | None


@dataclass(frozen=True)
class HigherUnrolled(Estimator[HigherState]):
    """dF(w_T, h)/dh by backpropagation through one graph of all steps, on a patched module.

    As `Unrolled`, for losses over the module itself whose state must live through the inner
    loop: `higher` runs the loss on a copy of the module with replaceable weights, so buffers
    (BatchNorm's running statistics) advance from step to step, the outer loss sees them, and
    the next call goes on from them; the caller's module is never changed.  (`Unrolled` gives
    every evaluation fresh copies of the module's own buffers.)  A gradient does not flow
    through buffers that a module updates in place.  Costs more time and memory than `Unrolled`.

    The update rules are ours, hooked into `higher` as a differentiable optimizer: its own Adam
    misplaces eps (hypergradients off by 3 to 85 percent), and it ignores `maximize`.

    Attributes:
        optimizer: as in `Unrolled`.
        steps: T ≥ 1.
    """

    optimizer: Optimizer | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        check_steps("HigherUnrolled", self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> HigherState:
        """Return the state before the first step: the module's own buffers, a fresh optimizer."""
        _check_problem(problem, params)
        return {"optimizer": None, "buffers": None}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: HigherState,
    ) -> tuple[Hypergradient, HigherState]:
        """Run the inner loop from `params` on a patched copy of the module.

        Raises:
            TypeError: the problem is not from `module_problem`, or its module is compiled.
            ValueError: params are not those of the module; a hyperparameter that enters nowhere.
            FloatingPointError: a loss, or the hypergradient, is not finite.
        """
        optimizer = check_optimizer("HigherUnrolled", self.optimizer)
        problem = _check_problem(problem, params)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        with torch.enable_grad(), math_attention():
            values = optimizer.resolve(hyper.tree(), leaves)
            rule = _Rule(optimizer, values, leaves, state["optimizer"])
            with _innerloop(problem.module, rule) as (module, stepper):
                module.update_params(rule.params())
                _load_buffers(module, state["buffers"])
                for t in range(self.steps):
                    batch = inner_batch(t) if callable(inner_batch) else inner_batch
                    loss = problem.module_inner_loss(module, hyper.tree(), batch)
                    check_scalar(loss, "inner_loss", f" at step {t}")
                    stepper.step(loss)
                value = problem.module_outer_loss(module, hyper.tree(), outer_batch)
                check_scalar(value, "outer_loss")
                buffers = {k: b.detach().clone() for k, b in module.named_buffers()}
        w_bar, *grads = _gradients(value, [rule.flat, *hyper.tensors])
        if w_bar is None:
            raise ValueError(f"outer_loss depends on none of the parameters {leaves.names}.")
        nothing = [None] * len(grads)
        last = [piece.detach().clone() for piece in unflatten(rule.flat, leaves.tensors)]
        hypergradient = Hypergradient(
            value=value.detach(),
            grad=total_gradient(hyper, grads, nothing, ", nor the optimizer"),
            params=leaves.rebuild([piece.requires_grad_() for piece in last]),
            residual=None,
            error_bound=None,
            n_hvp=self.steps,
            n_grad=self.steps + 1,
            status=Status.EXACT,
        )
        end = {k: v.detach() if isinstance(v, Tensor) else v for k, v in rule.state.items()}
        return hypergradient, {"optimizer": end, "buffers": buffers}


class _Rule:
    """One of our optimizers as `higher` calls it: lists of gradients in, lists of params out."""

    def __init__(
        self, optimizer: Optimizer, values: Values, leaves: Leaves, state: State | None
    ) -> None:
        self.optimizer = optimizer
        self.values = values
        self.leaves = leaves
        self.flat = flatten_params(leaves).requires_grad_()
        self.state = optimizer.start(state, self.flat)
        self.taken = 0
        # Which trained tensor, or which constant, stands at each place of module.parameters().
        slots = leaves.rebuild(range(len(leaves.tensors)))  # type: ignore[arg-type]
        self.slots = list(slots.values())

    def params(self) -> list[Tensor]:
        """Return the current params in the order of module.parameters()."""
        pieces = unflatten(self.flat, self.leaves.tensors)
        return [pieces[slot] if isinstance(slot, int) else slot for slot in self.slots]

    def move(self, grads: Sequence[Tensor | None]) -> list[Tensor]:
        """Take one step, with a graph."""
        given = {s: g for s, g in zip(self.slots, grads, strict=True) if isinstance(s, int)}
        ordered = [given[i] for i in range(len(self.leaves.tensors))]
        grad = flatten(zeros_for_none(ordered, self.leaves.tensors))
        self.flat, self.state = self.optimizer.update(self.flat, grad, self.state, self.values)
        check_move(self.taken, grad.detach(), self.flat.detach(), self.leaves)
        self.taken += 1
        return self.params()


@contextmanager
def _innerloop(module: nn.Module, rule: _Rule) -> Iterator[tuple[Any, Any]]:
    """Patch a module for differentiable steps by a rule of ours (`higher.innerloop_ctx`)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher
    carrier = _register(higher)(module.parameters(), {})
    carrier.rule = rule
    with higher.innerloop_ctx(module, carrier) as pair:
        yield pair


@cache
def _register(higher: Any) -> Any:
    """Hook our rules into `higher`, under a class of their own so that nothing else changes."""

    class Carrier(torch.optim.Optimizer):
        """Brings a rule through `higher`'s constructor."""

    class Stepper(higher.optim.DifferentiableOptimizer):  # type: ignore[misc]
        def __init__(self, other: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(other, *args, **kwargs)
            self.rule = other.rule

        def _update(self, grouped_grads: list[list[Tensor | None]], **kwargs: Any) -> None:
            (group,), (grads,) = self.param_groups, grouped_grads
            group["params"][:] = self.rule.move(grads)

    higher.register_optim(Carrier, Stepper)
    return Carrier


def _check_problem(problem: Problem, params: Tree) -> ModuleProblem:
    if not isinstance(problem, ModuleProblem):
        raise TypeError(
            "HigherUnrolled needs the problem of module_problem(module, inner_loss, outer_loss), "
            f"but got {type(problem).__name__}; for losses over trees of tensors use Unrolled."
        )
    if is_compiled(problem.module):
        raise TypeError(
            "HigherUnrolled patches the module's own code, but this one is compiled by "
            "torch.compile; pass the module that was compiled, or use Unrolled."
        )
    names = [name for name, _ in problem.module.named_parameters()]
    if not isinstance(params, dict) or list(params) != names:
        raise ValueError(
            f"params must be a dict of the module's parameters {names}, but got "
            f"{list(params) if isinstance(params, dict) else type(params).__name__}."
        )
    return problem


def _load_buffers(module: nn.Module, buffers: dict[str, Tensor] | None) -> None:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if buffers is not None:
                buffer.copy_(buffers[name])


def _gradients(value: Tensor, inputs: list[Tensor]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(inputs)
    return torch.autograd.grad(value, inputs, allow_unused=True)
