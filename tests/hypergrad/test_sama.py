"""SAMA: the dense formula, and the truncated unroll that it must agree with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor

from hypergrad import (
    SAMA,
    SGD,
    Adam,
    AdamW,
    Hyper,
    Identity,
    Implicit,
    Problem,
    TwoViewLoss,
    Unrolled,
    train,
)
from tests.hypergrad.problems import CASES, SOLVED, _dropout, mlp, module, ridge
from tests.hypergrad.test_implicit import estimate, flat

RULES = {
    "SGD": SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "Adam": Adam(lr=0.05),
    "AMSGrad": Adam(lr=0.05, amsgrad=True, weight_decay=0.1),
    "AdamW": AdamW(lr=0.05),
    "RMSprop": torchopt.rmsprop(lr=0.01),
    "Adagrad": torchopt.adagrad(lr=0.1),
}


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_dense_formula_for_adam() -> None:
    """∂F/∂h − (∂²f/∂w∂h)ᵀ D v with D = du/dg of Adam's third step, all by hand."""
    lr, beta1, beta2, eps = 0.1, 0.9, 0.999, 1e-3
    case = ridge()
    x, y, xv, yv = case.inner["x"], case.inner["y"], case.outer["x"], case.outer["y"]
    w, h = case.params["w"].detach(), case.hparams["log_wd"].detach()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t in (1, 2, 3):
        before = w
        g = x.T @ (x @ w - y) / len(x) + h.exp() * w
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        c1, root = 1 - beta1**t, (v / (1 - beta2**t)).sqrt()
        w = w - lr * m / c1 / (root + eps)
    droot = (1 - beta2) * g / (1 - beta2**3) / root
    adaptation = lr / c1 * ((1 - beta1) / (root + eps) - m * droot / (root + eps) ** 2)
    outer = xv.T @ (xv @ w - yv) / len(xv)
    expected = -h.exp() * before * adaptation * outer
    found = estimate(SAMA(Adam(lr, (beta1, beta2), eps), steps=3), case)
    assert distance(found.grad["log_wd"], expected) < 1e-9
    assert torch.allclose(found.params["w"], w, rtol=1e-12)


@pytest.mark.parametrize("name", SOLVED)
def test_sgd_at_the_minimum_is_t1_t2_times_the_learning_rate(name: str) -> None:
    case, lr = SOLVED[name](), 0.1
    minimum = case.minimize(case.hparams)
    t1_t2 = flat(estimate(Implicit(Identity()), case, minimum).grad)
    sama = flat(estimate(SAMA(SGD(lr), epsilon=1e-3), case, minimum).grad)
    direct = 20 * case.hparams["h"].detach() if name == "direct_outer" else 0.0
    assert distance(sama - direct, lr * (t1_t2 - direct)) < 1e-6


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_is_the_last_unrolled_step(rule: Any) -> None:
    case = mlp()
    unrolled = estimate(Unrolled(rule, steps=4, truncation=1), case)
    errors = [
        distance(flat(estimate(SAMA(rule, 4, epsilon), case).grad), flat(unrolled.grad))
        for epsilon in (1e-2, 1e-3)
    ]
    assert errors[1] < 1e-6
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)  # O(ε²)
    found = estimate(SAMA(rule, 4), case)
    assert torch.equal(flat(found.params), flat(unrolled.params))
    assert torch.equal(found.value, unrolled.value)


@pytest.mark.parametrize("name", ["batch_norm", "tied_and_frozen", "attention"])
def test_modules(name: str) -> None:
    case = CASES[name]()
    unrolled = estimate(Unrolled(Adam(0.05), steps=2, truncation=1), case)
    sama = estimate(SAMA(Adam(0.05), steps=2, epsilon=1e-4), case)
    assert distance(flat(sama.grad), flat(unrolled.grad)) < 1e-8


def test_dropout_masks_are_those_of_the_last_step() -> None:
    """With other masks the difference is noise of size 1/ε."""
    case = module(_dropout, seeded=False)
    found = []
    for method in (SAMA(SGD(0.1), 2, 1e-4), Unrolled(SGD(0.1), 2, truncation=1)):
        torch.manual_seed(3)
        found.append((flat(estimate(method, case).grad), torch.rand(1)))
    assert distance(found[0][0], found[1][0]) < 1e-6
    assert torch.equal(found[0][1], found[1][1])  # the same number of draws


def test_hyperparameters_of_the_optimizer() -> None:
    case = ridge()
    hparams = {
        **case.hparams,
        "lr": torch.tensor(0.05, dtype=torch.float64, requires_grad=True),
        "momentum": torch.tensor(0.8, dtype=torch.float64, requires_grad=True),
    }
    case = replace(case, hparams=hparams)
    rule = SGD(lr=Hyper("lr"), momentum=Hyper("momentum"))
    sama = estimate(SAMA(rule, steps=3), case)
    unrolled = estimate(Unrolled(rule, steps=3, truncation=1), case)
    for key in hparams:
        assert distance(sama.grad[key], unrolled.grad[key]) < 1e-10


def test_continues_with_the_optimizer_state() -> None:
    case, method = mlp(), SAMA(Adam(0.05), steps=2)
    state = method.init(case.problem, case.params, case.hparams)
    arguments = (case.hparams, case.inner, case.outer)
    found, state = method(case.problem, case.params, *arguments, state)
    found, state = method(case.problem, found.params, *arguments, state)
    plain = train(case.problem, case.params, case.hparams, Adam(0.05), case.inner, steps=4)
    assert torch.equal(flat(found.params), flat(plain.params))
    assert state["optimizer"]["step"] == 4


def test_stop_gradients_stay_where_they_are() -> None:
    """Only the view that carries the gradient is moved: h enters f through both."""
    case = mlp()
    plain = case.problem.inner_loss

    def two_views(moving: Any, frozen: Any, hparams: Any, batch: Any) -> Tensor:
        confidence = torch.exp(-frozen["w2"].square().mean() * hparams["weight"].sum())
        return confidence * plain(moving, hparams, batch)

    case = replace(case, problem=Problem(TwoViewLoss(two_views), case.problem.outer_loss))
    sama = estimate(SAMA(SGD(0.2), steps=2, epsilon=1e-4), case)
    unrolled = estimate(Unrolled(SGD(0.2), steps=2, truncation=1), case)
    assert distance(flat(sama.grad), flat(unrolled.grad)) < 1e-7


def test_zero_outer_gradient() -> None:
    case = ridge()
    flat_loss = Problem(case.problem.inner_loss, lambda p, h, b: 0.0 * p["w"].sum())
    found = estimate(SAMA(SGD(0.1)), replace(case, problem=flat_loss))
    assert torch.equal(found.grad["log_wd"], torch.zeros(6, dtype=torch.float64))


def test_float32_difference_is_accurate_at_the_default_epsilon() -> None:
    exact = flat(estimate(Unrolled(Adam(0.05), steps=2, truncation=1), mlp()).grad)
    single = flat(estimate(SAMA(Adam(0.05), steps=2), mlp(torch.float32)).grad)
    assert single.dtype == torch.float32
    assert distance(single.double(), exact) < 1e-3


@pytest.mark.parametrize("epsilon", [0.0, -1.0, float("nan")])
def test_bad_epsilon(epsilon: float) -> None:
    with pytest.raises(ValueError, match=f"SAMA epsilon must be positive, but got {epsilon}"):
        SAMA(SGD(0.1), epsilon=epsilon)
