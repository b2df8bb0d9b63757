"""Descent: one outer step against the formula, its settings, divergence and retreat."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Budget, Descent, Grad, ProblemInner, RunStatus, Space, Until, tune
from bilevel.outer_optimizer import optimizer_step
from hypergrad import CG, SGD, Direct, Hyper, Implicit, Problem, Unrolled
from tests.bilevel.problems import RIDGE, RULE, TRAIN, ridge_options, solution, validation_loss


def ridge(**changes: Any) -> ProblemInner:
    options = ridge_options(**changes)
    return ProblemInner(RIDGE, options.pop("params"), **options)


def test_one_step_is_gradient_descent_in_the_unconstrained_coordinate() -> None:
    """At the inner solution: z ← z − lr · dF(w*(c(z)))/dz, here by central differences."""
    inner = ridge(params={"w": solution(1.0).requires_grad_()})
    algorithm = Descent(Implicit(Direct()), torch.optim.SGD, lr=0.5, inner_steps=0)
    state = algorithm.init(inner)
    report, after = algorithm.step(inner, state)

    def outer(z: float) -> float:
        h = inner.space.constrain({"penalty": torch.tensor(z, dtype=torch.float64)})
        return validation_loss(h["penalty"])

    z, eps = float(state["z"]["penalty"]), 1e-6
    slope = (outer(z + eps) - outer(z - eps)) / (2 * eps)
    assert report.loss == pytest.approx(validation_loss(1.0), rel=1e-12)
    assert report.grad_norms["penalty"] == pytest.approx(abs(slope), rel=1e-6)
    assert float(after["z"]["penalty"]) == pytest.approx(z - 0.5 * slope, rel=1e-6)
    moved = inner.space.constrain(after["z"])["penalty"]
    assert torch.equal(inner.hparams["penalty"], moved)
    assert float(report.hparams["penalty"]) == pytest.approx(1.0)


def test_a_step_leaves_the_old_state_valid() -> None:
    inner, algorithm = ridge(), Descent(Implicit(CG()), inner_steps=2)
    _, state = algorithm.step(inner, algorithm.init(inner))
    saved = inner.state_dict()
    first, _ = algorithm.step(inner, state)
    inner.load_state_dict(saved)
    second, _ = algorithm.step(inner, state)
    assert first == second


def test_until_solves_the_inner_level() -> None:
    inner = ridge()
    done = Until(grad_norm=1e-10, check_every=3).train(inner)
    assert done.solved
    assert done.cost.gradients > done.cost.steps > 0
    assert torch.allclose(inner.params["w"], solution(1.0), atol=1e-9)
    again = Until(grad_norm=1e-10).train(inner)
    assert (again.cost.steps, again.cost.gradients) == (0, 1)
    short = Until(grad_norm=1e-10, max_steps=2).train(ridge())
    assert (short.solved, short.cost.steps) == (False, 2)


def test_an_unsolved_inner_level_has_not_converged() -> None:
    algorithm = Descent(inner_steps=Until(grad_norm=1e-12, max_steps=1), tolerance=1e9)
    found = tune(RIDGE, algorithm, Budget(outer_steps=2), **ridge_options())
    assert found.status is RunStatus.MAX_ITER
    assert all(float(record["inner_grad_norm"] or 0) > 1e-12 for record in found.trace)


def test_restart_trains_from_the_initial_weights_each_time() -> None:
    """Then every outer step sees w after 3 steps from 0 at its own penalty."""
    algorithm = Descent(Unrolled(RULE, steps=3), lr=0.3, restart=True)
    found = tune(RIDGE, algorithm, Budget(outer_steps=4), **ridge_options())
    for penalty, record in zip(found.schedule["penalty"], found.trace, strict=False):
        inner = ridge(hparams={"penalty": penalty})
        for _ in range(3):
            inner.step()
        assert record["outer_loss"] == pytest.approx(inner.evaluate("val")["loss"], rel=1e-12)


def test_an_unrolled_estimator_trains_as_plain_steps_do() -> None:
    """At learning rate 0 for the hyperparameters, weights and momentum are those of training."""
    tuned = tune(RIDGE, Descent(Unrolled(steps=3), lr=0.0), 12, **ridge_options())
    inner = ridge()
    for _ in range(12):
        inner.step()
    assert torch.equal(tuned.params["w"], inner.params["w"])


def test_rates_by_name_and_clipping() -> None:
    inner = ridge(space=Space(penalty=Grad(1.0, low=1e-3), other=Grad([1.0, 2.0], shape=(2,))))
    z = {"penalty": torch.tensor(1.0), "other": torch.zeros(2)}
    grads = {"penalty": torch.tensor(2.0), "other": torch.tensor([3.0, 4.0])}
    moved, _ = optimizer_step(torch.optim.SGD, z, grads, {"penalty": 0.1, "other": 1.0}, None)
    assert moved["penalty"].item() == pytest.approx(0.8)
    assert moved["other"].tolist() == [-3.0, -4.0]
    assert z["penalty"].item() == 1.0

    inner = ridge(params={"w": solution(0.1).requires_grad_()}, hparams={"penalty": 0.1})
    algorithm = Descent(Implicit(Direct()), torch.optim.SGD, lr=1.0, inner_steps=0, clip=0.01)
    state = algorithm.init(inner)
    report, after = algorithm.step(inner, state)
    assert report.grad_norm > 0.01
    move = (after["z"]["penalty"] - state["z"]["penalty"]).abs().item()
    assert move == pytest.approx(0.01, rel=1e-9)


def test_the_outer_optimizer_continues_as_an_object_would() -> None:
    make = partial(torch.optim.Adam, betas=(0.5, 0.9), weight_decay=0.1)
    z = {"a": torch.tensor([1.0, -2.0])}
    kept = z["a"].clone().requires_grad_()
    optimizer = make([kept], lr=0.1)
    state = None
    for t in range(5):
        grad = torch.tensor([0.3, -0.1]) * t - 0.2
        kept.grad = grad.clone()
        optimizer.step()
        z, state = optimizer_step(make, z, {"a": grad}, {"a": 0.1}, state)
    assert torch.equal(z["a"], kept.detach())


def _nan_above(limit: float) -> Problem:
    """Ridge whose inner loss is NaN where the penalty is above a limit."""

    def inner(params: Any, hparams: Mapping[str, Tensor], batch: Any) -> Tensor:
        loss = RIDGE.inner_loss(params, hparams, batch)
        return loss * (math.nan if hparams["penalty"].item() > limit else 1.0)

    return Problem(inner, RIDGE.outer_loss)


def test_a_move_that_breaks_training_is_halved() -> None:
    """The best penalty is 1.63; the first move overshoots the limit of 2 and is taken back."""
    algorithm = Descent(Implicit(CG()), torch.optim.SGD, lr=1.5, inner_steps=20)
    options = ridge_options(hparams={"penalty": 0.5})
    free = tune(RIDGE, algorithm, Budget(outer_steps=2), **options)
    assert free.schedule["penalty"][1] > 2.0
    found = tune(_nan_above(2.0), algorithm, Budget(outer_steps=12), **options)
    assert found.status is RunStatus.MAX_ITER
    retreats = [record["retreats"] for record in found.trace]
    scales = [record["lr_scale"] for record in found.trace]
    assert retreats[1] in (1, 2)
    assert scales[:2] == [1.0, 0.5 ** int(retreats[1])]
    assert found.schedule["penalty"].max() < 2.0
    z = [math.log(v) for v in found.schedule["penalty"][:2]]
    assert z[1] > z[0]
    # Steps of failed attempts count: each failed at its first step.
    assert found.cost.steps == 12 * 20 + sum(map(int, retreats))


def test_divergence_keeps_the_last_good_values_and_says_why() -> None:
    def batch(t: int) -> tuple[Tensor, Tensor]:
        x, y = TRAIN
        return x, y if t < 20 else y * math.nan

    options = ridge_options(inner_batch=batch)
    found = tune(RIDGE, Descent(Implicit(CG(max_iter=2))), 100, **options)
    assert found.status is RunStatus.DIVERGED
    assert found.reason == "inner_loss is nan at step 0; expected a finite number. (tried 3 times)"
    # An outer step draws one batch to train and one for the Hessian.
    assert len(found.trace) == 10
    assert found.cost.steps == 10 + 3
    assert torch.equal(found.hparams["penalty"], torch.tensor(found.schedule["penalty"][-1]))
    assert found.schedule["penalty"][-1] == found.schedule["penalty"][-2]
    again = ridge()
    for _ in found.schedule.replay(again, 10):
        pass
    assert torch.equal(found.params["w"], again.params["w"])


def test_divergence_before_any_move_is_the_end() -> None:
    found = tune(_nan_above(0.5), Descent(), 20, **ridge_options())
    assert (found.status, found.trace) == (RunStatus.DIVERGED, [])
    assert torch.equal(found.params["w"], torch.zeros(8, dtype=torch.float64))
    assert float(found.hparams["penalty"]) == pytest.approx(1.0)


def test_a_validation_loss_that_is_not_finite_diverges() -> None:
    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        value = RIDGE.outer_loss(params, hparams, batch)
        return value if torch.is_grad_enabled() else value * math.inf

    problem = Problem(RIDGE.inner_loss, outer)
    found = tune(problem, Descent(), 20, evaluate_every=1, **ridge_options())
    assert found.status is RunStatus.DIVERGED
    assert "loss on 'val' is inf" in found.reason


def test_an_estimator_with_another_rule_than_the_inner_level_is_refused() -> None:
    with pytest.raises(ValueError, match="leave the estimator's optimizer out"):
        Descent(Unrolled(SGD(lr=0.7), steps=2)).init(ridge())


def test_a_learning_rate_has_no_implicit_hypergradient() -> None:
    options = ridge_options(
        space=Space(penalty=Grad(1.0, low=0.0), rate=Grad(0.1, low=0.0)),
        optimizer=SGD(lr=Hyper("rate")),
    )
    with pytest.raises(ValueError, match=r"hparams\['rate'\].*needs Unrolled"):
        tune(RIDGE, Descent(Implicit()), 20, **options)


def test_a_space_without_gradient_owned_values_is_refused() -> None:
    inner = ridge(space=Space(penalty=Grad(1.0, low=0.1, high=2.0)))
    inner._space = inner.space.own(penalty="sampler")
    with pytest.raises(ValueError, match="nothing to tune"):
        Descent().init(inner)


@pytest.mark.parametrize(
    "settings",
    [{"lr": -1.0}, {"lr": math.nan}, {"lr": {"a": -1.0}}, {"inner_steps": -1}, {"warmup": -1},
     {"clip": 0.0}, {"tolerance": -1.0}],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Descent: {next(iter(settings))}"):
        Descent(**settings)


@pytest.mark.parametrize("settings", [{"grad_norm": 0.0}, {"max_steps": 0}, {"check_every": 0}])
def test_bad_until(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Until: {next(iter(settings))}"):
        Until(**{"grad_norm": 1e-3, **settings})


def test_an_estimator_is_needed() -> None:
    with pytest.raises(TypeError, match=r"Descent: estimator must be .* but got 'implicit'"):
        Descent("implicit")  # type: ignore[arg-type]
