"""Fixed points w = T(w, h) as inner problems."""

from __future__ import annotations

from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from hypergrad import CG, GMRES, Direct, FixedPoint, Implicit, Neumann, Problem, Status
from hypergrad.problem import inner_gradient
from hypergrad.tree import hyper_leaves, trainable_leaves
from tests.hypergrad.problems import SOLVED, trained


def call(estimator: Implicit, problem: Problem, params: Any, hparams: Any, *batches: Any) -> Any:
    state = estimator.init(problem, params, hparams)
    return estimator(problem, params, hparams, *batches, state)[0]


SOLVERS = [GMRES(rtol=1e-11), Direct(), Neumann(terms=20_000, step=1.0, rtol=1e-12)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("name", ["ridge", "direct_outer"])
def test_gradient_map_has_the_closed_form(name: str, solver: Any) -> None:
    """T(w) = w − η∇f: the same solution, the same hypergradient."""
    case = SOLVED[name]()

    def descend(params: Any, hparams: Any, batch: Any) -> Any:
        w, h = trainable_leaves(params), hyper_leaves(hparams)
        w.tensors[:] = list(trained_tensors(params))
        h.tensors[:] = list(trained_tensors(hparams))
        _, grads = inner_gradient(case.problem, w, h, batch)
        return w.rebuild([p - 0.2 * g for p, g in zip(w.tensors, grads, strict=True)])

    params = case.minimize(case.hparams)
    found = call(
        Implicit(solver, FixedPoint(descend)),
        case.problem,
        params,
        case.hparams,
        case.inner,
        case.outer,
    )
    exact = case.hypergradient(case.hparams)
    for key, grad in found.grad.items():
        assert torch.allclose(grad, exact[key], rtol=1e-7)
    assert found.status.ok


def trained_tensors(tree: Any) -> list[Tensor]:
    return [t for t in optree.tree_leaves(tree) if t.requires_grad]


MATRIX = torch.tensor([[3.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 0.6]], dtype=torch.float64)


def heavy_ball(params: Any, hparams: Any, batch: Any) -> Any:
    """w ← w − 0.1 v, v ← 0.9 v + Aw − h."""
    v = 0.9 * params["v"] + MATRIX @ params["w"] - hparams["h"]
    return {"w": params["w"] - 0.1 * v, "v": v}


MOMENTUM = Problem(
    lambda p, h, b: (p["w"] * h["h"]).sum(),  # not used
    lambda p, h, b: p["w"].pow(3).sum() + h["h"].square().sum(),
)


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_momentum_map(solver: Any) -> None:
    """Its fixed point is w = A⁻¹h, v = 0, whatever the momentum."""
    h = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = torch.linalg.solve(MATRIX, h)
    operator = FixedPoint(heavy_ball)
    hparams = trained({"h": h})
    start = trained({"w": torch.zeros(3).double(), "v": torch.zeros(3).double()})
    solved = operator.solve(start, hparams, None, tol=1e-13, max_iter=5000)
    assert solved.status is Status.CONVERGED
    assert torch.allclose(solved.params["w"], w, rtol=1e-9)
    found = call(Implicit(solver, operator), MOMENTUM, solved.params, hparams, None, None)
    exact = torch.linalg.solve(MATRIX, 3 * w.square()) + 2 * h
    assert torch.allclose(found.grad["h"], exact, rtol=1e-7)


def test_cg_refuses_the_momentum_map() -> None:
    params = trained({"w": torch.ones(3).double(), "v": torch.zeros(3).double()})
    hparams = trained({"h": torch.ones(3).double()})
    found = call(Implicit(CG(), FixedPoint(heavy_ball)), MOMENTUM, params, hparams, None, None)
    assert found.status is Status.NOT_SYMMETRIC


def test_deep_equilibrium_against_unrolling() -> None:
    """z = tanh(Wz + Ux): dF/dW and dF/dU as through 300 iterations by autograd."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(6, 6, generator=generator).double() for _ in range(2)]
    hparams = trained(
        {"w": 0.5 * weights[0] / torch.linalg.matrix_norm(weights[0], 2), "u": weights[1]}
    )
    x = torch.randn(4, 6, generator=generator).double()

    def layer(params: Any, hparams: Any, batch: Tensor) -> Any:
        return {"z": torch.tanh(params["z"] @ hparams["w"].T + batch @ hparams["u"].T)}

    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        return params["z"].square().sum() + 0.1 * hparams["w"].square().sum()

    operator, start = FixedPoint(layer), trained({"z": torch.zeros(4, 6).double()})
    solved = operator.solve(start, hparams, x, tol=1e-13)
    problem = Problem(outer, outer)
    found = call(Implicit(GMRES(rtol=1e-12), operator), problem, solved.params, hparams, x, None)
    state = {"z": torch.zeros(4, 6).double()}
    for _ in range(300):
        state = layer(state, hparams, x)
    exact = torch.autograd.grad(outer(state, hparams, None), [hparams["w"], hparams["u"]])
    assert torch.allclose(found.grad["w"], exact[0], rtol=1e-9)
    assert torch.allclose(found.grad["u"], exact[1], rtol=1e-9)
    assert torch.allclose(solved.params["z"], state["z"], atol=1e-12)


def test_iteration_that_expands_is_reported() -> None:
    params, hparams = trained({"w": torch.ones(2).double()}), trained({"h": torch.ones(2).double()})
    operator = FixedPoint(lambda p, h, b: {"w": 3 * p["w"] + h["h"]})
    found = operator.solve(params, hparams, None)
    assert found.status is Status.DIVERGED
    assert bool(torch.isfinite(found.params["w"]).all())
    assert operator.solve(params, hparams, None, max_iter=2).status is Status.MAX_ITER


def test_map_of_another_tree_is_refused() -> None:
    params, hparams = trained({"w": torch.ones(2).double()}), trained({"h": torch.ones(2).double()})
    problem = Problem(lambda p, h, b: p["w"].sum(), lambda p, h, b: p["w"].sum())
    for wrong, message in (
        (lambda p, h, b: {"z": p["w"]}, "the map's result and params must be the same tree"),
        (lambda p, h, b: {"w": p["w"][:1]}, r"shape \(1,\), but params has \(2,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call(Implicit(GMRES(), FixedPoint(wrong)), problem, params, hparams, None, None)
    with pytest.raises(ValueError, match="tol must be positive"):
        FixedPoint(heavy_ball).solve(params, hparams, None, tol=-1.0)
