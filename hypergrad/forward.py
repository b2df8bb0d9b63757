"""Forward-mode differentiation through the inner optimization: few hyperparameters, no memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hypergrad.attention import math_attention
from hypergrad.estimator import Estimator, Hypergradient
from hypergrad.optimizers import Optimizer, State, as_optimizer
from hypergrad.optimizers.base import vectors
from hypergrad.optimizers.flat import flatten, unflatten, widen
from hypergrad.optimizers.values import constants, tuned
from hypergrad.outer import outer_gradients, total_gradient
from hypergrad.problem import Problem, inner_gradient
from hypergrad.status import Status
from hypergrad.training import Loop, UnrolledState, check_optimizer, check_steps, detached
from hypergrad.tree import Leaves, Tree, hyper_leaves, trainable_leaves

__all__ = ["Forward", "Pushforward"]


@dataclass(frozen=True)
class Forward(Estimator[UnrolledState]):
    """dF(w_T, h)/dh as `Unrolled` computes it, by carrying tangents along with the steps.

    For each scalar hyperparameter hⱼ the tangents ẇ = dw_t/dhⱼ and ṡ = ds_t/dhⱼ follow

        ġ = ∂²f/∂w² ẇ + ∂²f/∂w∂hⱼ,   (ẇ, ṡ)_{t+1} = ∂U · (ẇ, ġ, ṡ, dθ/dhⱼ)

    and dF/dhⱼ = ∂F/∂w · ẇ_T + ∂F/∂hⱼ.  Time grows with the number n of scalar hyperparameters (n
    Hessian-vector products per step), memory is n + 1 copies of w and s whatever the number of
    steps.  Use it for a handful of hyperparameters and many steps; the result is that of
    `Unrolled` to rounding.  Continuing, random numbers and narrow dtypes: see `Unrolled`.

    A Hessian-vector product is taken as the derivative of the vector-Jacobian product, on a
    graph that all tangents of a step share.

    Source: Franceschi et al., ICML 2017, section 3.2.

    Attributes:
        optimizer: as in `Unrolled`.
        steps: T ≥ 1.
    """

    optimizer: Optimizer | None = None
    steps: int = 0

    def __post_init__(self) -> None:
        check_steps("Forward", self.steps)
        object.__setattr__(self, "optimizer", as_optimizer(self.optimizer))

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
        """Run the inner optimization from `params`, with tangents.

        Raises:
            ValueError, FloatingPointError: as `Unrolled`.
        """
        optimizer = check_optimizer("Forward", self.optimizer)
        leaves, hyper = trainable_leaves(params), hyper_leaves(hparams)
        with torch.enable_grad():
            values = optimizer.resolve(hyper.tree(), leaves)
        loop = Loop(problem, leaves, detached(hyper), optimizer, constants(values), inner_batch)
        pushforward = Pushforward(loop, hyper, tuned(values))
        flat, inner = loop.start(state["optimizer"])
        with math_attention():
            for t in range(self.steps):
                flat, inner = pushforward.step(t, flat, inner)
            value, w_bar, direct = outer_gradients(problem, loop.at(flat), hyper, outer_batch)
        indirect = pushforward.contract(widen(flatten(w_bar)))
        hypergradient = Hypergradient(
            value=value,
            grad=total_gradient(hyper, direct, indirect, ", nor the optimizer"),
            params=loop.params(flat),
            residual=None,
            error_bound=None,
            n_hvp=self.steps * len(pushforward.tangents),
            n_grad=self.steps + 1,
            status=Status.EXACT,
        )
        return hypergradient, {"optimizer": inner}


@dataclass
class _Tangent:
    """The derivative in one scalar hyperparameter; None stands for zero."""

    hyper: list[Tensor | None]
    values: list[Tensor]
    flat: Tensor | None = None
    state: dict[str, Tensor] = field(default_factory=dict)


class Pushforward:
    """Carries one tangent per scalar hyperparameter along the inner loop."""

    def __init__(self, loop: Loop, hyper: Leaves, values: dict[str, Tensor]) -> None:
        self.loop = loop
        self.hyper = hyper
        self.values = values
        linear = _Linear(list(values.values()), hyper.tensors)
        self.reached = linear.reached
        self.tangents = []
        for i, leaf in enumerate(hyper.tensors):
            for basis in torch.eye(leaf.numel(), dtype=leaf.dtype, device=leaf.device):
                direction: list[Tensor | None] = [None] * len(hyper.tensors)
                direction[i] = basis.view(leaf.shape)
                self.tangents.append(_Tangent(direction, linear(direction)))

    def step(self, t: int, flat: Tensor, state: State) -> tuple[Tensor, State]:
        """Take one step with all tangents."""
        loop = self.loop
        at = loop.at(flat)
        batch = loop.batch_at(t)
        _, grads = inner_gradient(loop.problem, at, self.hyper, batch, f" at step {t}")
        with torch.enable_grad():
            grad = flatten(grads)
        gradient = _Linear([grad], [*at.tensors, *self.hyper.tensors])
        in_hyper = gradient.reached[len(at.tensors) :]
        self.reached = [a or b for a, b in zip(self.reached, in_hyper, strict=True)]

        move, after = self._move(flat, grad.detach(), state)
        before = list(vectors(state))
        for tangent in self.tangents:
            pieces: list[Tensor | None] = [None] * len(at.tensors)
            if tangent.flat is not None:
                pieces = [*unflatten(tangent.flat.to(flat.dtype), at.tensors)]
            (grad_dot,) = gradient([*pieces, *tangent.hyper])
            entries = [tangent.state.get(key) for key in before]
            moved = move([tangent.flat, widen(grad_dot), *entries, *tangent.values])
            tangent.flat, tangent.state = moved[0], dict(zip(after, moved[1:], strict=True))
        return loop.move(t, flat, grad.detach(), state)

    def _move(self, flat: Tensor, grad: Tensor, state: State) -> tuple[_Linear, list[str]]:
        """Linearize the optimizer in w, ∇f, s and θ; also return the names in its new state."""
        w, g = (widen(x).detach().requires_grad_() for x in (flat, grad))
        s = {k: widen(v).detach().requires_grad_() for k, v in vectors(state).items()}
        theta = {k: v.detach().requires_grad_() for k, v in self.values.items()}
        with torch.enable_grad():
            out, new = self.loop.optimizer.update(
                w, g, {**state, **s}, {**self.loop.values, **theta}
            )
        outputs = vectors(new)
        linear = _Linear([out, *outputs.values()], [w, g, *s.values(), *theta.values()])
        return linear, list(outputs)

    def contract(self, w_bar: Tensor) -> list[Tensor | None]:
        """Return ẇᵀ w̄ by leaf of the hyperparameters; None where nothing was reached."""
        products = [
            w_bar.new_zeros(()) if t.flat is None else t.flat @ w_bar for t in self.tangents
        ]
        sizes = [leaf.numel() for leaf in self.hyper.tensors]
        pieces = torch.stack(products).split_with_sizes(sizes)
        return [
            piece.view(leaf.shape) if reached else None
            for piece, leaf, reached in zip(pieces, self.hyper.tensors, self.reached, strict=True)
        ]


class _Linear:
    """The Jacobian J of outputs in inputs, applied as the derivative of u ↦ Jᵀu."""

    def __init__(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        self.u = [torch.zeros_like(y).requires_grad_() for y in outputs]
        live = [(y, u) for y, u in zip(outputs, self.u, strict=True) if y.requires_grad]
        self.vjp: Sequence[Tensor | None] = [None] * len(inputs)
        if live:
            ys, us = zip(*live, strict=True)
            self.vjp = torch.autograd.grad(ys, inputs, us, create_graph=True, allow_unused=True)

    @property
    def reached(self) -> list[bool]:
        """Which inputs any output depends on."""
        return [v is not None for v in self.vjp]

    def __call__(self, tangents: Sequence[Tensor | None]) -> list[Tensor]:
        """Return J·tangents; None stands for zero."""
        pairs = [
            (v, x)
            for v, x in zip(self.vjp, tangents, strict=True)
            if v is not None and v.requires_grad and x is not None
        ]
        if not pairs:
            return [torch.zeros_like(u) for u in self.u]
        vs, xs = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            vs, self.u, xs, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return [*found]
