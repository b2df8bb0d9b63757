"""Reverse-mode differentiation through the inner optimization, with a choice of memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from hypergrad.attention import math_attention
from hypergrad.compiled.session import Arguments, run
from hypergrad.compiled.unrolled import unrolled
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.forward import Forward
from hypergrad.memory import Memory
from hypergrad.optimizers import Optimizer, as_optimizer
from hypergrad.optimizers.base import State
from hypergrad.optimizers.flat import flatten
from hypergrad.optimizers.values import constants
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem
from hypergrad.status import Status
from hypergrad.tape import Tape
from hypergrad.training import Loop, UnrolledState, check_optimizer, check_steps, detached
from hypergrad.trajectory import Trajectory, trace
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves

__all__ = ["Unrolled"]


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
            every √K steps, and √K graphs at a time recomputed from there.  Both recompute each
            step once (1.2 to 1.5 times the time); segments hold the least where states are
            large, replay where the graph of a step is.
            "auto": the graph if it takes less than a quarter of the free memory, judged by the
            first differentiable step; otherwise segments of the length that holds the least.
            "forward": no backward pass at all, see `Forward`; time grows with the number of
            hyperparameters, memory does not grow with T.
            A recomputed loss must be the same bit for bit: a callable inner batch must return
            the same batch for the same t.
        segment: with memory="segments", the length of one instead of √K.
    """

    optimizer: Optimizer | None = None
    steps: int = 0
    truncation: int | None = None
    memory: Memory = "auto"
    segment: int | None = None
    compile: Literal["off", "step", "chunk"] = "off"

    def __post_init__(self) -> None:
        check_steps("Unrolled", self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))
        if self.truncation is not None and not 1 <= self.truncation <= self.steps:
            raise ValueError(
                f"truncation must be between 1 and steps={self.steps}, but got {self.truncation}."
            )
        if self.memory not in get_args(Memory):
            raise ValueError(f"memory must be one of {get_args(Memory)}, but got {self.memory!r}.")
        window = self.truncation or self.steps
        if self.memory == "forward" and window < self.steps:
            raise ValueError(
                f"truncation={self.truncation} needs a backward pass, but memory is 'forward'."
            )
        if self.segment is not None and self.memory != "segments":
            raise ValueError(
                f"segment={self.segment} is for memory='segments', but memory is {self.memory!r}."
            )
        if self.segment is not None and not 1 <= self.segment <= window:
            raise ValueError(
                f"segment must be between 1 and the {window} differentiated steps, but got "
                f"{self.segment}."
            )

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
            if self.compile != "off":
                arguments = Arguments(problem, params, hparams, inner_batch, outer_batch, state)
                return run(self, unrolled, arguments)
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
        if self.memory == "forward":
            forward = Forward(self.optimizer, self.steps)
            return forward(problem, params, hparams, inner_batch, outer_batch, state)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        trajectory = self.trace(problem, leaves, hyper, inner_batch, state["optimizer"])
        at = trajectory.tape.loop.at(trajectory.flat)
        value, w_bar, direct = outer_gradients(problem, at, hyper, outer_batch)
        pulled = trajectory.pullback(flatten(w_bar))
        window = self.truncation or self.steps
        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(hyper, direct, pulled.hyper, ", nor the optimizer"),
            params=trajectory.params(),
            residual=None,
            error_bound=None,
            n_hvp=window,
            n_grad=trajectory.n_grad + 1,
            status=Status.EXACT if window == self.steps else Status.APPROXIMATE,
        )
        return hypergradient, {"optimizer": trajectory.state}

    def trace(
        self,
        problem: Problem,
        params: Leaves,
        hparams: Leaves,
        inner_batch: Any,
        optimizer_state: State | None,
    ) -> Trajectory:
        """Run the inner optimization forward, ready to be pulled back; errors as in a call.

        Raises:
            ValueError: memory is "forward", which has no backward pass.
        """
        if self.memory == "forward":
            raise ValueError("memory='forward' has no backward pass; choose another memory.")
        optimizer = check_optimizer("Unrolled", self.optimizer)
        with torch.enable_grad():
            values = optimizer.resolve(hparams.tree(), params)
        loop = Loop(problem, params, detached(hparams), optimizer, constants(values), inner_batch)
        window = self.truncation or self.steps
        tape = Tape(loop, hparams)
        length = {
            "auto": None,
            "graph": window,
            "replay": 1,
            "segments": self.segment or math.isqrt(window),
        }[self.memory]
        return trace(tape, values, optimizer_state, self.steps, window, length)
