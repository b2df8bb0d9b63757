"""Reverse-mode differentiation through the inner optimization, with a choice of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

import torch

from hypergrad.attention import math_attention
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.optimizers import Optimizer, as_optimizer
from hypergrad.optimizers.base import State
from hypergrad.optimizers.flat import flatten, widen
from hypergrad.optimizers.values import constants
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem
from hypergrad.randomness import RandomState
from hypergrad.status import Status
from hypergrad.tape import Adjoint, Tape
from hypergrad.training import Loop, detached
from hypergrad.tree import Tree, hyper_leaves, trainable_leaves

__all__ = ["Unrolled", "UnrolledState"]

Memory = Literal["graph", "replay", "segments"]


class UnrolledState(TypedDict):
    """What continues from one call to the next.

    Attributes:
        optimizer: state of the inner optimizer after the last step; None before the first call.
    """

    optimizer: State | None


@dataclass(frozen=True)
class Unrolled(Estimator[UnrolledState]):
    """dF(w_T, h)/dh, where w_T is what T steps of the inner optimizer make of `params`.

    Runs (w, s)_{t+1} = U(w_t, ∇f(w_t, h), s_t; θ(h)) forward and the adjoint recursion

        (w̄, ḡ, s̄, θ̄)_t = Uᵀ(w̄, s̄)_{t+1},   w̄_t += ∂²f/∂w² ḡ,   h̄ += (∂²f/∂w∂h)ᵀ ḡ

    backward from w̄_T = ∂F/∂w and h̄ = ∂F/∂h.  Uᵀ is the optimizer's hand-written `adjoint`;
    autograd only differentiates ∇f.  The result is the exact derivative of the computation
    (status EXACT), whatever the curvature of f; h may enter through f, F and the optimizer.

    A call continues from `params` and from the optimizer state of the last call, as training
    does; train on from `Hypergradient.params`.  A fresh start, from newly drawn params, takes a
    fresh state from `init`: with the old one, the old momentum would move the new params.

    Random numbers: a call draws from the global generators what T plain steps and one outer
    loss draw, so dropout masks differ from call to call.  Recomputed steps see the masks of the
    first time, and draw nothing more.

    With bfloat16 or float16 params the steps run in that dtype, as training does, and adjoints
    are accumulated in float32.

    Source: Maclaurin et al., ICML 2015; Franceschi et al., ICML 2017 (reverse mode);
    Shaban et al., AISTATS 2019 (truncation).

    Attributes:
        optimizer: the inner update rule: ours, a TorchOpt transformation, or None for the rule
            that an inner learner trains with (an outer algorithm fills it in).
        steps: T ≥ 1.
        truncation: K: backpropagate through the last K steps only (status APPROXIMATE if K < T);
            cost and memory of the first T − K are those of plain training.
        memory: how the backward pass gets the graph of a step.  "graph": all kept, the fastest;
            "replay": each step recomputed from its stored (w, s); "segments": (w, s) stored
            every √T steps, and √T graphs at a time recomputed from there.  Both recompute each
            step once (1.2 to 1.5 times the time); segments hold the least where states are
            large, replay where the graph of a step is.
            A recomputed loss must be the same bit for bit: a callable inner batch must return
            the same batch for the same t.
    """

    optimizer: Optimizer | None = None
    steps: int = 0
    truncation: int | None = None
    memory: Memory = "graph"

    def __post_init__(self) -> None:
        check_steps("Unrolled", self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        if self.truncation is not None and not 1 <= self.truncation <= self.steps:
            raise ValueError(
                f"truncation must be between 1 and steps={self.steps}, but got {self.truncation}."
            )
        if self.memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {get_args(Memory)}, but got {self.memory!r}.")

    def init(self, problem: Problem, params: Tree, hparams: Tree) -> UnrolledState:
        """Return the state of an optimizer that has not moved yet."""
        return {"optimizer": None}

    def __call__(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: UnrolledState,
    ) -> tuple[Hypergradient, UnrolledState]:
        """Run the inner optimization from `params` and differentiate through it.

        Raises:
            ValueError: a hyperparameter that enters neither loss nor the optimizer; see also
                `train`.
            FloatingPointError: a loss, gradient, parameter or adjoint is not finite; names the
                step and the tensor.
            RuntimeError: a recomputed step gave another loss.
        """
        with math_attention():
            return self._run(problem, params, hparams, inner_batch, outer_batch, state)

    def _run(
        self,
        problem: Problem,
        params: Tree,
        hparams: Tree,
        inner_batch: Any,
        outer_batch: Any,
        state: UnrolledState,
    ) -> tuple[Hypergradient, UnrolledState]:
        optimizer = check_optimizer("Unrolled", self.optimizer)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        with torch.enable_grad():
            values = optimizer.resolve(hyper.tree(), leaves)
        loop = Loop(problem, leaves, detached(hyper), optimizer, constants(values), inner_batch)
        tape = Tape(loop, hyper)

        window = self.truncation or self.steps
        first = self.steps - window
        length = {"graph": window, "replay": 1, "segments": math.isqrt(window)}[self.memory]
        begins = range(first, self.steps, length)

        flat, inner = loop.start(state["optimizer"])
        for t in range(first):
            _, flat, inner = loop.step(t, flat, inner)
        segments = []
        for begin in begins[:-1]:
            segment, flat, inner = tape.run(begin, begin + length, flat, inner)
            segments.append(segment)
        records, _, flat, inner = tape.record(begins[-1], self.steps, flat, inner)

        value, w_bar, direct = outer_gradients(problem, loop.at(flat), hyper, outer_batch)
        adjoint = Adjoint(tape, values, widen(flatten(w_bar)))
        adjoint.walk(records)
        if segments:
            with RandomState.capture(tape.devices).restored_after():
                while segments:
                    adjoint.walk(tape.replay(segments.pop()))

        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(hyper, direct, adjoint.indirect(), ", nor the optimizer"),
            params=loop.params(flat),
            residual=None,
            error_bound=None,
            n_hvp=window,
            n_grad=self.steps + begins[-1] - first + 1,
            status=Status.EXACT if first == 0 else Status.APPROXIMATE,
        )
        return hypergradient, {"optimizer": inner}


def check_steps(name: str, steps: int) -> None:
    """Raise ValueError unless the number of inner steps is a positive integer."""
    if not isinstance(steps, int) or steps < 1:
        raise ValueError(f"{name} steps must be an integer of at least 1, but got {steps!r}.")


def check_optimizer(name: str, optimizer: Optimizer | None) -> Optimizer:
    """Return the optimizer.

    Raises:
        ValueError: there is none.
    """
    if optimizer is None:
        raise ValueError(
            f"{name} has optimizer=None, which stands for the rule of an inner learner and is "
            "filled in by an outer algorithm; pass one here, such as "
            f"{name}(SGD(lr=0.1), steps=10)."
        )
    return optimizer
