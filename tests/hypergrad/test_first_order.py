"""What every method without Hessian-vector products promises, each on the same problems."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from hypergrad import (
    BOME,
    F2SA,
    PBGD,
    PZOBO,
    SAMA,
    SGD,
    Adam,
    Estimator,
    Hyper,
    Hypergradient,
    Problem,
    Status,
    TwoViewLoss,
    Unrolled,
    train,
)
from tests.hypergrad.problems import CASES, Case, _dropout, mlp, module, ridge
from tests.hypergrad.test_implicit import estimate, flat

RULE = Adam(lr=0.05)
METHODS: dict[str, Estimator[Any]] = {
    "SAMA": SAMA(RULE, steps=2),
    "PZOBO": PZOBO(RULE, steps=2, directions=3),
    "F2SA": F2SA(RULE, steps=2),
    "BOME": BOME(RULE, steps=2),
    "PBGD": PBGD(RULE, steps=2),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


class FirstOrder(torch.autograd.Function):
    """The identity, which counts gradients and has no second derivative."""

    gradients = 0

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, bar: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("this loss was differentiated twice")
        FirstOrder.gradients += 1
        return bar


def first_order(case: Case) -> Case:
    inner, outer = case.problem.inner_loss, case.problem.outer_loss
    return replace(
        case,
        problem=Problem(
            lambda *arguments: FirstOrder.apply(inner(*arguments)),
            lambda *arguments: FirstOrder.apply(outer(*arguments)),
        ),
    )


def calls(method: Estimator[Any], case: Case, count: int, store: bool = False) -> Hypergradient:
    """The result of the last of some calls in a row, optionally through torch.save each time."""
    params, state = case.params, method.init(case.problem, case.params, case.hparams)
    for _ in range(count):
        if store:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        found, state = method(case.problem, params, case.hparams, case.inner, case.outer, state)
        params = found.params
    return found


@every_method
def test_no_second_derivative_and_honest_counters(method: Estimator[Any]) -> None:
    case = first_order(mlp())
    FirstOrder.gradients = 0
    found = estimate(method, case)
    assert (found.n_hvp, found.n_grad) == (0, FirstOrder.gradients)
    assert found.status is Status.APPROXIMATE
    assert method.steps == 2
    plain = estimate(method, mlp())
    assert torch.equal(flat(found.grad), flat(plain.grad))


def test_the_instrument_refuses_second_derivatives() -> None:
    with pytest.raises(RuntimeError, match="differentiated twice"):
        estimate(Unrolled(RULE, steps=1), first_order(mlp()))


@every_method
def test_value_belongs_to_params(method: Estimator[Any]) -> None:
    case = mlp()
    found = estimate(method, case)
    value = case.problem.outer_loss(found.params, case.hparams, case.outer)
    assert found.value.item() == value.item()
    assert all(leaf.requires_grad and leaf.is_leaf for leaf in optree.tree_leaves(found.params))


@every_method
@pytest.mark.parametrize("name", ["batch_norm", "dropout", "tied_and_frozen", "attention"])
def test_arguments_stay_untouched(method: Estimator[Any], name: str) -> None:
    case = CASES[name]()
    state = method.init(case.problem, case.params, case.hparams)
    _, state = method(case.problem, case.params, case.hparams, case.inner, case.outer, state)
    seen = [
        *case.problem.module.buffers(),
        *optree.tree_leaves((case.params, case.hparams, state)),
    ]
    before = [t.detach().clone() if isinstance(t, Tensor) else t for t in seen]
    method(case.problem, case.params, case.hparams, case.inner, case.outer, state)
    for after, kept in zip(seen, before, strict=True):
        assert torch.equal(after, kept) if isinstance(after, Tensor) else after == kept
    assert all(t.grad is None for t in optree.tree_leaves((case.params, case.hparams)))


@every_method
def test_stored_state_continues_bit_for_bit(method: Estimator[Any]) -> None:
    straight, stored = calls(method, mlp(), 3), calls(method, mlp(), 3, store=True)
    assert torch.equal(flat(straight.grad), flat(stored.grad))
    assert torch.equal(flat(straight.params), flat(stored.params))
    assert not torch.equal(flat(straight.grad), flat(calls(method, mlp(), 2).grad))


@every_method
def test_draws_are_reproducible_and_differ_between_calls(method: Estimator[Any]) -> None:
    case = module(_dropout, seeded=False)

    def run(seed: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(seed)
        return flat(estimate(method, case).grad), torch.rand(1)

    first, second, other = run(0), run(0), run(1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


@every_method
def test_another_batch_at_each_step(method: Estimator[Any]) -> None:
    case = mlp()
    halves = [{k: v.clone() for k, v in case.inner.items()} for _ in range(2)]
    halves[1]["x"] = halves[1]["x"] * 2
    constant = estimate(method, replace(case, inner=lambda t: case.inner))
    assert torch.equal(flat(constant.grad), flat(estimate(method, case).grad))
    changing = estimate(method, replace(case, inner=halves.__getitem__))
    assert not torch.equal(flat(changing.grad), flat(constant.grad))


@pytest.mark.parametrize("name", ["SAMA", "PZOBO", "F2SA"])
def test_the_weights_train_plainly(name: str) -> None:
    case = mlp()
    plain = train(case.problem, case.params, case.hparams, RULE, case.inner, steps=2)
    assert torch.equal(flat(estimate(METHODS[name], case).params), flat(plain.params))


@every_method
def test_a_hyperparameter_that_enters_nothing(method: Estimator[Any]) -> None:
    case = ridge()
    idle = {**case.hparams, "idle": torch.zeros(2, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match=r"hparams\['idle'\] enters neither"):
        estimate(method, replace(case, hparams=idle))


@every_method
def test_a_hyperparameter_of_the_outer_loss_alone(method: Estimator[Any]) -> None:
    case = ridge()
    outer = case.problem.outer_loss
    problem = Problem(
        case.problem.inner_loss, lambda p, h, b: outer(p, h, b) + 3 * h["direct"].sum()
    )
    direct = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    found = estimate(
        method, replace(case, problem=problem, hparams={**case.hparams, "direct": direct})
    )
    assert torch.equal(found.grad["direct"], torch.full((2,), 3.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["F2SA", "BOME", "PBGD"])
def test_a_learning_rate_needs_the_path(name: str) -> None:
    case = ridge()
    hparams = {**case.hparams, "lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)}
    method = replace(METHODS[name], optimizer=SGD(lr=Hyper("lr")))
    with pytest.raises(ValueError, match=r"hparams\['lr'\] .* needs Unrolled"):
        estimate(method, replace(case, hparams=hparams))


@pytest.mark.parametrize("name", ["F2SA", "BOME", "PBGD"])
def test_a_loss_with_stop_gradients_has_no_value_function(name: str) -> None:
    case = mlp()
    inner = case.problem.inner_loss
    two_views = TwoViewLoss(lambda p, q, h, b: inner(p, h, b))
    with pytest.raises(ValueError, match=f"{name} compares values .* TwoViewLoss"):
        estimate(METHODS[name], replace(case, problem=Problem(two_views, inner)))


@pytest.mark.parametrize("name", ["SAMA", "PZOBO"])
def test_narrow_params_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} takes differences .* torch.bfloat16 \(params"):
        estimate(METHODS[name], mlp(torch.bfloat16))


@pytest.mark.parametrize("name", ["F2SA", "BOME", "PBGD"])
def test_narrow_params_give_float32_hypergradients(name: str) -> None:
    grads = optree.tree_leaves(estimate(METHODS[name], mlp(torch.bfloat16)).grad)
    assert {g.dtype for g in grads} == {torch.float32}


@every_method
def test_bad_settings(method: Estimator[Any]) -> None:
    name = type(method).__name__
    with pytest.raises(ValueError, match=f"{name} steps must be an integer of at least 1.* 0"):
        replace(method, steps=0)
    with pytest.raises(ValueError, match=f"{name} has optimizer=None"):
        estimate(replace(method, optimizer=None), mlp())
    with pytest.raises(TypeError, match="optimizer must be"):
        replace(method, optimizer="adam")


@every_method
def test_bad_losses(method: Estimator[Any]) -> None:
    case = mlp()
    loss = case.problem.inner_loss
    blind = replace(case, problem=Problem(loss, lambda p, h, b: h["weight"].sum()))
    with pytest.raises(ValueError, match="outer_loss depends on none of the parameters"):
        estimate(method, blind)
    broken = replace(case, problem=Problem(lambda *a: loss(*a) * torch.nan, loss))
    with pytest.raises(FloatingPointError, match="inner_loss is nan"):
        estimate(method, broken)
