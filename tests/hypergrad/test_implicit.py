"""Implicit differentiation against closed forms, central differences and another library."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optree
import pytest
import torch
import torchopt
from torch import Tensor

from hypergrad import (
    CG,
    GMRES,
    MINRES,
    Direct,
    Hypergradient,
    Identity,
    Implicit,
    LinearSolver,
    Neumann,
    Nystrom,
    Problem,
    Status,
    TwoViewLoss,
)
from hypergrad.check import check_hypergradient
from hypergrad.estimator import Estimator
from hypergrad.operators import Hessian
from hypergrad.tree import hyper_leaves, trainable_leaves
from tests.hypergrad.problems import CASES, SOLVED, Case, ridge, trained


def flat(tree: object) -> Tensor:
    return torch.cat([t.reshape(-1) for t in optree.tree_leaves(tree)])


def estimate(estimator: Estimator, case: Case, params: object = None) -> Hypergradient:
    params = case.params if params is None else params
    state = estimator.init(case.problem, params, case.hparams)
    return estimator(case.problem, params, case.hparams, case.inner, case.outer, state)[0]


TIGHT = [Direct(), CG(rtol=1e-12, max_iter=500), Neumann(terms=20_000, rtol=1e-12)]


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("solver", TIGHT, ids=lambda s: type(s).__name__)
def test_closed_form(name: str, solver: object) -> None:
    case = SOLVED[name]()
    found = estimate(Implicit(solver), case, case.minimize(case.hparams))
    exact = flat(case.hypergradient(case.hparams))
    assert float((flat(found.grad) - exact).norm() / exact.norm()) < 1e-8
    assert found.status.ok
    assert found.residual < 1e-11


def test_direct_outer_term_dominates() -> None:
    case = SOLVED["direct_outer"]()
    found = flat(estimate(Implicit(Direct()), case, case.minimize(case.hparams)).grad)
    indirect = found - 20 * case.hparams["h"].detach()
    assert float(indirect.norm()) < 1e-2 * float(found.norm())


@pytest.mark.parametrize("name", ["mlp", "dropout", "tied_and_frozen"])
def test_networks_against_central_differences(name: str) -> None:
    case = CASES[name]()
    report = check_hypergradient(
        Implicit(CG(rtol=1e-10, max_iter=1000)),
        case.problem,
        case.params,
        case.hparams,
        case.inner,
        case.outer,
        directions=1,
    )
    assert report.passed, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch_norm"])
def test_batch_norm_against_central_differences(name: str) -> None:
    case = CASES[name]()
    report = check_hypergradient(
        Implicit(CG(rtol=1e-10, max_iter=1000)),
        case.problem,
        case.params,
        case.hparams,
        case.inner,
        case.outer,
        directions=1,
    )
    assert report.passed, str(report)


def test_attention_has_products_on_every_backend_choice() -> None:
    """At any point the Hessian is symmetric: uᵀHv = vᵀHu, through attention too."""
    case = CASES["attention"]()
    point = Hessian().at(
        case.problem, trainable_leaves(case.params), hyper_leaves(case.hparams), case.inner
    )
    size = sum(shape.numel() for shape in point.space.shapes)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.randn(size, generator=generator, dtype=torch.float64) for _ in range(2))
    left, right = torch.dot(u, point.matvec(v)), torch.dot(v, point.matvec(u))
    assert float(left) != 0.0
    assert float((left - right).abs() / left.abs()) < 1e-10


@pytest.mark.filterwarnings("ignore:.*functorch:FutureWarning")  # raised inside torchopt
def test_agrees_with_torchopt() -> None:
    case = ridge()

    def optimality(w: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return torch.func.grad(
            lambda w: case.problem.inner_loss({"w": w}, {"log_wd": h}, {"x": x, "y": y})
        )(w)

    @torchopt.diff.implicit.custom_root(
        optimality,
        argnums=1,
        solve=torchopt.linear_solve.solve_normal_cg(rtol=1e-14, maxiter=500),
    )
    def solve(w: Tensor, h: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return case.minimize({"log_wd": h})["w"].detach()

    h = case.hparams["log_wd"].detach().clone().requires_grad_()
    w = solve(torch.zeros(6, dtype=torch.float64, requires_grad=True), h, *case.inner.values())
    value = case.problem.outer_loss({"w": w}, {"log_wd": h}, case.outer)
    (theirs,) = torch.autograd.grad(value, h)
    ours = estimate(Implicit(CG(rtol=1e-12)), case, case.minimize(case.hparams)).grad["log_wd"]
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_identity_is_t1_t2() -> None:
    """dF/dh ≈ ∂F/∂h − c (∂²f/∂h∂w) ∂F/∂w, here −c eʰ ⊙ w ⊙ ∂F/∂w."""
    case = ridge()
    found = estimate(Implicit(Identity(scale=0.3)), case)
    w, h = case.params["w"].detach(), case.hparams["log_wd"].detach()
    x, y = case.outer["x"], case.outer["y"]
    outer_grad = x.T @ (x @ w - y) / len(x)
    assert torch.allclose(found.grad["log_wd"], -0.3 * h.exp() * w * outer_grad, rtol=1e-12)
    assert (found.status, found.n_hvp, found.residual) == (Status.APPROXIMATE, 1, None)


def test_warm_start_saves_products() -> None:
    case = SOLVED["softmax_ridge"]()
    w = case.minimize(case.hparams)

    def second_call(warm: bool) -> int:
        estimator = Implicit(CG(rtol=1e-6), warm_start=warm)
        state = estimator.init(case.problem, w, case.hparams)
        _, state = estimator(case.problem, w, case.hparams, case.inner, case.outer, state)
        near = optree.tree_map(lambda t: (t + 1e-4).detach().requires_grad_(), case.hparams)
        moved = case.minimize(near)
        return estimator(case.problem, moved, near, case.inner, case.outer, state)[0].n_hvp

    assert second_call(warm=True) <= 0.7 * second_call(warm=False)


def test_state_of_other_params_is_refused() -> None:
    case = ridge()
    state = {"adjoint": torch.zeros(3), "solver": None}
    with pytest.raises(ValueError, match=r"shape \(3,\), but the outer gradient has \(6,\)"):
        Implicit()(case.problem, case.params, case.hparams, case.inner, case.outer, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_give_a_float32_hypergradient(dtype: torch.dtype) -> None:
    exact = ridge()
    solution = exact.minimize(exact.hparams)
    truth = flat(estimate(Implicit(Direct()), exact, solution).grad)
    case = ridge(dtype)
    params = trained(optree.tree_map(lambda t: t.to(dtype), solution))
    found = flat(estimate(Implicit(CG(rtol=1e-2, max_iter=20)), case, params).grad)
    assert found.dtype == torch.float32
    error = float((found.double() - truth).norm() / truth.norm())
    assert error < (1e-2 if dtype == torch.float32 else 0.5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    case = ridge()

    def move(tree: object) -> object:
        return optree.tree_map(lambda t: t.detach().cuda().requires_grad_(t.requires_grad), tree)

    e = Implicit(CG(rtol=1e-12))
    params, hparams = move(case.minimize(case.hparams)), move(case.hparams)
    found, _ = e(
        case.problem,
        params,
        hparams,
        move(case.inner),
        move(case.outer),
        e.init(case.problem, params, hparams),
    )
    exact = case.hypergradient(case.hparams)["log_wd"]
    assert torch.allclose(found.grad["log_wd"].cpu(), exact, rtol=1e-8)


@pytest.mark.parametrize("name", ["batch_norm", "dropout", "mlp"])
def test_arguments_stay_untouched(name: str) -> None:
    case = CASES[name]()
    module = getattr(case.problem, "module", torch.nn.Module())
    before = [t.detach().clone() for t in (*module.buffers(), *optree.tree_leaves(case.params))]
    estimate(Implicit(CG(max_iter=5)), case)
    after = [*module.buffers(), *optree.tree_leaves(case.params)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(t.grad is None for t in optree.tree_leaves((case.params, case.hparams)))


class TestJacobian:
    """Several outer losses at one inner solution."""

    @staticmethod
    def losses(case: Case) -> list:
        def third(params: object, hparams: object, batch: object) -> Tensor:
            return case.problem.outer_loss(params, hparams, batch) ** 2

        return [case.problem.outer_loss, case.problem.inner_loss, third]

    @pytest.mark.parametrize("name", ["ridge", "softmax_ridge"])
    @pytest.mark.parametrize("vectorize", [True, False])
    @pytest.mark.parametrize(
        "solver", [CG(rtol=1e-11), Direct(), MINRES(rtol=1e-11)], ids=lambda s: type(s).__name__
    )
    def test_each_row_is_the_hypergradient_of_its_loss(
        self, name: str, vectorize: bool, solver: LinearSolver
    ) -> None:
        case = CASES[name]()
        losses, estimator = self.losses(case), Implicit(solver)
        rows, state = estimator.jacobian(
            case.problem,
            losses,
            case.params,
            case.hparams,
            case.inner,
            case.outer,
            estimator.init(case.problem, case.params, case.hparams),
            vectorize=vectorize,
        )
        for row, loss in zip(rows, losses, strict=True):
            alone = replace(case, problem=replace(case.problem, outer_loss=loss))
            exact = estimate(estimator, alone)
            assert torch.allclose(flat(row.grad), flat(exact.grad), rtol=1e-7, atol=1e-12)
            assert torch.equal(row.value, exact.value)
            assert row.residual < 1e-10
        assert state["adjoint"].shape == (3, flat(case.params).numel())

    def test_warm_start_of_every_row(self) -> None:
        case, estimator = CASES["ridge"](), Implicit(CG(rtol=1e-8))
        state = estimator.init(case.problem, case.params, case.hparams)
        args = (case.problem, self.losses(case), case.params, case.hparams, case.inner, case.outer)
        _, state = estimator.jacobian(*args, state)
        rows, _ = estimator.jacobian(*args, state)
        assert [row.n_hvp for row in rows] == [2, 2, 2]  # the residual, and the cross product

    def test_no_loss(self) -> None:
        case = ridge()
        with pytest.raises(ValueError, match="outer_losses must hold at least one"):
            Implicit().jacobian(
                case.problem, [], case.params, case.hparams, case.inner, case.outer, Implicit().init
            )


def test_loss_with_stop_gradients_is_no_job_for_cg() -> None:
    """g(w) = c(w) ⊙ (w − h), c without gradient: its Jacobian diag(c) + (w − h) ∇cᵀ."""

    def two_views(moving: dict, frozen: dict, hparams: dict, batch: object) -> Tensor:
        weight = 1 + frozen["w"].roll(1).square()
        return 0.5 * (weight * (moving["w"] - hparams["h"]).square()).sum()

    def outer(params: dict, hparams: dict, batch: object) -> Tensor:
        return (params["w"] * torch.arange(1.0, 5.0, dtype=torch.float64)).sum()

    problem = Problem(TwoViewLoss(two_views), outer)
    params = trained({"w": torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)})
    hparams = trained({"h": torch.tensor([0.3, 1.0, -1.0, 2.0], dtype=torch.float64)})
    case = Case(problem, params, hparams, None, None)
    found = estimate(Implicit(CG()), case)
    assert found.status is Status.NOT_SYMMETRIC
    assert "use GMRES" in str(found.status)
    exact, general = estimate(Implicit(Direct()), case), estimate(Implicit(GMRES()), case)
    assert general.status is Status.CONVERGED
    assert torch.allclose(general.grad["h"], exact.grad["h"], rtol=1e-5)


def test_preconditioner_stays_in_the_state_which_can_be_stored(tmp_path: Path) -> None:
    case = CASES["mlp"]()
    estimator = Implicit(CG(rtol=1e-6, damping=0.1, preconditioner=Nystrom(rank=10)))
    state = estimator.init(case.problem, case.params, case.hparams)
    args = (case.problem, case.params, case.hparams, case.inner, case.outer)
    first, state = estimator(*args, state)
    torch.save(state, tmp_path / "state.pt")
    stored = torch.load(tmp_path / "state.pt", weights_only=True)
    second, _ = estimator(*args, {**stored, "adjoint": None})
    assert second.n_hvp == first.n_hvp - 10
    assert torch.equal(flat(first.grad), flat(second.grad))


def test_hyperparameter_outside_of_the_curvature_has_its_direct_term_only() -> None:
    """h enters f without w: no cross product, but ∂F/∂h."""

    def inner(params: dict, hparams: dict, batch: object) -> Tensor:
        return (params["w"] - 1).square().sum() + hparams["h"].square().sum()

    def outer(params: dict, hparams: dict, batch: object) -> Tensor:
        return params["w"].square().sum() + 3 * hparams["h"].sum()

    params = trained({"w": torch.ones(2, dtype=torch.float64)})
    hparams = trained({"h": torch.ones(2, dtype=torch.float64)})
    found = estimate(Implicit(), Case(Problem(inner, outer), params, hparams, None, None))
    assert found.grad["h"].tolist() == [3.0, 3.0]
