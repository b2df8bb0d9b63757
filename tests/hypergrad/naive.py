"""Textbook references for the unrolled estimators: plain autograd, plain trees, no shared code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad import Problem
from tests.hypergrad.problems import Case

Tree = Any


def with_optimizer_hparams(case: Case, **numbers: Tensor | Tree) -> Case:
    """The same problem with further hyperparameters beside its own, which move to "loss"."""
    problem = Problem(
        lambda w, h, b: case.problem.inner_loss(w, h["loss"], b),
        lambda w, h, b: case.problem.outer_loss(w, h["loss"], b),
    )
    hparams = {"loss": case.hparams, **numbers}
    return Case(problem, case.params, hparams, case.inner, case.outer)


def sgd(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: Any,
    momentum: Any = 0.0,
    dampening: Any = 0.0,
    weight_decay: Any = 0.0,
    nesterov: bool = False,
) -> Tensor:
    g = g + weight_decay * w
    if "b" in state:
        state["b"] = momentum * state["b"] + (1 - dampening) * g
    else:
        state["b"] = g
    return w - lr * (g + momentum * state["b"] if nesterov else state["b"])


def adam(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: Any,
    beta1: Any = 0.9,
    beta2: Any = 0.999,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    decoupled: bool = False,
    amsgrad: bool = False,
) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    if decoupled:
        w = w - lr * weight_decay * w
    else:
        g = g + weight_decay * w
    state["m"] = beta1 * state.get("m", 0.0) + (1 - beta1) * g
    state["v"] = beta2 * state.get("v", 0.0) + (1 - beta2) * g**2
    v = state["v"]
    if amsgrad:
        v = state["top"] = torch.maximum(state.get("top", torch.zeros_like(v)), v)
    return w - lr * (state["m"] / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)


def rmsprop(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: Any,
    alpha: Any = 0.99,
    eps: Any = 1e-8,
    weight_decay: Any = 0.0,
    momentum: Any = 0.0,
    centered: bool = False,
) -> Tensor:
    g = g + weight_decay * w
    v = state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * g**2
    if centered:
        state["a"] = alpha * state.get("a", 0.0) + (1 - alpha) * g
        v = v - state["a"] ** 2
    state["b"] = momentum * state.get("b", 0.0) + g / (v.sqrt() + eps)
    return w - lr * state["b"]


def adagrad(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: Any,
    lr_decay: Any = 0.0,
    weight_decay: Any = 0.0,
    initial_accumulator_value: Any = 0.0,
    eps: Any = 1e-10,
) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    g = g + weight_decay * w
    state["s"] = state.get("s", initial_accumulator_value) + g**2
    return w - lr / (1 + (t - 1) * lr_decay) * g / (state["s"].sqrt() + eps)


def lion(
    w: Tensor,
    g: Tensor,
    state: dict[str, Any],
    *,
    lr: Any,
    beta1: Any = 0.9,
    beta2: Any = 0.99,
    weight_decay: Any = 0.0,
) -> Tensor:
    m = state.get("m", torch.zeros_like(w))
    state["m"] = beta2 * m + (1 - beta2) * g
    return w - lr * (torch.sign(beta1 * m + (1 - beta1) * g) + weight_decay * w)


def unroll(
    case: Case,
    rule: Callable[..., Tensor],
    values: Callable[[Tree, int], dict[str, Any]],
    steps: int,
    truncation: int | None = None,
) -> tuple[Tree, Tree, Tensor]:
    """Return dF/dh, w_T and F by backpropagation through one graph of all steps.

    `values(hparams, i)` gives the rule's numbers for the i-th tensor.
    """
    hparams = optree.tree_map(lambda t: t.detach().clone().requires_grad_(), case.hparams)
    leaves, spec = optree.tree_flatten(case.params)
    w = [t.detach().clone().requires_grad_() for t in leaves]
    states: list[dict[str, Any]] = [{} for _ in w]
    for t in range(steps):
        if truncation is not None and t == steps - truncation:
            w = [x.detach().requires_grad_() for x in w]
            for state in states:
                state.update({k: v.detach() for k, v in state.items() if isinstance(v, Tensor)})
        tree = optree.tree_unflatten(spec, w)
        batch = case.inner(t) if callable(case.inner) else case.inner
        loss = case.problem.inner_loss(tree, hparams, batch)
        grads = torch.autograd.grad(loss, w, create_graph=True)
        w = [
            rule(x, g, s, **values(hparams, i))
            for i, (x, g, s) in enumerate(zip(w, grads, states, strict=True))
        ]
    value = case.problem.outer_loss(optree.tree_unflatten(spec, w), hparams, case.outer)
    flat, hspec = optree.tree_flatten(hparams)
    found = torch.autograd.grad(value, flat)
    last = optree.tree_unflatten(spec, [x.detach() for x in w])
    return optree.tree_unflatten(hspec, list(found)), last, value.detach()


def vector(tree: Tree) -> Tensor:
    return torch.cat([t.detach().double().reshape(-1) for t in optree.tree_leaves(tree)])


def error(tree: Tree, reference: Tree) -> float:
    """‖tree − reference‖ / ‖reference‖."""
    a, b = vector(tree), vector(reference)
    return float((a - b).norm() / b.norm())


def directional(function: Callable[[Tree], float], at: Tree, along: Tree, step: float) -> float:
    """Central difference of order four along a direction."""

    def value(s: float) -> float:
        moved = optree.tree_map(lambda a, d: (a + s * d).detach().requires_grad_(), at, along)
        return function(moved)

    near, far = value(step) - value(-step), value(2 * step) - value(-2 * step)
    return (8 * near - far) / (12 * step)
