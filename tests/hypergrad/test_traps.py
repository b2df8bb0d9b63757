"""Mistakes that libraries for hypergradients have made, each with a test that we do not.

Here: what an update rule can get wrong, in closed form.  `test_traps_modules`: what a module
brings.  Those that have a natural place elsewhere:

- CG directions from the old residual: test_linear, `TestCG.test_direction_uses_the_new_residual`;
- the converged iterate discarded, 0/0 after convergence: test_linear,
  `TestCG.test_tolerance_is_met_by_the_true_residual` and `test_zero_right_hand_side`;
- two dropout masks in one finite difference: test_finite,
  `test_both_evaluations_share_the_dropout_masks`; test_sama,
  `test_dropout_masks_are_those_of_the_last_step`;
- replays with other dropout masks: test_unrolled_contract,
  `test_dropout_masks_are_those_of_training`, and without a check of the loss,
  `test_a_recomputed_loss_that_differs_is_an_error`;
- truncation that leaves the first steps at w_0: test_unrolled,
  `test_truncation_cuts_params_and_optimizer_state`, or leaks into `.grad`: test_unrolled_contract,
  `test_arguments_are_untouched`;
- perturbed weights left behind: test_first_order and test_finite, `test_arguments_stay_untouched`;
- NaN replaced by 0: test_unrolled_contract, `test_what_is_not_finite_is_named` and
  `test_an_adjoint_that_is_not_finite_names_its_step`; test_bad_input,
  `test_infinite_derivative_of_a_finite_loss_is_named`;
- the wrong derivative of TorchOpt's accelerated Adam: test_torchopt,
  `test_accelerated_adam_is_wrong`; of `higher`'s Adam: test_higher_unrolled,
  `test_adam_of_higher_is_wrong_and_stays_as_it_is`;
- float32 with a tiny eps: test_conditioning;
- any other option of any rule, against a textbook unroll: test_every_option;
- train-mode BatchNorm and tied or frozen parameters: cases of test_unrolled,
  `test_every_problem_against_central_differences`, and of test_implicit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from hypergrad import (
    CG,
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Forward,
    HigherUnrolled,
    Hyper,
    Implicit,
    Lion,
    Problem,
    RMSprop,
    Unrolled,
    module_problem,
)
from tests.hypergrad.naive import error
from tests.hypergrad.problems import CASES, Case

TRAJECTORIES = [Unrolled, Forward, HigherUnrolled]


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


class Weight(nn.Module):
    """A single weight."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([start], dtype=torch.float64))


def one_weight(start: float, inner: Any, **hparams: float) -> Case:
    """f = inner(w, h), F = w."""
    problem, params = module_problem(
        Weight(start), lambda m, h, b: inner(m.w.sum(), h), lambda m, h, b: m.w.sum()
    )
    return Case(problem, params, {k: scalar(v) for k, v in hparams.items()}, None, None)


def grad(case: Case, estimator: Any) -> Any:
    start = estimator.init(case.problem, case.params, case.hparams)
    return estimator(case.problem, case.params, case.hparams, case.inner, case.outer, start)[0].grad


@pytest.mark.parametrize("estimator", TRAJECTORIES)
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 0.1])
def test_adam_eps_is_added_after_the_bias_correction(estimator: Any, eps: float) -> None:
    """One step is w − η hg/(|hg| + ε), so dw/dh = −η gε/(g + ε)² at h = 1.

    Added to the root before its correction, ε would count 31.6-fold.
    """
    g, lr = 1e-3, 0.1
    case = one_weight(2.0, lambda w, h: h["h"] * g * w, h=1.0)
    expected = -lr * g * eps / (g + eps) ** 2
    for rule in (Adam(lr, eps=eps), AdamW(lr, eps=eps, weight_decay=0.0, amsgrad=True)):
        assert grad(case, estimator(rule, 1))["h"].item() == pytest.approx(expected, rel=1e-10)
    theirs = grad(case, estimator(torchopt.adam(lr, eps=eps), 1))["h"].item()
    assert theirs == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("estimator", TRAJECTORIES)
def test_adam_bias_corrections_are_in_double_precision(estimator: Any) -> None:
    """At a constant gradient every step is η hg/(hg + ε), if corrections are exact; not to 1e-8."""
    g, eps, lr, steps = 0.3, 0.2, 0.1, 40
    case = one_weight(2.0, lambda w, h: h["h"] * g * w, h=1.0, lr=lr)
    found = grad(case, estimator(Adam(Hyper("lr"), eps=eps), steps))
    assert found["lr"].item() == pytest.approx(-steps * g / (g + eps), rel=1e-13)
    assert found["h"].item() == pytest.approx(-steps * lr * g * eps / (g + eps) ** 2, rel=1e-13)


