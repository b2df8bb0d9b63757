"""Unrolled against textbook autograd, central differences and itself in other memory modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from hypergrad import SGD, Adam, AdamW, Forward, Hyper, Optimizer, Status, Unrolled, train
from tests.hypergrad.naive import (
    adam,
    directional,
    error,
    sgd,
    unroll,
    vector,
    with_optimizer_hparams,
)
from tests.hypergrad.problems import CASES, Case, trained

MODES = ["graph", "replay", "segments"]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def run(case: Case, estimator: Any) -> Any:
    state = estimator.init(case.problem, case.params, case.hparams)
    hypergradient, _ = estimator(
        case.problem, case.params, case.hparams, case.inner, case.outer, state
    )
    return hypergradient


def like_params(case: Case, value: float) -> Any:
    """One entry per element of params, all different."""
    return optree.tree_map(
        lambda t: value * (1 + torch.rand(t.shape, dtype=t.dtype)).requires_grad_(), case.params
    )


# name -> (our rule with every number tuned, its numbers, textbook rule, its values by tensor)
SCALARS: dict[str, tuple[Optimizer, dict[str, float], Callable[..., Tensor], dict[str, Any]]] = {
    "sgd": (SGD(Hyper("lr"), weight_decay=Hyper("wd")), {"lr": 0.1, "wd": 0.05}, sgd, {}),
    "momentum": (
        SGD(Hyper("lr"), Hyper("momentum"), Hyper("dampening"), Hyper("wd")),
        {"lr": 0.1, "momentum": 0.8, "dampening": 0.2, "wd": 0.05},
        sgd,
        {},
    ),
    "nesterov": (
        SGD(Hyper("lr"), Hyper("momentum"), weight_decay=Hyper("wd"), nesterov=True),
        {"lr": 0.1, "momentum": 0.8, "wd": 0.05},
        sgd,
        {"nesterov": True},
    ),
    "adam": (
        Adam(Hyper("lr"), (Hyper("beta1"), Hyper("beta2")), Hyper("eps"), Hyper("wd")),
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "wd": 0.05},
        adam,
        {},
    ),
    "amsgrad": (
        Adam(Hyper("lr"), (Hyper("beta1"), Hyper("beta2")), Hyper("eps"), amsgrad=True),
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2},
        adam,
        {"amsgrad": True},
    ),
    "adamw": (
        AdamW(Hyper("lr"), (Hyper("beta1"), Hyper("beta2")), Hyper("eps"), Hyper("wd")),
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "wd": 0.05},
        adam,
        {"decoupled": True},
    ),
}
RENAME = {"wd": "weight_decay"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SCALARS)
def test_every_number_against_a_textbook_unroll(name: str, mode: Any) -> None:
    rule, numbers, textbook, options = SCALARS[name]
    case = with_optimizer_hparams(CASES["mlp"](), **{k: scalar(v) for k, v in numbers.items()})
    expected, last, value = unroll(
        case,
        textbook,
        lambda h, i: {RENAME.get(k, k): h[k] for k in numbers} | options,
        steps=11,
    )
    found = run(case, Unrolled(rule, 11, memory=mode))
    assert error(found.grad, expected) < 1e-12
    for key in numbers:
        assert error(found.grad[key], expected[key]) < 1e-10
    assert error(found.params, last) < 1e-14
    assert found.value.item() == pytest.approx(value.item(), rel=1e-13)
    assert found.status is Status.EXACT
    assert found.n_hvp == 11


@pytest.mark.parametrize("name", SCALARS)
def test_every_number_against_central_differences(name: str) -> None:
    rule, numbers, _, _ = SCALARS[name]
    case = with_optimizer_hparams(CASES["mlp"](), **{k: scalar(v) for k, v in numbers.items()})
    grad = run(case, Unrolled(rule, 7)).grad

    def outer(hparams: Any) -> float:
        w = train(case.problem, case.params, hparams, rule, case.inner, 7).params
        return float(case.problem.outer_loss(w, hparams, case.outer).detach())

    zero = optree.tree_map(torch.zeros_like, case.hparams)
    for key in numbers:
        along = {**zero, key: torch.ones((), dtype=torch.float64)}
        difference = directional(outer, case.hparams, along, step=3e-5 * numbers[key])
        assert grad[key].item() == pytest.approx(difference, rel=1e-6)
    torch.manual_seed(0)
    along = {**zero, "loss": optree.tree_map(torch.randn_like, case.hparams["loss"])}
    difference = directional(outer, case.hparams, along, step=1e-3)
    assert float(vector(grad) @ vector(along)) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("rule", [SGD(0.1, 0.8), Adam(0.05, eps=1e-2)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_problem_against_central_differences(name: str, rule: Optimizer) -> None:
    case = CASES[name]()
    found = run(case, Unrolled(rule, 6))

    def outer(hparams: Any) -> float:
        w = train(case.problem, case.params, hparams, rule, case.inner, 6).params
        return float(case.problem.outer_loss(w, hparams, case.outer).detach())

    torch.manual_seed(1)
    along = optree.tree_map(torch.randn_like, case.hparams)
    difference = directional(outer, case.hparams, along, step=1e-3)
    assert float(vector(found.grad) @ vector(along)) == pytest.approx(difference, rel=1e-6)
    assert outer(case.hparams) == found.value.item()


@pytest.mark.parametrize(
    ("rule", "textbook", "key"),
    [
        (SGD(Hyper("x"), 0.8), sgd, "lr"),
        (SGD(0.1, Hyper("x")), sgd, "momentum"),
        (SGD(0.1, 0.8, weight_decay=Hyper("x")), sgd, "weight_decay"),
        (Adam(0.05, (Hyper("x"), 0.9), 1e-2), adam, "beta1"),
        (Adam(0.05, (0.9, Hyper("x")), 1e-2), adam, "beta2"),
        (Adam(0.05, (0.9, 0.99), Hyper("x")), adam, "eps"),
        (Adam(0.05, (0.9, 0.99), 1e-2, Hyper("x")), adam, "weight_decay"),
    ],
)
@pytest.mark.parametrize("shape", ["per tensor", "per element"])
def test_numbers_of_every_shape(rule: Optimizer, textbook: Any, key: str, shape: str) -> None:
    defaults = {
        sgd: {"lr": 0.1, "momentum": 0.8},
        adam: {"lr": 0.05, "beta1": 0.9, "beta2": 0.9 if key == "beta1" else 0.99, "eps": 1e-2},
    }[textbook]
    torch.manual_seed(0)
    case = CASES["mlp"]()
    names = sorted(case.params)
    x: Any = like_params(case, 0.3) if shape == "per element" else 0.3 + 0.1 * torch.arange(4.0)
    case = with_optimizer_hparams(case, x=trained(optree.tree_map(torch.Tensor.double, x)))

    def values(hparams: Any, i: int) -> dict[str, Any]:
        own = hparams["x"][names[i]] if shape == "per element" else hparams["x"][i]
        return {**defaults, key: own}

    expected, _, _ = unroll(case, textbook, values, steps=5)
    found = run(case, Unrolled(rule, 5))
    assert error(found.grad["x"], expected["x"]) < 1e-12


@pytest.mark.parametrize("rule", [SGD(0.1, 0.8), Adam(0.05, eps=1e-2), AdamW(0.05, eps=1e-2)])
def test_memory_modes_agree_bit_for_bit(rule: Optimizer) -> None:
    case = CASES["mlp"]()
    graph, *others = (run(case, Unrolled(rule, 10, memory=m)) for m in MODES)  # type: ignore[arg-type]
    for other in others:
        assert torch.equal(vector(other.grad), vector(graph.grad))
        assert torch.equal(vector(other.params), vector(graph.params))
    assert (graph.n_grad, others[0].n_grad, others[1].n_grad) == (11, 20, 20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("truncation", [1, 3, 9])
def test_truncation_cuts_params_and_optimizer_state(truncation: int, mode: Any) -> None:
    case = CASES["mlp"]()
    expected, _, _ = unroll(
        case, sgd, lambda h, i: {"lr": 0.1, "momentum": 0.8}, steps=9, truncation=truncation
    )
    found = run(case, Unrolled(SGD(0.1, 0.8), 9, truncation=truncation, memory=mode))
    assert error(found.grad, expected) < 1e-12
    assert found.n_hvp == truncation
    assert found.status is (Status.EXACT if truncation == 9 else Status.APPROXIMATE)


def test_a_new_batch_for_each_step() -> None:
    case = CASES["mlp"]()
    x, y = case.inner["x"], case.inner["y"]
    batches = [{"x": x.roll(t, 1), "y": y.roll(t)} for t in range(5)]
    case = Case(case.problem, case.params, case.hparams, batches.__getitem__, case.outer)
    expected, _, _ = unroll(case, sgd, lambda h, i: {"lr": 0.1}, steps=5)
    for mode in MODES:
        found = run(case, Unrolled(SGD(0.1), 5, memory=mode))  # type: ignore[arg-type]
        assert error(found.grad, expected) < 1e-12


def test_the_state_continues_training() -> None:
    """Two calls of 4 steps are 8 steps of training; `init` forgets the momentum."""
    case, rule = CASES["mlp"](), Adam(0.05)
    for estimator in (Unrolled(rule, 4), Forward(rule, 4)):
        if isinstance(estimator, Forward):
            case = CASES["ridge"]()
        arguments = (case.problem, case.hparams, case.inner, case.outer)
        problem, hparams, inner, outer = arguments
        state = estimator.init(problem, case.params, hparams)
        first, middle = estimator(problem, case.params, hparams, inner, outer, state)
        second, end = estimator(problem, first.params, hparams, inner, outer, middle)
        whole = train(problem, case.params, hparams, rule, inner, 8)
        assert torch.equal(vector(second.params), vector(whole.params))
        assert end["optimizer"] is not None
        assert end["optimizer"]["step"] == 8
        fresh, _ = estimator(problem, first.params, hparams, inner, outer, state)
        assert not torch.equal(vector(fresh.params), vector(second.params))


def test_entries_without_gradient_under_adam() -> None:
    """A dead ReLU unit: √v has derivative 0 at v = 0 and the hypergradient stays finite."""
    case = CASES["ridge"]()
    x = case.inner["x"].clone()
    x[:, 2] = 0.0

    def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
        return ((batch @ params["w"]).pow(2).mean() - params["w"][0]) * hparams["scale"]

    problem = Case(
        type(case.problem)(inner, lambda w, h, b: (w["w"] - 1).pow(2).sum()),
        case.params,
        {"scale": scalar(1.3), "lr": scalar(0.05)},
        x,
        None,
    )
    rule = Adam(Hyper("lr"), eps=1e-3)
    expected, _, _ = unroll(
        Case(problem.problem, problem.params, problem.hparams, x, None),
        lambda w, g, s, **v: adam(w, g + 1e-30, s, **v),  # keeps the textbook away from v = 0
        lambda h, i: {"lr": h["lr"], "eps": 1e-3},
        steps=6,
    )
    for estimator in (Unrolled(rule, 6), Forward(rule, 6)):
        found = run(problem, estimator)
        assert torch.isfinite(vector(found.grad)).all()
        assert error(found.grad, expected) < 1e-9
