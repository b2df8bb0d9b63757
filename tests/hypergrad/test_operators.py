"""Curvature operators against dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from hypergrad import CG, GGN, Curvature, Hessian, Implicit, Problem
from hypergrad.tree import hyper_leaves, trainable_leaves
from tests.hypergrad.problems import CASES, trained

X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.arange(12) % 3
PARAMS = trained(
    {
        "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        "b": torch.randn(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    }
)
HPARAMS = trained({"log_wd": torch.tensor(-1.0, dtype=torch.float64)})


def outputs(params: dict, hparams: dict, batch: Tensor) -> Tensor:
    return torch.tanh(batch @ params["a"]) @ params["b"]


def criterion(z: Tensor, hparams: dict, batch: Tensor) -> Tensor:
    return F.cross_entropy(z, Y)


def penalty(params: dict, hparams: dict, batch: Tensor) -> Tensor:
    return hparams["log_wd"].exp() * sum(p.square().sum() for p in params.values())


def inner(params: dict, hparams: dict, batch: Tensor) -> Tensor:
    return criterion(outputs(params, hparams, batch), hparams, batch) + penalty(
        params, hparams, batch
    )


PROBLEM = Problem(inner, lambda p, h, batch: criterion(outputs(p, h, batch), h, batch))


def dense(product: object, size: int) -> Tensor:
    return torch.stack([product(e) for e in torch.eye(size, dtype=torch.float64)])


def split(flat: Tensor) -> dict:
    return {"a": flat[:12].view(3, 4), "b": flat[12:].view(4, 3)}


FLAT = torch.cat([p.detach().reshape(-1) for p in PARAMS.values()])


def test_hessian_is_autograds() -> None:
    point = Hessian().at(PROBLEM, trainable_leaves(PARAMS), hyper_leaves(HPARAMS), X)
    exact = torch.autograd.functional.hessian(lambda w: inner(split(w), HPARAMS, X), FLAT)
    assert torch.allclose(dense(point.matvec, 24), exact, rtol=1e-10, atol=1e-12)


def test_ggn_is_the_dense_product() -> None:
    operator = GGN(outputs, criterion, penalty)
    point = operator.at(PROBLEM, trainable_leaves(PARAMS), hyper_leaves(HPARAMS), X)
    jacobian = torch.autograd.functional.jacobian(
        lambda w: outputs(split(w), HPARAMS, X).reshape(-1), FLAT
    )
    z = outputs(split(FLAT), HPARAMS, X)
    middle = torch.autograd.functional.hessian(
        lambda z: criterion(z.view(12, 3), HPARAMS, X), z.reshape(-1)
    )
    decay = 2 * HPARAMS["log_wd"].detach().exp() * torch.eye(24, dtype=torch.float64)
    exact = jacobian.T @ middle @ jacobian + decay
    found = dense(point.matvec, 24)
    assert torch.allclose(found, exact, rtol=1e-10, atol=1e-12)
    assert float(torch.linalg.eigvalsh(found).min()) > 0


def test_ggn_solves_where_the_hessian_is_indefinite() -> None:
    def run(operator: object) -> object:
        estimator = Implicit(CG(max_iter=200), operator)
        state = estimator.init(PROBLEM, PARAMS, small)
        return estimator(PROBLEM, PARAMS, small, X, X, state)[0]

    small = trained({"log_wd": torch.tensor(-8.0, dtype=torch.float64)})
    assert not run(Hessian()).status.ok
    assert run(GGN(outputs, criterion, penalty)).status.ok


def test_ggn_checks_its_parts() -> None:
    with pytest.raises(ValueError, match=r"criterion\(outputs\) \+ regularizer"):
        GGN(outputs, criterion).at(PROBLEM, trainable_leaves(PARAMS), hyper_leaves(HPARAMS), X)


def test_ggn_notices_a_small_part_that_is_missing() -> None:
    """In float64 a penalty of 1e-6 of the loss is not rounding."""
    tiny = trained({"log_wd": torch.tensor(-16.0, dtype=torch.float64)})
    with pytest.raises(ValueError, match="must be the inner loss"):
        GGN(outputs, criterion).at(PROBLEM, trainable_leaves(PARAMS), hyper_leaves(tiny), X)
    GGN(outputs, criterion, penalty).at(PROBLEM, trainable_leaves(PARAMS), hyper_leaves(tiny), X)


def test_ggn_parts_share_the_dropout_masks_of_the_loss() -> None:
    def noisy(params: dict, hparams: dict, batch: Tensor) -> Tensor:
        return F.dropout(torch.tanh(batch @ params["a"]), 0.5) @ params["b"]

    problem = Problem(
        lambda p, h, x: criterion(noisy(p, h, x), h, x) + penalty(p, h, x), PROBLEM.outer_loss
    )
    torch.manual_seed(0)
    GGN(noisy, criterion, penalty).at(
        problem, trainable_leaves(PARAMS), hyper_leaves(HPARAMS), X
    )  # raises if the masks differ
    after = torch.rand(1)
    torch.manual_seed(0)
    problem.inner_loss(PARAMS, HPARAMS, X)
    assert torch.equal(torch.rand(1), after)  # and draws as one evaluation does


def test_cross_product_is_the_mixed_derivative() -> None:
    case = CASES["mlp"]()
    point = Hessian().at(
        case.problem, trainable_leaves(case.params), hyper_leaves(case.hparams), case.inner
    )
    q = torch.randn(43, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = point.cross(q)[0]
    # log_wd['b1']: f has exp(h) w², so ∂²f/∂w∂h = 2 exp(h) w on the diagonal.
    h, w = case.hparams["log_wd"]["b1"].detach(), case.params["b1"].detach()
    assert torch.allclose(found, 2 * h.exp() * w * q[:5], rtol=1e-12)


@pytest.mark.parametrize(
    "operator", [Hessian(), GGN(outputs, criterion, penalty)], ids=["Hessian", "GGN"]
)
def test_no_grad_around_a_call_changes_nothing(operator: Curvature) -> None:
    def found() -> list[Tensor]:
        point = operator.at(PROBLEM, trainable_leaves(PARAMS), hyper_leaves(HPARAMS), X)
        return [point.matvec(FLAT), *point.cross(FLAT)]

    expected = found()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(found(), expected, strict=True))
