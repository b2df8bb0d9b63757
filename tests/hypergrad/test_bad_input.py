"""Bad problems are refused at once, by name, by every estimator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import (
    SGD,
    FiniteDifference,
    Hyper,
    Implicit,
    Problem,
    Unrolled,
    module_problem,
)

ESTIMATORS = [Implicit(), FiniteDifference(), Unrolled(SGD(lr=0.1), 2)]
pytestmark = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)


def leaf(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64, requires_grad=True)


def inner(params: Any, hparams: Any, batch: Any) -> Tensor:
    return (params["w"] - 2).square().sum() + (hparams["wd"].exp() * params["w"].square()).sum()


def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
    return params["w"].square().sum()


def run(
    estimator: Any,
    inner_loss: Any = inner,
    outer_loss: Any = outer,
    params: Any = None,
    hparams: Any = None,
) -> Any:
    problem = Problem(inner_loss, outer_loss)
    params = {"w": leaf(3)} if params is None else params
    hparams = {"wd": leaf(3)} if hparams is None else hparams
    return estimator(problem, params, hparams, None, None, estimator.init(problem, params, hparams))


def test_the_problem_itself_is_fine(estimator: Any) -> None:
    assert run(estimator)[0].status.ok


def test_unused_hyperparameter_is_named(estimator: Any) -> None:
    with pytest.raises(ValueError, match=r"hparams\['unused'\]"):
        run(estimator, hparams={"wd": leaf(3), "unused": leaf(2)})


def test_unused_in_inner_but_in_outer_is_fine(estimator: Any) -> None:
    found, _ = run(
        estimator,
        outer_loss=lambda p, h, b: outer(p, h, b) + (h["direct"] ** 2).sum(),
        hparams={"wd": leaf(3), "direct": leaf(2)},
    )
    assert torch.equal(found.grad["direct"], 2 * torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("which", ["inner_loss", "outer_loss"])
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p, h, b: p["w"] * h["wd"], TypeError, r"shape \(3,\)"),
        (lambda p, h, b: 3.0, TypeError, "got float"),
        (lambda p, h, b: (p["w"] * h["wd"]).sum() * torch.nan, FloatingPointError, "is nan"),
        (lambda p, h, b: (p["w"] * h["wd"]).sum() / 0, FloatingPointError, "is inf"),
    ],
)
def test_bad_loss_values(
    estimator: Any, which: str, loss: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"{which}.*{message}"):
        run(estimator, **{which: loss})


def test_losses_cut_off_from_the_parameters(estimator: Any) -> None:
    with pytest.raises(ValueError, match="inner_loss depends on none of the parameters"):
        run(estimator, inner_loss=lambda p, h, b: h["wd"].sum())
    with pytest.raises(ValueError, match="outer_loss depends on none of the parameters"):
        run(estimator, outer_loss=lambda p, h, b: p["w"].detach().sum())


def test_nothing_to_train(estimator: Any) -> None:
    with pytest.raises(ValueError, match="params: no tensor requires grad"):
        run(estimator, params={"w": torch.ones(3, dtype=torch.float64)})


@pytest.mark.parametrize(
    ("hparams", "error", "message"),
    [
        ({"wd": torch.ones(3)}, ValueError, r"hparams\['wd'\] does not require grad"),
        ({"wd": torch.ones(3, dtype=torch.int64)}, TypeError, "dtype torch.int64"),
        ({"wd": 0.1}, TypeError, r"hparams\['wd'\] must be a tensor, but got float"),
        ({}, ValueError, "at least one tensor"),
    ],
)
def test_bad_hparams(estimator: Any, hparams: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run(estimator, hparams=hparams)


def test_params_that_are_no_tensors(estimator: Any) -> None:
    with pytest.raises(TypeError, match=r"params\['w'\] must be a tensor, but got list|float"):
        run(estimator, params={"w": 1.0})


def test_infinite_derivative_of_a_finite_loss_is_named(estimator: Any) -> None:
    with pytest.raises(FloatingPointError, match="'w'"):
        run(estimator, outer_loss=lambda p, h, b: (p["w"] - p["w"].detach()).sqrt().sum())


def test_params_of_another_module_are_refused(estimator: Any) -> None:
    net = torch.nn.Linear(3, 1).double()
    x = torch.ones(2, 3, dtype=torch.float64)
    problem, params = module_problem(
        net,
        lambda m, h, b: m(x).square().sum() + h["wd"].exp().sum() * m.weight.square().sum(),
        lambda m, h, b: m(x).square().sum(),
    )
    params = {**params, "weight": leaf(1, 4)}
    hparams = {"wd": leaf(3)}
    with pytest.raises((RuntimeError, ValueError), match=r"shape|size"):
        estimator(problem, params, hparams, None, None, estimator.init(problem, params, hparams))


def test_optimizer_hyperparameter_needs_a_trajectory(estimator: Any) -> None:
    rate = torch.full((), 0.1, dtype=torch.float64, requires_grad=True)
    hparams = {"wd": leaf(3), "lr": rate}
    if estimator.steps:
        tuned = type(estimator)(SGD(lr=Hyper("lr")), 2)
        assert float(run(tuned, hparams=hparams)[0].grad["lr"]) != 0.0
    else:
        with pytest.raises(ValueError, match=r"hparams\['lr'\]"):
            run(estimator, hparams=hparams)