@pytest.mark.parametrize("estimator", TRAJECTORIES)
def test_the_first_momentum_buffer_carries_a_derivative(estimator: Any) -> None:
    """f = hw²/2: w₂ = w₀[(1 − ηh)² − ημh].  A detached first buffer loses the last term."""
    start, lr, mu, h = 2.0, 0.1, 0.9, 1.5
    case = one_weight(start, lambda w, hyper: 0.5 * hyper["h"] * w**2, h=h)
    expected = start * (-2 * lr * (1 - lr * h) - lr * mu)
    for rule in (SGD(lr, mu), torchopt.sgd(lr, momentum=mu)):
        assert grad(case, estimator(rule, 2))["h"].item() == pytest.approx(expected, rel=1e-13)


RULES = [
    SGD(0.05, 0.9),
    Adam(0.05, eps=1e-3),
    AdamW(0.05, eps=1e-3, amsgrad=True),
    RMSprop(0.01, eps=1e-3),
    RMSprop(0.01, eps=1e-3, centered=True, momentum=0.9),
    Adagrad(0.1, eps=1e-3),
    Lion(0.01, weight_decay=0.1),
]


@pytest.mark.parametrize("estimator", TRAJECTORIES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_maximize_is_obeyed(rule: Any, estimator: Any) -> None:
    """Ascent on f is descent on −f."""

    def inner(w: Any, h: Any) -> Tensor:
        return torch.sin(w * h["h"]) + h["h"] * w**2

    up = one_weight(0.4, inner, h=0.7)
    down = one_weight(0.4, lambda w, h: -inner(w, h), h=0.7)
    ascent = grad(up, estimator(replace(rule, maximize=True), 4))["h"]
    assert torch.equal(ascent, grad(down, estimator(rule, 4))["h"])
    descent = grad(up, estimator(rule, 4))["h"]
    assert type(rule) is Lion or not torch.allclose(ascent, descent, rtol=0.1)


@pytest.mark.parametrize("estimator", [Unrolled, Forward])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_an_entry_that_never_has_a_gradient(rule: Any, estimator: Any) -> None:
    """√v at v = 0 (a dead ReLU): the same hypergradient as without the entry, not NaN."""

    def case(entries: int) -> Case:
        def inner(w: Any, h: Any, batch: Any) -> Tensor:
            return h["h"] * (w["w"][:2] - 1).pow(2).sum() + w["w"][:2].prod()

        problem = Problem(inner, lambda w, h, batch: w["w"][:2].pow(3).sum())
        w = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)[:entries]
        return Case(problem, {"w": w.requires_grad_()}, {"h": scalar(0.8)}, None, None)

    found, expected = (grad(case(n), estimator(rule, 5))["h"] for n in (3, 2))
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=0.0)


@pytest.mark.parametrize("estimator", [Unrolled, Forward])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_parameter_that_the_loss_does_not_use(rule: Any, estimator: Any) -> None:
    """It has a zero gradient, and stays, but for its decay."""
    case = CASES["ridge"]()
    spare = torch.ones(2, dtype=torch.float64, requires_grad=True)
    wider = Case(
        case.problem, {**case.params, "spare": spare}, case.hparams, case.inner, case.outer
    )
    run: Any = estimator(rule, 3)
    start = run.init(wider.problem, wider.params, wider.hparams)
    found, _ = run(wider.problem, wider.params, wider.hparams, wider.inner, wider.outer, start)
    expected = grad(case, estimator(rule, 3))["log_wd"]
    torch.testing.assert_close(found.grad["log_wd"], expected, rtol=1e-12, atol=1e-15)
    decay = rule.weight_decay if type(rule) in (AdamW, Lion) else 0.0
    kept = spare.detach() * (1 - rule.lr * decay) ** 3
    torch.testing.assert_close(found.params["spare"].detach(), kept)


def test_heavy_ball_is_not_solved_as_if_it_were_symmetric() -> None:
    """CG gets the Hessian at w*, whatever trains w; a long momentum run has the same derivative.

    CG on the fixed-point map of momentum, which is not symmetric, is wrong by factors.
    """
    case = CASES["ridge"]()
    assert case.minimize is not None
    assert case.hypergradient is not None
    exact = case.hypergradient(case.hparams)
    solved = Case(case.problem, case.minimize(case.hparams), case.hparams, case.inner, case.outer)
    assert error(grad(solved, Implicit(CG(rtol=1e-12))), exact) < 1e-10
    assert error(grad(solved, Unrolled(SGD(0.3, 0.8), 400)), exact) < 1e-10
