"""PZOBO: exact with a basis of directions; unbiased, in the smoothed sense, with random ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import PZOBO, SGD, Adam, Hyper, Hypergradient, Problem, Unrolled
from tests.hypergrad import quadratic as q
from tests.hypergrad.problems import CASES, _dropout, module, ridge
from tests.hypergrad.test_implicit import estimate, flat

RULE = SGD(lr=0.3, momentum=0.5)


def on_quadratic(method: Any, state: Any = None) -> tuple[Hypergradient, Any]:
    params, hparams = q.start(), q.at(q.H)
    state = method.init(q.PROBLEM, params, hparams) if state is None else state
    return method(q.PROBLEM, params, hparams, None, None, state)


EXACT = on_quadratic(Unrolled(RULE, steps=2))[0].grad["h"]
INDIRECT = EXACT - q.RHO * q.H


@pytest.mark.parametrize("smoothing", [1e-2, 10.0])
def test_orthogonal_basis_is_exact_for_a_linear_response(smoothing: float) -> None:
    method = PZOBO(RULE, steps=2, directions=3, smoothing=smoothing, orthogonal=True)
    found, _ = on_quadratic(method)
    assert torch.allclose(found.grad["h"], EXACT, rtol=1e-11)
    assert found.n_grad == 2 * 4 + 2


def test_gaussian_mean_and_covariance_for_a_linear_response() -> None:
    """N estimates of one direction each: covariance ‖g‖²I + ggᵀ.  Tolerance: five deviations."""
    n, method = 800, PZOBO(RULE, steps=2, directions=1)
    samples, state = [], None
    for _ in range(n):
        found, state = on_quadratic(method, state)
        samples.append(found.grad["h"] - q.RHO * q.H)
        state = {**state, "optimizer": None}
    estimates = torch.stack(samples)
    covariance = INDIRECT @ INDIRECT * torch.eye(3) + torch.outer(INDIRECT, INDIRECT)
    error = (estimates.mean(0) - INDIRECT) / (covariance.diagonal() / n).sqrt()
    assert float(error.abs().max()) < 5
    assert torch.allclose(estimates.T.cov(), covariance, atol=0.25 * float(covariance.max()))


@pytest.mark.parametrize(("orthogonal", "variance"), [(False, (3 + 1) / 2), (True, (3 - 2) / 2)])
def test_relative_variance_of_two_directions(orthogonal: bool, variance: float) -> None:
    """E‖ĝ − g‖²/‖g‖² is (p + 1)/Q with Gaussian and (p − Q)/Q with orthogonal directions."""
    method, state = PZOBO(RULE, steps=2, directions=2, orthogonal=orthogonal), None
    errors = []
    for _ in range(400):
        found, state = on_quadratic(method, state)
        state = {**state, "optimizer": None}
        errors.append((found.grad["h"] - EXACT).square().sum())
    scatter = torch.stack(errors) / INDIRECT.square().sum()
    deviation = float(scatter.std()) / 400**0.5
    assert abs(float(scatter.mean()) - variance) < 5 * deviation
    assert 5 * deviation < variance / 2  # the test can tell the formulas apart


def test_smoothed_response() -> None:
    """w₁ = η sin(h): the mean is the derivative of the smoothed sine, e^(−μ²/2) cos(h), not cos."""
    h, rate, mu = torch.tensor([0.3], dtype=torch.float64, requires_grad=True), 0.5, 1.0
    problem = Problem(lambda p, h, b: -(h["h"].sin() * p["w"]).sum(), lambda p, h, b: p["w"].sum())
    params = {"w": torch.zeros(1, dtype=torch.float64, requires_grad=True)}
    method = PZOBO(SGD(rate), steps=1, directions=100, smoothing=mu)
    state, means = method.init(problem, params, {"h": h}), []
    for _ in range(40):
        found, state = method(problem, params, {"h": h}, None, None, state)
        means.append(found.grad["h"])
    batch_means = torch.cat(means)
    expected = rate * torch.exp(torch.tensor(-(mu**2) / 2)) * h.detach().cos()
    deviation = float(batch_means.std()) / 40**0.5
    assert abs(float(batch_means.mean() - expected)) < 5 * deviation
    assert float(rate * h.detach().cos() - expected) > 15 * deviation  # the plain derivative is far


@pytest.mark.parametrize("name", ["ridge", "mlp", "tied_and_frozen"])
def test_orthogonal_basis_tends_to_the_unrolled_gradient(name: str) -> None:
    """A forward difference: the error is O(μ)."""
    case = CASES[name]()
    exact = flat(estimate(Unrolled(Adam(0.05), steps=2), case).grad)
    size = exact.numel()
    errors = []
    for smoothing in (1e-3, 1e-4):
        method = PZOBO(Adam(0.05), 2, size, smoothing, orthogonal=True)
        errors.append(float((flat(estimate(method, case).grad) - exact).norm() / exact.norm()))
    assert errors[1] < 1e-3
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)


def test_all_trajectories_share_dropout_masks() -> None:
    """With other masks the differences are noise of size 1/μ."""
    case = module(_dropout, seeded=False)
    size = sum(h.numel() for h in case.hparams.values())
    found = []
    for method in (PZOBO(RULE, 2, size, 1e-6, True), Unrolled(RULE, 2)):
        torch.manual_seed(3)
        found.append((flat(estimate(method, case).grad), torch.rand(1)))
    assert float((found[0][0] - found[1][0]).norm() / found[1][0].norm()) < 1e-4
    assert torch.equal(found[0][1], found[1][1])  # the same number of draws


def test_learning_rate_and_outer_only_hyperparameters() -> None:
    """What enters the optimizer alone is perturbed; what enters the outer loss alone is not."""
    case = ridge()
    outer = case.problem.outer_loss
    problem = Problem(
        lambda p, h, b: 0.5 * (b["x"] @ p["w"] - b["y"]).pow(2).mean(),
        lambda p, h, b: outer(p, h, b) + 2 * h["direct"],
    )
    hparams = {
        key: torch.tensor(0.1, dtype=torch.float64, requires_grad=True) for key in ("lr", "direct")
    }
    case = replace(case, problem=problem, hparams=hparams)
    rule = SGD(lr=Hyper("lr"))
    found = estimate(PZOBO(rule, 3, 1, 1e-6, orthogonal=True), case).grad
    exact = estimate(Unrolled(rule, 3), case).grad
    assert found["lr"].item() == pytest.approx(exact["lr"].item(), rel=1e-4)
    assert found["direct"].item() == 2.0
    still = estimate(PZOBO(SGD(0.1), 3, 1), replace(case, hparams={"direct": hparams["direct"]}))
    assert still.n_grad == 3 + 2


def test_seed_decides_the_directions() -> None:
    def run(seed: int) -> Tensor:
        return on_quadratic(PZOBO(RULE, steps=2, directions=2, seed=seed))[0].grad["h"]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    method = PZOBO(RULE, steps=2, directions=2)
    first, state = on_quadratic(method)
    second, _ = on_quadratic(method, {**state, "optimizer": None})
    assert not torch.equal(first.grad["h"], second.grad["h"])


def test_global_generator_takes_no_part() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    on_quadratic(PZOBO(RULE, steps=2, directions=2))
    assert torch.equal(torch.get_rng_state(), before)


def test_too_many_orthogonal_directions() -> None:
    with pytest.raises(ValueError, match=r"only 3 orthogonal directions .* directions=4"):
        on_quadratic(PZOBO(RULE, steps=2, directions=4, orthogonal=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"directions": 0}, "directions must be an integer of at least 1, but got 0"),
        ({"directions": 2.5}, "directions must be an integer of at least 1, but got 2.5"),
        ({"smoothing": 0.0}, "smoothing must be positive, but got 0.0"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PZOBO(RULE, steps=2, **settings)
