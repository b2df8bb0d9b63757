"""TorchOpt's optimizers inside our estimators: agreement where they are right, else a refusal."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
import torchopt
from torch import Tensor

from hypergrad import SGD, Adagrad, Adam, AdamW, Forward, RMSprop, TorchOpt, Unrolled, train
from hypergrad.optimizers import as_optimizer
from tests.hypergrad.naive import directional, error, unroll, vector
from tests.hypergrad.problems import CASES, Case


def run(case: Case, estimator: Any) -> Any:
    state = estimator.init(case.problem, case.params, case.hparams)
    found, _ = estimator(case.problem, case.params, case.hparams, case.inner, case.outer, state)
    return found


def meta_gradient(case: Case, transformation: Any, steps: int) -> Any:
    """TorchOpt's own way: one graph over its functional interface."""
    hparams = optree.tree_map(lambda t: t.detach().requires_grad_(), case.hparams)
    params = optree.tree_map(lambda t: t.detach().requires_grad_(), case.params)
    state = transformation.init(params)
    for _ in range(steps):
        leaves, spec = optree.tree_flatten(params)
        loss = case.problem.inner_loss(params, hparams, case.inner)
        grads = optree.tree_unflatten(
            spec, list(torch.autograd.grad(loss, leaves, create_graph=True))
        )
        moves, state = transformation.update(grads, state, params=params, inplace=False)
        params = torchopt.apply_updates(params, moves, inplace=False)
    value = case.problem.outer_loss(params, hparams, case.outer)
    flat, spec = optree.tree_flatten(hparams)
    return optree.tree_unflatten(spec, list(torch.autograd.grad(value, flat)))


