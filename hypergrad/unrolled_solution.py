"""The solution map of `Unrolled`: T steps of the optimizer, differentiated one by one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import optree
import torch
from torch import Tensor

from hypergrad.attention import math_attention
from hypergrad.compiled.trajectory import CompiledTrajectory
from hypergrad.first_order import replayed
from hypergrad.forward import Pushforward
from hypergrad.optimizers.base import State, vectors
from hypergrad.optimizers.flat import flatten, unflatten, widen
from hypergrad.optimizers.values import Values, constants, tuned
from hypergrad.problem import inner_gradient
from hypergrad.randomness import RandomState
from hypergrad.solution import Grads, Report, Run, aliases, direct_grads
from hypergrad.status import Status
from hypergrad.training import Loop, check_move, detached
from hypergrad.trajectory import Trajectory
from hypergrad.tree import Leaves
from hypergrad.unrolled import Unrolled

__all__ = ["ForwardRun", "UnrolledRun"]


@dataclass
class UnrolledRun(Run):
    """w_T of T steps; the pullback walks back over them.

    Where the steps before the last K are truncated, they count as constants in h, and dw_{T-K}/dw₀
    as the identity (what first-order MAML makes of all steps).

    Attributes:
        method: steps, truncation, memory.
    """

    method: Unrolled = field(kw_only=True)

    def forward(self) -> list[Tensor]:
        self._begin = self.optimizer_state
        self._random = RandomState.capture(self.devices)
        trajectory = self._trace()
        self._trajectory: Trajectory | CompiledTrajectory | None = trajectory
        self.optimizer_state = trajectory.state
        exact = self._window == self.method.steps
        status = Status.EXACT if exact else Status.APPROXIMATE
        self.report = Report(self.method.steps, n_hvp=self._window, status=status)
        if isinstance(trajectory, CompiledTrajectory):
            self.report.compiled = trajectory.report
        return [t.clone() for t in unflatten(trajectory.flat, self.params.tensors)]

    @property
    def _window(self) -> int:
        return self.method.truncation or self.method.steps

    def _trace(self) -> Trajectory | CompiledTrajectory:
        level = (self.problem, self.params, self.hparams, self.batch, self._begin)
        moving = len(optree.tree_leaves(self.hparams.tree())) == len(self.hparams.tensors)
        with math_attention():
            if self.method.compile != "off" and moving:
                return CompiledTrajectory(self.method, *level)
            return replace(self.method, compile="off").trace(*level)

    def pullback(self, bars: list[Tensor], end: list[Tensor]) -> tuple[Grads, Grads]:
        trajectory, self._trajectory = self._trajectory, None
        if trajectory is None:  # an earlier backward pass used it up
            with replayed(self._random):
                trajectory = self._trace()
        with math_attention():
            pulled = trajectory.pullback(flatten(bars))
        if isinstance(trajectory, CompiledTrajectory):
            self.report.compiled = trajectory.report
        return unflatten(pulled.start, self.params.tensors), pulled.hyper

    def differentiable_pullback(
        self, bars: list[Tensor], end: list[Tensor], start: list[Tensor], hyper: list[Tensor]
    ) -> tuple[Grads, Grads]:
        """Take the steps again in one graph, which autograd differentiates to any order."""
        self._trajectory = None
        w, h = aliases(self.params, start), aliases(self.hparams, hyper)
        with math_attention(), replayed(self._random):
            flat = self._unroll(w, h)
        found = direct_grads(flat, [*w.tensors, *h.tensors], flatten(bars), create_graph=True)
        return found[: len(start)], found[len(start) :]

    def _unroll(self, params: Leaves, hparams: Leaves) -> Tensor:
        """Return w_T with the graph of the last K steps."""
        values = self.optimizer.resolve(hparams.tree(), params)
        numbers = constants(values)
        first = self.method.steps - self._window
        loop = self._loop(numbers)
        flat, state = flatten(params.tensors), self._before(loop)
        if first:
            before = flat
            flat = flat.detach()
            for t in range(first):
                _, flat, state = loop.step(t, flat, state)
            flat = flat + (before - before.detach())
        for t in range(first, self.method.steps):
            if not flat.requires_grad:
                flat = flat.detach().requires_grad_()
            at = Leaves(unflatten(flat, params.tensors), params.names, params.rebuild)
            batch = loop.batch_at(t)
            _, grads = inner_gradient(self.problem, at, hparams, batch, f" at step {t}")
            grad = flatten(grads)
            after, state = self.optimizer.update(flat, grad, state, {**numbers, **tuned(values)})
            check_move(t, grad.detach(), after.detach(), params)
            flat = after
        return flat

    def _loop(self, numbers: Values) -> Loop:
        fixed = detached(self.hparams)
        return Loop(self.problem, self.params, fixed, self.optimizer, numbers, self.batch)

    def _before(self, loop: Loop) -> State:
        _, state = loop.start(self._begin)
        return {**state, **{k: v.detach() for k, v in vectors(state).items()}}


@dataclass
class ForwardRun(UnrolledRun):
    """The same with ``memory="forward"``: tangents dw_T/dh carried along, none for w₀."""

    def forward(self) -> list[Tensor]:
        self._begin = self.optimizer_state
        self._random = RandomState.capture(self.devices)
        self._trajectory = None
        with torch.enable_grad():
            values = self.optimizer.resolve(self.hparams.tree(), self.params)
        loop = self._loop(constants(values))
        self._pushforward = Pushforward(loop, self.hparams, tuned(values))
        flat, state = loop.start(self._begin)
        with math_attention():
            for t in range(self.method.steps):
                flat, state = self._pushforward.step(t, flat, state)
        self.optimizer_state = state
        products = self.method.steps * len(self._pushforward.tangents)
        self.report = Report(self.method.steps, n_hvp=products, status=Status.EXACT)
        return [t.clone() for t in unflatten(flat, self.params.tensors)]

    def pullback(self, bars: list[Tensor], end: list[Tensor]) -> tuple[Grads, Grads]:
        w_bar = widen(flatten(bars))
        return [None] * len(self.params.tensors), self._pushforward.contract(w_bar)

    def differentiable_pullback(
        self, bars: list[Tensor], end: list[Tensor], start: list[Tensor], hyper: list[Tensor]
    ) -> tuple[Grads, Grads]:
        """In reverse mode, as a derivative of higher order needs the graph of all steps anyway."""
        _, grads = super().differentiable_pullback(bars, end, start, hyper)
        return [None] * len(start), grads
