"""`check_hypergradient` passes what is right, and names what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import CG, SGD, Hyper, Identity, Implicit, Problem, Unrolled, check_hypergradient
from tests.hypergrad.problems import CASES, Case, ridge, trained


def check(estimator: Any, case: Case, **settings: Any) -> Any:
    return check_hypergradient(
        estimator, case.problem, case.params, case.hparams, case.inner, case.outer, **settings
    )


@dataclass(frozen=True)
class Broken(Implicit):
    """Right but for the sign of one leaf."""

    def __call__(self, *args: Any) -> Any:
        found, state = super().__call__(*args)
        return replace(found, grad={**found.grad, "weight": -found.grad["weight"]}), state


def test_names_the_wrong_leaf() -> None:
    report = check(Broken(CG(rtol=1e-10, max_iter=500)), CASES["mlp"](), directions=0)
    wrong = [row.name for row in report.rows if not report.row_passed(row)]
    assert not report.passed
    assert "hparams['weight']" in wrong
    assert not any("log_wd" in name for name in wrong)
    assert "WRONG" in str(report)
    assert "FAILED" in str(report)


def test_shows_the_bias_of_a_biased_estimator() -> None:
    report = check(Implicit(Identity()), ridge())
    assert not report.passed
    assert report.worst.error > 0.1
    assert report.status.value == "approximate"


def test_unrolled_is_checked_through_its_own_steps() -> None:
    case = replace(ridge(), hparams=trained({"log_wd": torch.zeros(6), "lr": torch.tensor(0.1)}))
    report = check(Unrolled(SGD(lr=Hyper("lr"), momentum=0.9), 7), case)
    assert report.passed, str(report)
    assert report.inner_gradient is None
    assert [row.name for row in report.rows][:2] == ["hparams['log_wd']", "hparams['lr']"]


def test_float32_problem_is_checked_in_float64() -> None:
    report = check(Implicit(CG(rtol=1e-12)), ridge(torch.float32))
    assert report.passed, str(report)
    assert report.worst.error < 1e-7


def test_own_solver_of_the_inner_problem() -> None:
    case = ridge()
    calls = []

    def solve(params: Any, hparams: Any) -> Any:
        calls.append(1)
        return case.minimize(hparams)

    assert check(Implicit(CG(rtol=1e-12)), case, solve=solve).passed
    assert len(calls) > 4


def test_a_random_loss_is_reported() -> None:
    generator = torch.Generator().manual_seed(0)
    case = ridge()

    def noisy(params: Any, hparams: Any, batch: Any) -> Tensor:
        noise = torch.rand((), generator=generator, dtype=torch.float64)
        return case.problem.outer_loss(params, hparams, batch) * (1 + noise)

    report = check(Implicit(), replace(case, problem=Problem(case.problem.inner_loss, noisy)))
    assert not report.deterministic
    assert not report.passed
    assert "seed in the batch" in str(report)


def test_a_loss_with_jumps_is_inconclusive() -> None:
    """Its differences are noise; agreement within noise must not pass."""
    case = ridge()

    def jumping(params: Any, hparams: Any, batch: Any) -> Tensor:
        smooth = case.problem.outer_loss(params, hparams, batch)
        return smooth + torch.remainder(1e9 * smooth.detach(), 1.0)

    report = check(
        Implicit(CG(rtol=1e-12)), replace(case, problem=Problem(case.problem.inner_loss, jumping))
    )
    assert report.deterministic
    assert not report.conclusive
    assert not report.passed
    assert "mostly noise" in str(report)


def test_an_unsolved_inner_problem_is_reported() -> None:
    report = check(Implicit(CG(rtol=1e-12)), ridge(), solve=lambda params, hparams: params)
    assert report.inner_gradient > 1e-3
    assert "not solved" in str(report)


def test_leaves_the_random_state_and_the_arguments() -> None:
    case = ridge()
    before = {k: v.detach().clone() for k, v in case.params.items()}
    torch.manual_seed(0)
    check(Implicit(), case)
    after = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), after)
    assert torch.equal(case.params["w"], before["w"])


@pytest.mark.parametrize("settings", [{"eps": 0.0}, {"tol": -1.0}, {"directions": -1}])
def test_bad_settings(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        check(Implicit(), ridge(), **settings)