TRANSFORMATIONS: dict[str, Any] = {
    "sgd": lambda: torchopt.sgd(0.1, weight_decay=0.01),
    "momentum": lambda: torchopt.sgd(0.1, momentum=0.9),
    "nesterov": lambda: torchopt.sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "maximize": lambda: torchopt.sgd(0.01, maximize=True),
    "adam": lambda: torchopt.adam(0.05, eps=1e-3),
    "adamw": lambda: torchopt.adamw(0.05, eps=1e-3, weight_decay=0.1),
    "rmsprop": lambda: torchopt.rmsprop(0.01, eps=1e-3),
    "centered": lambda: torchopt.rmsprop(0.01, eps=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda: torchopt.adagrad(0.05, eps=1e-3),
    "adadelta": lambda: torchopt.adadelta(1.0, eps=1e-3),
    "schedule": lambda: torchopt.sgd(torchopt.schedule.polynomial_schedule(0.1, 0.01, 1.0, 10)),
    "chain": lambda: torchopt.chain(torchopt.nan_to_num(0.0), torchopt.sgd(0.1, momentum=0.5)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_same_as_torchopt_itself(name: str) -> None:
    case, make = CASES["mlp"](), TRANSFORMATIONS[name]
    expected = meta_gradient(case, make(), 8)
    for memory in ("graph", "replay", "segments"):
        found = run(case, Unrolled(make(), 8, memory=memory))  # type: ignore[arg-type]
        assert error(found.grad, expected) < 1e-10


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_central_differences(name: str) -> None:
    case, rule = CASES["softmax_ridge"](), TRANSFORMATIONS[name]()
    torch.manual_seed(0)
    along = optree.tree_map(torch.randn_like, case.hparams)

    def outer(hparams: Any) -> float:
        w = train(case.problem, case.params, hparams, rule, case.inner, 5).params
        return float(case.problem.outer_loss(w, hparams, case.outer).detach())

    difference = directional(outer, case.hparams, along, step=2e-5)
    for estimator in (Unrolled(rule, 5), Forward(rule, 5)):
        found = float(vector(run(case, estimator).grad) @ vector(along))
        # TorchOpt's Adam rounds its bias correction to float32, the same in both.
        assert found == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs", "tolerance"),
    [
        (SGD(0.1, weight_decay=0.1), torchopt.sgd(0.1, weight_decay=0.1), 1e-10),
        (SGD(0.1, 0.9), torchopt.sgd(0.1, momentum=0.9), 1e-10),
        (SGD(0.1, 0.9, nesterov=True), torchopt.sgd(0.1, momentum=0.9, nesterov=True), 1e-10),
        (
            RMSprop(0.01, 0.9, 1e-3, 0.1, 0.8, centered=True),
            torchopt.rmsprop(0.01, 0.9, 1e-3, 0.1, 0.8, centered=True),
            1e-10,
        ),
        (Adagrad(0.1, 0.0, 0.1, 0.3), torchopt.adagrad(0.1, 0.0, 0.1, 0.3), 1e-10),
        (Adagrad(0.1, 0.2, 0.1, 0.3), torchopt.adagrad(0.1, 0.2, 0.1, 0.3), 1e-7),
        (Adam(0.05, eps=1e-3), torchopt.adam(0.05, eps=1e-3), 1e-4),
        (
            AdamW(0.05, eps=1e-3, weight_decay=0.1),
            torchopt.adamw(0.05, eps=1e-3, weight_decay=0.1),
            1e-4,
        ),
    ],
)
def test_our_rules_agree(ours: Any, theirs: Any, tolerance: float) -> None:
    case = CASES["mlp"]()
    a, b = run(case, Unrolled(ours, 10)), run(case, Unrolled(theirs, 10))
    assert error(b.grad, a.grad) < tolerance


def radam(w: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = 0.8 * state.get("m", 0.0) + 0.2 * g
    state["v"] = 0.9 * state.get("v", 0.0) + 0.1 * g**2
    largest, c2 = 2 / 0.1 - 1, 1 - 0.9**t
    rho = largest - 2 * t * 0.9**t / c2
    move = state["m"] / (1 - 0.8**t)
    if rho > 5:
        r = (rho - 4) * (rho - 2) * largest / ((largest - 4) * (largest - 2) * rho)
        move = move * (r * c2) ** 0.5 / (state["v"].sqrt() + 1e-3)
    return w - 0.05 * move


def adamax(w: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    t = state["t"] = state.get("t", 0) + 1
    state["m"] = 0.8 * state.get("m", 0.0) + 0.2 * g
    state["u"] = torch.maximum(0.9 * state.get("u", torch.zeros_like(g)), g.abs() + 1e-3)
    return w - 0.05 / (1 - 0.8**t) * state["m"] / state["u"]


def adadelta(w: Tensor, g: Tensor, state: dict[str, Any]) -> Tensor:
    state["v"] = 0.9 * state.get("v", 0.0) + 0.1 * g**2
    moved = torch.as_tensor(state.get("d", 0.0), dtype=g.dtype)
    delta = ((moved + 1e-3) / (state["v"] + 1e-3)).sqrt() * g
    state["d"] = 0.9 * moved + 0.1 * delta**2
    return w - delta


BEYOND_OURS: dict[str, tuple[Any, Any, Any]] = {
    "radam": (
        torchopt.radam(0.05, (0.8, 0.9), 1e-3),
        radam,
        lambda p: torch.optim.RAdam(p, 0.05, (0.8, 0.9), 1e-3),
    ),
    "adamax": (
        torchopt.adamax(0.05, (0.8, 0.9), 1e-3),
        adamax,
        lambda p: torch.optim.Adamax(p, 0.05, (0.8, 0.9), 1e-3),
    ),
    "adadelta": (
        torchopt.adadelta(1.0, 0.9, 1e-3),
        adadelta,
        lambda p: torch.optim.Adadelta(p, 1.0, 0.9, 1e-3),
    ),
}


@pytest.mark.parametrize("name", BEYOND_OURS)
def test_optimizers_that_we_do_not_have_ourselves(name: str) -> None:
    """Numbers of torch.optim, hypergradients of a textbook unroll."""
    transformation, textbook, make = BEYOND_OURS[name]
    rule, start = as_optimizer(transformation), torch.randn(7, dtype=torch.float64)
    theirs = start.clone().requires_grad_()
    optimizer, flat, state = make([theirs]), start, rule.init(start)
    for _ in range(12):
        theirs.grad = torch.randn(7, dtype=torch.float64)
        optimizer.step()
        flat, state = rule.update(flat, theirs.grad, state, {})
        torch.testing.assert_close(flat, theirs.detach(), rtol=1e-12, atol=1e-12)

    case = CASES["mlp"]()
    expected, _, _ = unroll(case, textbook, lambda h, i: {}, steps=8)
    assert error(run(case, Unrolled(transformation, 8)).grad, expected) < 1e-11


def test_momentum_is_a_pure_function_of_its_state() -> None:
    """TorchOpt's first call ignores the buffer it is given: a resumed run must not see that."""
    w = torch.zeros(3)
    buffer = {"0": torch.ones(3)}
    fresh = as_optimizer(torchopt.sgd(1.0, momentum=0.5))
    out, after = fresh.update(w, torch.ones(3), buffer, {})
    again, _ = fresh.update(w, torch.ones(3), buffer, {})
    assert torch.equal(out, torch.full((3,), -1.5))
    assert torch.equal(out, again)
    assert torch.equal(after["0"], torch.full((3,), 1.5))


def test_state_is_numbered_leaves() -> None:
    state = as_optimizer(torchopt.adam(0.1, moment_requires_grad=True)).init(torch.ones(4))
    assert list(state) == ["0", "1", "2"]
    assert not any(isinstance(v, Tensor) and v.requires_grad for v in state.values())


def refused() -> dict[str, tuple[Any, str]]:
    lr = torch.tensor(0.1, requires_grad=True)
    return {
        "accelerated": (torchopt.adam(0.1, use_accelerated_op=True), "leaves out eps"),
        "accelerated chain": (
            torchopt.chain(torchopt.nan_to_num(0.0), torchopt.adamw(0.1, use_accelerated_op=True)),
            "leaves out eps",
        ),
        "dampening": (torchopt.sgd(0.1, momentum=0.9, dampening=0.1), "use hypergrad.SGD"),
        "clip": (
            torchopt.chain(torchopt.clip.clip_grad_norm(1.0), torchopt.sgd(0.1)),
            "computed without a derivative",
        ),
        "mask": (torchopt.adamw(0.1, mask=lambda p: True), "its mask is a tree"),
        "tensor": (torchopt.sgd(lr, momentum=0.9), r"put it in hparams and use a Hyper"),
    }


@pytest.mark.parametrize("name", refused())
def test_what_is_wrong_in_torchopt_is_refused(name: str) -> None:
    transformation, reason = refused()[name]
    with pytest.raises(ValueError, match=f"cannot be differentiated: .*{reason}"):
        Unrolled(transformation, 3)


def test_accelerated_adam_is_wrong() -> None:
    """Why it is refused: off by percents from the plain operator, which is right."""
    case = CASES["mlp"]()
    right = meta_gradient(case, torchopt.adam(0.05, eps=1e-2), 5)
    wrong = meta_gradient(case, torchopt.adam(0.05, eps=1e-2, use_accelerated_op=True), 5)
    assert error(run(case, Unrolled(Adam(0.05, eps=1e-2), 5)).grad, right) < 1e-4
    assert error(wrong, right) > 1e-2


def test_stateful_wrappers_are_no_transformation() -> None:
    net = torch.nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"TorchOpt transformation .* but got MetaSGD"):
        Unrolled(torchopt.MetaSGD(net, lr=0.1), 3)  # type: ignore[arg-type]
    assert isinstance(Unrolled(torchopt.sgd(0.1), 3).optimizer, TorchOpt)  # type: ignore[arg-type]
