"""Losses with stop-gradients: the two-view step keeps the whole second derivative."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import (
    CG,
    SGD,
    Direct,
    FiniteDifference,
    Implicit,
    Problem,
    TwoViewLoss,
    Unrolled,
    check_hypergradient,
    two_view_grad,
)
from tests.hypergrad.problems import trained

X = torch.randn(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randn(10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def focused(moving: Any, frozen: Any, hparams: Any, batch: Any) -> Tensor:
    """Squared errors, weighted by a confidence that carries no gradient."""
    error = (X @ moving["w"] - Y).square()
    weight = torch.exp(-hparams["focus"] * (X @ frozen["w"] - Y).square())
    return (weight * error).mean()


def detached(params: Any, hparams: Any, batch: Any) -> Tensor:
    return focused(params, {"w": params["w"].detach()}, hparams, batch)


def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
    return (X[:4] @ params["w"] - 1).square().mean()


PARAMS = trained({"w": torch.ones(3, dtype=torch.float64)})
HPARAMS = trained({"focus": torch.tensor(0.5, dtype=torch.float64)})


def test_value_and_gradient_are_those_of_the_detached_loss() -> None:
    w = PARAMS["w"]
    value, grads = two_view_grad(lambda p, q: focused(p, q, HPARAMS, None), PARAMS)
    plain = detached(PARAMS, HPARAMS, None)
    (expected,) = torch.autograd.grad(plain, w)
    assert torch.equal(value, plain)
    assert torch.allclose(grads["w"], expected, rtol=1e-14)


def test_second_derivative_is_complete() -> None:
    """g(p) = 2p² for the loss sg(p)·p², so g'(p) = 4p; detach gives 2p."""
    p = torch.tensor(2.0, requires_grad=True)
    _, g = two_view_grad(lambda a, b: b * a**2, p)
    assert g.item() == 8.0
    assert torch.autograd.grad(g, p)[0].item() == 8.0


def test_unrolled_hypergradient_of_a_two_view_loss() -> None:
    problem = Problem(TwoViewLoss(focused), outer)
    estimator = Unrolled(SGD(lr=0.3), 6)
    report = check_hypergradient(estimator, problem, PARAMS, HPARAMS, None, None)
    assert report.passed, str(report)


def crossed(moving: Any, frozen: Any, hparams: Any, batch: Any) -> Tensor:
    """A game-like loss: dg/dw = I + focus · R with R a rotation, so it is not symmetric."""
    turned = torch.roll(frozen["w"], 1) * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    pull = ((moving["w"] - 1) * hparams["focus"] * turned).sum()
    return 0.5 * moving["w"].square().sum() + pull - moving["w"][0]


def equilibrium(params: Any, hparams: Any) -> Any:
    """The root of g(w, h) = w + focus · R w − e₀, written out."""
    r = torch.tensor([[0.0, 0.0, 1.0], [-2.0, 0.0, 0.0], [0.0, 0.5, 0.0]], dtype=torch.float64)
    e0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    jacobian = torch.eye(3, dtype=torch.float64) + hparams["focus"].detach() * r
    return {"w": torch.linalg.solve(jacobian, e0).requires_grad_()}


def test_implicit_at_the_fixed_point_of_a_two_view_loss() -> None:
    """Needs the transposed Jacobian of g, not its symmetric part."""
    problem = Problem(TwoViewLoss(crossed), outer)
    report = check_hypergradient(
        Implicit(Direct()), problem, PARAMS, HPARAMS, None, None, solve=equilibrium
    )
    assert report.inner_gradient < 1e-12
    assert report.passed, str(report)


def test_cg_does_not_claim_a_system_without_symmetry() -> None:
    problem, w = Problem(TwoViewLoss(crossed), outer), equilibrium(PARAMS, HPARAMS)
    estimator = Implicit(CG(rtol=1e-10))
    found, _ = estimator(problem, w, HPARAMS, None, None, estimator.init(problem, w, HPARAMS))
    assert not found.status.ok


def test_darts_moves_only_the_view_that_carries_the_gradient() -> None:
    problem = Problem(TwoViewLoss(focused), outer)

    def grad(estimator: Any) -> float:
        state = estimator.init(problem, PARAMS, HPARAMS)
        return float(estimator(problem, PARAMS, HPARAMS, None, None, state)[0].grad["focus"])

    darts = grad(FiniteDifference(lr=0.2, epsilon=1e-4))
    assert darts == pytest.approx(grad(Unrolled(SGD(lr=0.2), 1)), rel=1e-6)


def test_detach_gives_a_wrong_one() -> None:
    report = check_hypergradient(
        Unrolled(SGD(lr=0.3), 6), Problem(detached, outer), PARAMS, HPARAMS, None, None
    )
    assert report.worst.error > 1e-2


def test_frozen_leaves_get_zeros_and_nothing_to_train_is_refused() -> None:
    tree = {"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(3.0)}
    _, grads = two_view_grad(lambda p, q: p["a"] * q["b"] * p["b"], tree)
    assert (grads["a"].item(), grads["b"].item()) == (9.0, 0.0)
    with pytest.raises(ValueError, match="no tensor requires grad"):
        two_view_grad(lambda p, q: p, torch.tensor(1.0))
