"""The diagnostic of Adam's eps: closed form on a known gradient, and what it predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hypergrad import (
    SGD,
    Adam,
    AdamW,
    Hyper,
    Problem,
    Unrolled,
    adam_conditioning,
    train,
)

SLOPES = {"a": torch.tensor([1.0, 1e-6, 0.0, -1e-4]), "b": torch.tensor([1e-3])}


def linear(dtype: torch.dtype, **hparams: float) -> tuple[Problem, Any, Any]:
    """A loss with gradient SLOPES everywhere."""
    problem = Problem(
        lambda w, h, b: sum((SLOPES[k].to(dtype) * w[k]).sum() for k in SLOPES) * h["s"],  # type: ignore[arg-type, return-value]
        lambda w, h, b: w["a"].sum(),
    )
    params = {k: torch.zeros(v.shape, dtype=dtype, requires_grad=True) for k, v in SLOPES.items()}
    h = {
        k: torch.tensor(v, dtype=dtype, requires_grad=True)
        for k, v in {"s": 1.0, **hparams}.items()
    }
    return problem, params, h


@pytest.mark.parametrize("rule", [Adam(0.1), AdamW(0.1, amsgrad=True), Adam(0.1, (0.5, 0.7))])
@pytest.mark.parametrize("taken", [0, 3])
def test_closed_form(rule: Adam, taken: int) -> None:
    """At a constant gradient √v̂ = |g| at every step: 1e-6 < 1000ε = 1e-5 of four entries."""
    problem, params, h = linear(torch.float32)
    state = None
    if taken:
        last = train(problem, params, h, rule, None, taken)
        params, state = last.params, last.optimizer_state
    found = adam_conditioning(rule, problem, params, h, None, state)
    unit = 2.0**-24
    assert found.small == {"params['a']": 0.25, "params['b']": 0.0}
    assert found.share == pytest.approx(0.2)
    assert found.rounding["params['a']"] == pytest.approx(unit / (1e-6 + 1e-8), rel=1e-3)
    assert found.rounding["params['b']"] == pytest.approx(unit, rel=1e-3)
    assert found.advised_eps == pytest.approx(1e3 * unit, rel=1e-3)
    assert not found.passed
    assert "use eps >= 6e-05 or float64 params" in str(found)
    assert adam_conditioning(Adam(0.1, eps=found.advised_eps), problem, params, h, None).passed


def test_float64_and_a_tuned_eps() -> None:
    problem, params, h = linear(torch.float64, eps=1e-8)
    found = adam_conditioning(Adam(0.1, eps=Hyper("eps")), problem, params, h, lambda t: None)
    assert found.small["params['a']"] == 0.25
    assert found.worst == pytest.approx(2.0**-53 / (1e-6 + 1e-8))
    assert "passed: " in str(found)


def test_predicts_the_error_of_float32() -> None:
    """∇f = (1, h − c) with h ≈ c: after one step dF/dh = −ε/(|h − c| + ε)², if c − h = 3e-7."""

    def run(at: float, eps: float, dtype: torch.dtype) -> tuple[float, float]:
        def inner(w: Any, h: Any, batch: Any) -> torch.Tensor:
            return w["w"][0] + h["h"] * w["w"][1] - (at + 3e-7) * w["w"][1]

        problem = Problem(inner, lambda w, h, batch: w["w"].sum())
        params = {"w": torch.zeros(2, dtype=dtype, requires_grad=True)}
        h = {"h": torch.tensor(at, dtype=dtype, requires_grad=True)}
        rule = Adam(1.0, eps=eps)
        estimator: Any = Unrolled(rule, 1)
        found, _ = estimator(problem, params, h, None, None, estimator.init(problem, params, h))
        return found.grad["h"].item(), adam_conditioning(rule, problem, params, h, None).worst

    for eps in (1e-8, 1e-6, 1e-4):
        exact = -eps / (3e-7 + eps) ** 2
        points = [0.6 + 0.013 * i for i in range(12)]
        errors, estimates = zip(*(run(at, eps, torch.float32) for at in points), strict=True)
        miss = max(abs(found / exact - 1) for found in errors)
        assert miss / 10 < sum(estimates) / 12 < 10 * miss
        found, estimate = run(0.7, eps, torch.float64)
        assert found == pytest.approx(exact, rel=1e-6)
        assert estimate < 1e-8


def test_other_optimizers_are_refused() -> None:
    problem, params, h = linear(torch.float32)
    with pytest.raises(TypeError, match="takes a hypergrad Adam or AdamW, but got SGD"):
        adam_conditioning(SGD(0.1), problem, params, h, None)  # type: ignore[arg-type]
