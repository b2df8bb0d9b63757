"""DiffoRA: which modules of a network are adapted, by a relaxed matrix of gates.

    w_lj = W₀ + G_lj (g(W₀, θ_lj) − W₀),   G = softmax over each row of α, or sigmoid(α)
    min_α L_val(θ*(α), α)   s. t.   θ*(α) = argmin_θ L_train(θ, α)

One entry of α for each module j of layer l.  Search alternates a step of θ on training batches and
a step of α on validation batches; then the best share ρ of the modules is kept, and they are
adapted anew.  Works over anything with a `gate`: every weight map of `adapters.reparam` has one.

Only the abstract of the paper and a summary could be read: relaxation, update and discretization
are the standard form of differentiable search (derived), and whether the paper uses softmax rows or
sigmoids is open.  Score, the gradient of the validation loss in the gates at G = 1, is a simpler
selector (derived) that costs the same.

Source: Jiang, Wang and Yuan, DiffoRA, arXiv 2502.08905.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from bilevel.outer_optimizer import optimizer_step
from bilevel.selection import (
    Gated,
    Relaxation,
    Scope,
    Selection,
    discretize,
    gates,
    in_order,
)

__all__ = ["DifferentialSearch", "SearchState"]

Loss = Callable[[Any], Tensor]
Batches = Callable[[int], Any]


class SearchState(TypedDict):
    """All that moves in a search; tensors and plain data, so that `torch.save` takes it.

    Attributes:
        step: steps of θ done.
        logits: α, shape (layers, modules).
        scores: accumulated −∂L_val/∂G at G = 1, for the score selector.
        optimizer: of α; None before its first step.
        history: α, or the scores, after each step of it.
    """

    step: int
    logits: Tensor
    scores: Tensor
    optimizer: dict[str, Any] | None
    history: list[Tensor]


@dataclass(frozen=True)
class DifferentialSearch:
    """Search for the modules that are worth adapting.

        rows = [["0"], ["2"]]  # names of modules, one row a layer; or layer_rows(maps(model))
        found = DifferentialSearch()(maps(model), rows, params, loss, train, val, share=0.5)

    `init`, `step`, `gates` and `selection` are the pieces of that call for loops of your own, with
    an explicit state: stored and restored, the search goes on with the same numbers.

    Attributes:
        steps: steps of θ.
        warm_up: steps of θ before α moves: at B = 0 the first-order gradient of α is exactly zero.
        lr: of Adam on θ, and the step ξ of "finite_difference".
        gate_lr: of the rule of α.
        gate_rule: "adam", betas (.5, .999), which is usual in differentiable search; or "sgd",
            under which α is the sum of its gradients: one that is small noise moves little.
        relaxation: of the gates.
        hypergradient: "first_order" takes ∂L_val/∂α; "finite_difference" adds the response of one
            step of length `lr` by a central difference (Liu et al., DARTS, 2019); "score" leaves
            all gates at one and accumulates −∂L_val/∂G.
        scope: see `discretize`.

    Raises:
        ValueError: a count or rate out of its range, or an unknown name.
    """

    steps: int = 200
    warm_up: int = 20
    lr: float = 5e-3
    gate_lr: float = 2e-2
    gate_rule: Literal["adam", "sgd"] = "adam"
    relaxation: Relaxation = "softmax"
    hypergradient: Literal["first_order", "finite_difference", "score"] = "first_order"
    scope: Scope = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up < self.steps:
            raise ValueError(
                f"warm_up must lie in 0 ... steps − 1 = {self.steps - 1}, but got {self.warm_up}."
            )
        if not self.lr > 0 or not self.gate_lr > 0:
            raise ValueError(f"rates must be positive, but got {self.lr} and {self.gate_lr}.")
        if self.gate_rule not in ("adam", "sgd"):
            raise ValueError(f"gate_rule must be 'adam' or 'sgd', but got {self.gate_rule!r}.")
        if self.hypergradient not in ("first_order", "finite_difference", "score"):
            raise ValueError(f"unknown hypergradient {self.hypergradient!r}.")
        gates(torch.zeros(1, 1), self.relaxation)
        discretize(torch.zeros(1, 1), 1.0, self.scope, torch.ones(1, 1))

    def __call__(
        self,
        modules: Mapping[str, Gated],
        rows: Sequence[Sequence[str]],
        params: Sequence[nn.Parameter],
        loss: Loss,
        train: Batches,
        val: Batches,
        *,
        share: float,
        sizes: Tensor | None = None,
    ) -> Selection:
        """Train θ and α in turn, and select; the gates are at one afterwards.

        Args:
            modules: gated modules by name.
            rows: their names, one row for each layer, rows of one length.
            params: θ; every one takes part in the loss.
            loss: ``(batch) -> scalar`` of the model with its gates.
            train: step -> training batch.
            val: step -> validation batch; never of training samples.
            share: ρ.
            sizes: see `discretize`.

        Raises:
            ValueError: no module, rows of different lengths, an unknown or repeated name, no
                parameter, or gates that the loss does not depend on.
            TypeError: a module without a gate.
            FloatingPointError: a loss is not finite; θ holds its last finite values.
        """
        gated = in_order(modules, rows)
        if not params or not all(p.requires_grad for p in params):
            raise ValueError("params must hold parameters that require grad.")
        state = self.init(rows, params[0])
        discretize(state["logits"], share, self.scope, sizes)
        inner = torch.optim.Adam(params, self.lr)
        try:
            for step in range(self.steps):
                state = self.step(state, gated, params, loss, train, val)
                _set(gated, self.gates(state))
                value = _finite(loss(train(step)), "training", step)
                for parameter, gradient in zip(
                    params, torch.autograd.grad(value, params), strict=True
                ):
                    parameter.grad = gradient
                inner.step()
        finally:
            for each in gated:
                each.gate = 1.0
            inner.zero_grad()
        return self.selection(state, rows, share, sizes)

    def init(self, rows: Sequence[Sequence[str]], like: Tensor) -> SearchState:
        """Return the state before the first step: α = 0, in the dtype and device of a tensor."""
        zeros = torch.zeros(len(rows), len(rows[0]), dtype=like.dtype, device=like.device)
        return {
            "step": 0, "logits": zeros, "scores": zeros.clone(), "optimizer": None, "history": [],
        }  # fmt: skip

    def gates(self, state: SearchState) -> Tensor:
        """Return the gates at which θ is trained, shape (layers, modules), without gradient."""
        if self._scoring:
            return torch.ones_like(state["logits"])
        return gates(state["logits"], self.relaxation)

    def step(
        self,
        state: SearchState,
        gated: Sequence[Gated],
        params: Sequence[nn.Parameter],
        loss: Loss,
        train: Batches,
        val: Batches,
    ) -> SearchState:
        """Move α by one step, once the warm-up is over; the arguments but the gates stay.

        Args:
            state: where the search stands.
            gated: the modules in the order of the matrix, row by row; their gates change.
            params: θ.
            loss: see `__call__`.
            train: step -> training batch; "finite_difference" alone needs it.
            val: step -> validation batch.

        Raises:
            ValueError: gates that the loss does not depend on.
            FloatingPointError: a loss is not finite.
        """
        step = state["step"]
        after: SearchState = {**state, "step": step + 1}
        if step < self.warm_up:
            return after
        with torch.enable_grad():
            found = self._hypergradient(state["logits"], gated, params, loss, train, val, step)
        if self._scoring:
            after["scores"] = moved = state["scores"] - found
        else:
            rule = _adam if self.gate_rule == "adam" else torch.optim.SGD
            moving = ({"logits": state["logits"]}, {"logits": found}, {"logits": self.gate_lr})
            values, after["optimizer"] = optimizer_step(rule, *moving, state["optimizer"])
            after["logits"] = moved = values["logits"]
        after["history"] = [*state["history"], moved]
        return after

    def selection(
        self,
        state: SearchState,
        rows: Sequence[Sequence[str]],
        share: float,
        sizes: Tensor | None = None,
    ) -> Selection:
        """Return the best share of the modules at a state; see `discretize`."""
        result = state["scores"] if self._scoring else state["logits"]
        return self.selected(state, rows, discretize(result, share, self.scope, sizes))

    def selected(
        self, state: SearchState, rows: Sequence[Sequence[str]], mask: Tensor
    ) -> Selection:
        """Return a selection made at a state."""
        result = state["scores"] if self._scoring else state["logits"]
        flat = [name for row in rows for name in row]
        names = [name for name, kept in zip(flat, mask.flatten().tolist(), strict=True) if kept]
        history = torch.stack(state["history"]) if state["history"] else result[None][:0]
        return Selection(result, mask, names, history)

    @property
    def _scoring(self) -> bool:
        return self.hypergradient == "score"

    def _hypergradient(
        self,
        at: Tensor,
        gated: Sequence[Gated],
        params: Sequence[nn.Parameter],
        loss: Loss,
        train: Batches,
        val: Batches,
        step: int,
    ) -> Tensor:
        """Return the gradient of the validation loss in α, or in the gates for the score."""
        logits = at.detach().clone().requires_grad_()

        def gradient(batch: Any, split: str, *more: Tensor) -> list[Tensor]:
            ones = torch.ones_like(logits).requires_grad_()
            values = ones if self._scoring else gates(logits, self.relaxation)
            _set(gated, values)
            inputs = [ones if self._scoring else logits, *more]
            return _gradient(_finite(loss(batch), split, step), inputs)

        if self.hypergradient != "finite_difference":
            return gradient(val(step), "validation")[0]
        saved = [p.detach().clone() for p in params]
        try:
            forward = gradient(train(step), "training", *params)[1:]
            _write(params, [w - self.lr * g for w, g in zip(saved, forward, strict=True)])
            direct, *response = gradient(val(step), "validation", *params)
            norm = torch.sqrt(torch.stack([g.square().sum() for g in response]).sum())
            epsilon = 0.01 / float(norm.clamp(min=1e-12))
            ends = []
            for sign in (1.0, -1.0):
                moved = [w + sign * epsilon * g for w, g in zip(saved, response, strict=True)]
                _write(params, moved)
                ends.append(gradient(train(step), "training")[0])
        finally:
            _write(params, saved)
        return direct - self.lr * (ends[0] - ends[1]) / (2 * epsilon)


def _adam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, betas=(0.5, 0.999))


def _set(gated: Sequence[Gated], values: Tensor) -> None:
    for each, value in zip(gated, values.flatten(), strict=True):
        each.gate = value


def _finite(loss: Tensor, split: str, step: int) -> Tensor:
    if not loss.detach().isfinite().all():
        raise FloatingPointError(
            f"the {split} loss of the search is {float(loss.detach())} at step {step}."
        )
    return loss


def _gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    if found[0] is None:
        raise ValueError("the loss does not depend on any gate; do the modules read `gate`?")
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


@torch.no_grad()
def _write(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(params, values, strict=True):
        parameter.copy_(value)
