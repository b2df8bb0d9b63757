"""DARTS: the finite difference against the dense one-step formula."""

from __future__ import annotations

import optree
import pytest
import torch

from hypergrad import SGD, FiniteDifference, Identity, Implicit, Status, Unrolled
from tests.hypergrad.problems import CASES, ridge
from tests.hypergrad.test_implicit import estimate, flat


def test_dense_one_step_formula() -> None:
    """On ridge ∇_h f is quadratic in w, so the central difference is exact."""
    case, lr = ridge(), 0.3
    w, h = case.params["w"].detach(), case.hparams["log_wd"].detach()
    x, y = case.inner["x"], case.inner["y"]
    ahead = w - lr * (x.T @ (x @ w - y) / len(x) + h.exp() * w)
    xv, yv = case.outer["x"], case.outer["y"]
    v = xv.T @ (xv @ ahead - yv) / len(xv)
    found = estimate(FiniteDifference(lr=lr), case)
    assert torch.allclose(found.grad["log_wd"], -lr * h.exp() * w * v, rtol=1e-9)
    assert found.value.item() == pytest.approx(float((xv @ ahead - yv).square().mean() / 2))
    assert (found.n_hvp, found.n_grad, found.status) == (0, 4, Status.APPROXIMATE)


def test_is_one_unrolled_step() -> None:
    case = CASES["mlp"]()
    darts = flat(estimate(FiniteDifference(lr=0.2, epsilon=1e-4), case).grad)
    unrolled = flat(estimate(Unrolled(SGD(lr=0.2), 1), case).grad)
    assert float((darts - unrolled).norm() / unrolled.norm()) < 1e-6


def test_tends_to_t1_t2_for_a_small_step() -> None:
    case, lr = CASES["mlp"](), 1e-6
    darts = flat(estimate(FiniteDifference(lr=lr, epsilon=1e-4), case).grad)
    t1_t2 = flat(estimate(Implicit(Identity(scale=lr)), case).grad)
    assert float((darts - t1_t2).norm() / t1_t2.norm()) < 1e-4


def test_both_evaluations_share_the_dropout_masks() -> None:
    """With different masks the difference is noise of size 1/ε."""
    from tests.hypergrad.problems import _dropout, module

    case = module(_dropout, seeded=False)

    def run(seed: int, epsilon: float) -> torch.Tensor:
        torch.manual_seed(seed)
        return flat(estimate(FiniteDifference(lr=0.2, epsilon=epsilon), case).grad)

    coarse, fine = run(3, 1e-2), run(3, 1e-4)
    assert float((coarse - fine).norm() / fine.norm()) < 1e-3


def test_draws_as_one_inner_and_one_outer_evaluation_do() -> None:
    from tests.hypergrad.problems import _dropout, module

    case = module(_dropout, seeded=False)
    torch.manual_seed(0)
    estimate(FiniteDifference(), case)
    after = torch.rand(1)
    torch.manual_seed(0)
    case.problem.inner_loss(case.params, case.hparams, case.inner)
    case.problem.outer_loss(case.params, case.hparams, case.outer)
    assert torch.equal(torch.rand(1), after)


def test_params_too_coarse_for_a_difference_are_refused() -> None:
    with pytest.raises(ValueError, match="bfloat16"):
        estimate(FiniteDifference(), ridge(torch.bfloat16))


@pytest.mark.parametrize("name", ["batch_norm", "dropout", "mlp"])
def test_arguments_stay_untouched(name: str) -> None:
    case = CASES[name]()
    module = getattr(case.problem, "module", torch.nn.Module())
    before = [t.detach().clone() for t in (*module.buffers(), *optree.tree_leaves(case.params))]
    estimate(FiniteDifference(), case)
    after = [*module.buffers(), *optree.tree_leaves(case.params)]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 0.0}, "lr must be positive"), ({"epsilon": -1.0}, "epsilon must be positive")],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FiniteDifference(**settings)
