"""Forward mode: the same derivative as Unrolled, by tangents."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
import torchopt
from torch import Tensor

from hypergrad import SGD, Adam, AdamW, Forward, Hyper, Status, Unrolled, train
from tests.hypergrad.naive import directional, error, vector, with_optimizer_hparams
from tests.hypergrad.problems import CASES, Case


def run(case: Case, estimator: Any) -> Any:
    state = estimator.init(case.problem, case.params, case.hparams)
    return estimator(case.problem, case.params, case.hparams, case.inner, case.outer, state)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


RULES: dict[str, tuple[Any, dict[str, float]]] = {
    "sgd": (SGD(0.1), {}),
    "momentum": (SGD(Hyper("lr"), Hyper("momentum")), {"lr": 0.1, "momentum": 0.8}),
    "dampening": (
        SGD(0.1, 0.8, Hyper("dampening"), Hyper("wd")),
        {"dampening": 0.3, "wd": 0.1},
    ),
    "nesterov": (SGD(0.1, Hyper("momentum"), nesterov=True), {"momentum": 0.8}),
    "adam": (
        Adam(Hyper("lr"), (Hyper("b1"), Hyper("b2")), Hyper("eps"), Hyper("wd")),
        {"lr": 0.05, "b1": 0.8, "b2": 0.95, "eps": 1e-2, "wd": 0.1},
    ),
    "amsgrad": (Adam(Hyper("lr"), eps=1e-2, amsgrad=True), {"lr": 0.05}),
    "adamw": (AdamW(Hyper("lr"), eps=1e-2, weight_decay=Hyper("wd")), {"lr": 0.05, "wd": 0.1}),
    "torchopt": (torchopt.rmsprop(0.01, eps=1e-2), {}),
}


@pytest.mark.parametrize("problem", ["ridge", "softmax_ridge", "direct_outer"])
@pytest.mark.parametrize("name", RULES)
def test_agrees_with_reverse_mode(name: str, problem: str) -> None:
    rule, numbers = RULES[name]
    tuned = {k: scalar(v) for k, v in numbers.items()}
    case = with_optimizer_hparams(CASES[problem](), **tuned)
    (forward, a), (reverse, b) = run(case, Forward(rule, 9)), run(case, Unrolled(rule, 9))
    assert error(forward.grad, reverse.grad) < 1e-10
    for key in numbers:
        assert error(forward.grad[key], reverse.grad[key]) < 1e-10
    assert torch.equal(vector(forward.params), vector(reverse.params))
    assert torch.equal(forward.value, reverse.value)
    assert optree.tree_structure(a["optimizer"]) == optree.tree_structure(b["optimizer"])
    assert forward.status is Status.EXACT
    assert forward.n_hvp == 9 * vector(case.hparams).numel()


@pytest.mark.parametrize("problem", ["batch_norm", "attention", "tied_and_frozen", "dropout"])
def test_modules(problem: str) -> None:
    base = CASES[problem]()
    case = with_optimizer_hparams(base, lr=scalar(0.1), momentum=scalar(0.5))
    shared = scalar(-3.0)
    tied = Case(
        type(case.problem)(
            lambda w, h, b: base.problem.inner_loss(w, dict.fromkeys(base.hparams, h["wd"]), b),
            base.problem.outer_loss,
        ),
        case.params,
        {"wd": shared, "lr": case.hparams["lr"], "momentum": case.hparams["momentum"]},
        case.inner,
        case.outer,
    )
    rule = SGD(Hyper("lr"), Hyper("momentum"))
    (forward, _), (reverse, _) = run(tied, Forward(rule, 6)), run(tied, Unrolled(rule, 6))
    assert error(forward.grad, reverse.grad) < 1e-10


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "adamw"])
def test_central_differences(name: str) -> None:
    rule, numbers = RULES[name]
    case = with_optimizer_hparams(CASES["ridge"](), **{k: scalar(v) for k, v in numbers.items()})
    grad = run(case, Forward(rule, 6))[0].grad

    def outer(hparams: Any) -> float:
        w = train(case.problem, case.params, hparams, rule, case.inner, 6).params
        return float(case.problem.outer_loss(w, hparams, case.outer).detach())

    zero = optree.tree_map(torch.zeros_like, case.hparams)
    for key in numbers:
        along = {**zero, key: torch.ones((), dtype=torch.float64)}
        difference = directional(outer, case.hparams, along, step=1e-4 * numbers[key])
        assert grad[key].item() == pytest.approx(difference, rel=1e-6)


def test_memory_does_not_grow_with_the_steps() -> None:
    """No graph of an earlier step stays alive."""
    case = CASES["ridge"]()
    alive: list[int] = []
    count = 0

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            ctx.guard = Guard()
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    class Guard:
        def __del__(self) -> None:
            nonlocal count
            count -= 1

    def inner(w: Any, h: Any, b: Any) -> Tensor:
        alive.append(count)
        return case.problem.inner_loss({"w": Probe.apply(w["w"])}, h, b)

    probed = Case(
        type(case.problem)(inner, case.problem.outer_loss),
        case.params,
        case.hparams,
        case.inner,
        case.outer,
    )
    run(probed, Forward(SGD(0.1), 8))
    assert max(alive) <= 1
    alive.clear()
    run(probed, Unrolled(SGD(0.1), 8))
    assert max(alive) == 7
    alive.clear()
    run(probed, Unrolled(SGD(0.1), 8, memory="replay"))
    assert max(alive) <= 1
