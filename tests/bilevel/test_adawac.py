"""AdaWAC: the mirror step in its equivalent forms, regret, the saddle point, and resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bilevel.adawac import (
    SaddleWeights,
    best_response,
    labeled,
    mixed,
    saddle_value,
    suggested_scale,
    trimmed,
)

D = torch.float64


def weights(n: int = 4, **options: float) -> SaddleWeights:
    return SaddleWeights(n, clamp=None, **options)  # type: ignore[arg-type]


@given(st.floats(0.05, 0.95), st.floats(-3, 3), st.floats(0.01, 5))
def test_logit_ratio_and_prox_forms_agree(init: float, delta: float, step: float) -> None:
    w = weights(1, init=init, step=step)
    w(torch.tensor([0]), torch.tensor([delta], dtype=D), torch.zeros(1, dtype=D))
    beta = float(w.beta())
    grown = init * math.exp(step * delta)
    assert beta == pytest.approx(grown / (grown + 1 - init), abs=1e-12)

    # The maximum of b δ − KL(b ‖ init)/η: its derivative is zero there, and it is concave.
    slope = delta - (math.log(beta / (1 - beta)) - math.log(init / (1 - init))) / step
    assert slope == pytest.approx(0.0, abs=1e-7)
    mirrored = weights(1, init=1 - init, step=step)
    mirrored(torch.tensor([0]), torch.zeros(1, dtype=D), torch.tensor([delta], dtype=D))
    assert float(mirrored.beta()) == pytest.approx(1 - beta, abs=1e-12)


def test_steps_telescope_and_others_do_not_move() -> None:
    generator = torch.Generator().manual_seed(0)
    w, total = weights(6, step=0.7), torch.zeros(6, dtype=D)
    for _ in range(20):
        index = torch.randint(5, (4,), generator=generator)  # sample 5 is never seen; with repeats
        ce, ac = (torch.rand(4, generator=generator, dtype=D) for _ in range(2))
        w(index, ce, ac)
        total.index_add_(0, index, 0.7 * (ce - ac))
    assert torch.allclose(w.logits, total, atol=1e-12)
    assert float(w.beta()[5]) == 0.5
    assert w.visits.tolist()[5] == 0
    assert int(w.visits.sum()) == 80


def test_regret_with_updated_weights_is_at_most_ln_2_over_the_step() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        deltas = 4 * torch.rand(200, generator=generator, dtype=D) - 2 + 0.1 * seed
        step, w, played = 0.6, weights(1, step=0.6), []
        for delta in deltas:
            w(torch.tensor([0]), delta[None], torch.zeros(1, dtype=D))
            played.append(float(w.beta()))
        beta = torch.tensor(played, dtype=D)
        for comparator in (0.0, 1.0):
            assert float(((comparator - beta) * deltas).sum()) <= math.log(2) / step + 1e-9


def test_the_gradient_passes_through_the_losses_alone() -> None:
    theta = torch.tensor([0.3, -0.2], dtype=D, requires_grad=True)
    w = weights(2, step=0.5)
    ce, ac = (theta - 1).square(), 2 * theta.square()
    loss = w(torch.tensor([0, 1]), ce, ac)
    (grad,) = torch.autograd.grad(loss, theta)
    beta = w.beta()
    expected = 0.5 * (beta * 2 * (theta - 1) + (1 - beta) * 4 * theta).detach()
    assert torch.allclose(grad, expected, atol=1e-14)
    assert not w.logits.requires_grad


def test_the_saddle_point_of_a_toy() -> None:
    """CE = (θ − 1)², AC = θ²: θ* = ½, P = ¼, β* = ½, by averaged iterates."""
    theta, w = torch.tensor([0.9], dtype=D, requires_grad=True), weights(1, step=0.05)
    thetas, betas = [], []
    for _ in range(4000):
        loss = w(torch.tensor([0]), (theta - 1).square(), theta.square())
        (grad,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            theta -= 0.02 * grad
        thetas.append(float(theta.detach()))
        betas.append(float(w.beta()))
    mean = torch.tensor(sum(thetas) / 4000, dtype=D)
    assert float(mean) == pytest.approx(0.5, abs=0.02)
    assert sum(betas) / 4000 == pytest.approx(0.5, abs=0.02)
    value = saddle_value((mean - 1).square()[None], mean.square()[None])
    assert float(value) == pytest.approx(0.25, abs=0.02)


def test_the_inner_maximum_in_closed_form() -> None:
    ce, ac = torch.tensor([1.0, 2.0, 3.0], dtype=D), torch.tensor([2.0, 2.0, 1.0], dtype=D)
    assert best_response(ce, ac).tolist() == [0.0, 0.5, 1.0]
    assert float(mixed(best_response(ce, ac), ce, ac)) == float(saddle_value(ce, ac))
    assert float(saddle_value(ce, ac)) == pytest.approx(7 / 3)
    limit = weights(3, step=1e3)
    limit(torch.arange(3), ce.double(), ac.double())
    assert torch.allclose(limit.beta(), best_response(ce, ac).double())
    still = weights(3, step=0.0)
    still(torch.arange(3), ce.double(), ac.double())
    assert still.beta().tolist() == [0.5, 0.5, 0.5]


def test_no_overflow_where_the_ratio_form_is_nan() -> None:
    w = SaddleWeights(1, step=8.0, clamp=6.0)
    for _ in range(5):
        loss = w(torch.tensor([0]), torch.tensor([12.0]), torch.tensor([0.0]))
    assert torch.isfinite(loss)
    assert float(w.logits) == 6.0
    w(torch.tensor([0]), torch.tensor([0.0]), torch.tensor([12.0]))
    assert float(w.logits) == -6.0, "from the clamp it comes back"
    assert w.summary().clamped == 1.0


def test_burn_in_state_and_merging() -> None:
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randperm(6, generator=generator)[:3]
        return index, *(torch.rand(3, generator=generator) for _ in range(2))

    one = SaddleWeights(6, burn_in=2)
    for _ in range(2):
        one(*batch())
    assert not one.logits.any()
    assert int(one.visits.sum()) == 6
    one(*batch())
    assert one.logits.any()
    two = SaddleWeights(6, burn_in=2)
    two.load_state_dict(one.state_dict())
    for _ in range(10):
        given = batch()
        assert torch.equal(one(*given), two(*given))
    assert torch.equal(one.logits, two.logits)
    here, there, both = (weights(6) for _ in range(3))
    for w in (here, there):
        given = tuple(t.double() if t.is_floating_point() else t for t in batch())
        w(*given), both(*given)
    here.add(there.logits)
    assert torch.allclose(here.logits, both.logits)


def test_baselines_and_the_scale() -> None:
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0])
    assert float(trimmed(losses, 0.5)) == 3.5
    assert float(trimmed(losses, 0.0)) == 2.5
    assert float(labeled(losses, torch.tensor([True, False, True, False]))) == 1.5
    broken = torch.tensor([1.0, torch.nan, 2.0, torch.inf], requires_grad=True)
    kept = labeled(broken, torch.tensor([True, False, True, False]))
    assert float(kept.detach()) == 1.5, "losses outside the mask have no part in it"
    (grad,) = torch.autograd.grad(kept, broken)
    assert grad.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert float(trimmed(losses, 0.99)) == 4.0, "one sample is always kept"
    scale = suggested_scale(losses, torch.full((4,), 0.5))
    assert 1.0 < 0.5 * scale < 4.0


INDEX, ONES = torch.arange(3), torch.ones(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: SaddleWeights(0), ValueError, "n must be at least 1"),
        (lambda: SaddleWeights(3, step=-1.0), ValueError, "step must be finite"),
        (lambda: SaddleWeights(3, init=1.0), ValueError, "init must lie in"),
        (lambda: SaddleWeights(3, init=0.999, clamp=6.0), ValueError, "clamp must exceed"),
        (lambda: SaddleWeights(3, burn_in=-1), ValueError, "burn_in"),
        (lambda: SaddleWeights(3)(INDEX, ONES.mean(), ONES), ValueError, "reduction='none'"),
        (lambda: SaddleWeights(3)(INDEX, ONES, ONES[:2]), ValueError, "consistency must hold"),
        (
            lambda: SaddleWeights(3)(INDEX.float(), ONES, ONES),
            TypeError,
            "index must be an int64 tensor",
        ),
        (lambda: SaddleWeights(3)(None, ONES, ONES), TypeError, "but got NoneType"),
        (lambda: SaddleWeights(3)(INDEX - 1, ONES, ONES), ValueError, "got -1 ... 1"),
        (lambda: SaddleWeights(3)(INDEX[:2], ONES, ONES), ValueError, "each of .2,. samples"),
        (lambda: SaddleWeights(3).beta(INDEX + 1), ValueError, "got 1 ... 3"),
        (lambda: SaddleWeights(2)(INDEX, ONES, ONES), ValueError, "0 ... 1, but got 0 ... 2"),
        (
            lambda: SaddleWeights(3)(INDEX, ONES.log() / 0, ONES),
            FloatingPointError,
            r"supervised is not finite for samples \[0, 1, 2\]",
        ),
        (lambda: SaddleWeights(3).add(torch.ones(2)), ValueError, "increments must have shape"),
        (lambda: trimmed(ONES, 1.0), ValueError, "ratio must lie in"),
        (lambda: trimmed(ONES.mean(), 0.5), ValueError, "one loss a sample"),
        (lambda: trimmed(ONES[:0], 0.5), ValueError, "one loss a sample"),
        (lambda: trimmed(ONES.log() / 0, 0.5), FloatingPointError, r"places \[0, 1, 2\]"),
        (lambda: labeled(ONES, ONES), TypeError, "mask must be bool"),
        (lambda: labeled(ONES, ONES[:2] > 0), ValueError, "mask must have shape"),
        (lambda: labeled(ONES, ONES > 1), ValueError, "weights sum to zero"),
        (lambda: labeled(ONES / 0, ONES > 0), FloatingPointError, "not finite"),
        (lambda: labeled(ONES.mean(), ONES.mean() > 0), ValueError, "one loss a sample"),
        (lambda: saddle_value(ONES, ONES.mean()), ValueError, "consistency must hold"),
        (lambda: best_response(ONES, ONES / 0), FloatingPointError, "consistency is not finite"),
        (lambda: suggested_scale(ONES, torch.zeros(3)), ValueError, "collapsed"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_a_bad_batch_moves_nothing() -> None:
    w = SaddleWeights(3)
    w(INDEX, 2 * ONES, ONES)
    before = {k: v.clone() for k, v in w.state_dict().items()}
    with pytest.raises(FloatingPointError, match=r"samples \[1\]"):
        w(INDEX, torch.tensor([1.0, torch.nan, 1.0]), ONES)
    assert all(torch.equal(before[k], v) for k, v in w.state_dict().items())


def test_a_state_of_another_data_set_is_refused_and_nothing_moves() -> None:
    w, other = SaddleWeights(3), nn.ModuleDict({"weights": SaddleWeights(4)})
    w(INDEX, 2 * ONES, ONES)
    saved = {f"weights.{k}": v for k, v in w.state_dict().items()}
    with pytest.raises(ValueError, match="of 3 samples, but the data set has 4"):
        other.load_state_dict(saved)
    assert not any(v.any() for v in other.state_dict().values())
    same = copy.deepcopy(SaddleWeights(3))
    with pytest.raises(ValueError, match="not finite"):
        same.load_state_dict({**w.state_dict(), "logits": torch.full((3,), torch.nan, dtype=D)})
    with pytest.raises(RuntimeError, match="Missing key"):
        same.load_state_dict({})
    same.load_state_dict(w.state_dict())
    assert torch.equal(same.logits, w.logits)


def test_restored_under_another_order_of_batches() -> None:
    """Weights go by index: one epoch in any order moves each sample alike."""
    ce, ac = torch.rand(2, 12, generator=torch.Generator().manual_seed(3), dtype=D)
    one, two = weights(12), weights(12)
    one(torch.arange(12), ce, ac)
    two.load_state_dict(one.state_dict())
    for w, order in ((one, torch.arange(12)), (two, torch.arange(12).flip(0))):
        for index in order.split(5):
            w(index, ce[index], ac[index])
    assert torch.equal(one.logits, two.logits)


def test_an_index_that_occurs_twice_takes_both_steps() -> None:
    w = SaddleWeights(3, step=0.5)
    loss = w(torch.tensor([1, 1, 0]), torch.tensor([2.0, 3.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert w.logits.tolist() == [0.0, 1.5, 0.0]
    assert w.visits.tolist() == [1, 2, 0]
    beta = torch.sigmoid(torch.tensor(1.5))
    expected = (beta * 2 + (1 - beta) + beta * 3 + (1 - beta)) / 3
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)


def test_the_new_weight_grows_with_the_difference_and_beats_a_grid() -> None:
    deltas = torch.linspace(-4, 4, 81, dtype=D)
    w = weights(81, init=0.3, step=0.8)
    w(torch.arange(81), deltas, torch.zeros(81, dtype=D))
    assert (w.beta().diff() > 0).all()
    grid = torch.linspace(1e-4, 1 - 1e-4, 20_001, dtype=D)
    kl = grid * (grid / 0.3).log() + (1 - grid) * ((1 - grid) / 0.7).log()
    for k in (0, 33, 60, 80):
        best = grid[(grid * deltas[k] - kl / 0.8).argmax()]
        assert float(w.beta()[k]) == pytest.approx(float(best), abs=1e-4)


def test_regret_with_the_weights_before_the_step() -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        deltas = 3 * torch.rand(300, generator=generator, dtype=D) - 1.5
        step, w, played = 0.3, weights(1, step=0.3), []
        for delta in deltas:
            played.append(float(w.beta()))
            w(torch.tensor([0]), delta[None], torch.zeros(1, dtype=D))
        beta = torch.tensor(played, dtype=D)
        bound = math.log(2) / step + step / 8 * float(deltas.square().sum())
        for comparator in (0.0, 1.0):
            assert float(((comparator - beta) * deltas).sum()) <= bound + 1e-9


def test_the_gap_of_a_convex_saddle_closes() -> None:
    """P(mean θ) − min_θ L(θ, mean β) ≥ 0 falls with T; both sides quadratic, so exact."""
    generator = torch.Generator().manual_seed(0)
    a, c = (torch.randn(12, 2, generator=generator, dtype=D) for _ in range(2))
    b, d = (torch.randn(12, generator=generator, dtype=D) for _ in range(2))

    def losses(theta: Tensor) -> tuple[Tensor, Tensor]:
        return (a @ theta - b).square(), 0.5 * (c @ theta - d).square()

    gaps = []
    for steps in (50, 400, 3200):
        w, theta = weights(12, step=2 / math.sqrt(steps)), torch.zeros(2, dtype=D)
        thetas, betas = torch.zeros(2, dtype=D), torch.zeros(12, dtype=D)
        for _ in range(steps):
            theta.requires_grad_()
            (grad,) = torch.autograd.grad(w(torch.arange(12), *losses(theta)), theta)
            theta = theta.detach() - grad / math.sqrt(steps)
            thetas += theta / steps
            betas += w.beta() / steps
        rows = torch.cat([betas.sqrt()[:, None] * a, ((1 - betas) / 2).sqrt()[:, None] * c])
        right = torch.cat([betas.sqrt() * b, ((1 - betas) / 2).sqrt() * d])
        best = torch.linalg.lstsq(rows, right[:, None]).solution[:, 0]
        gaps.append(float(saddle_value(*losses(thetas)) - mixed(betas, *losses(best))))
    assert gaps[0] > gaps[1] > gaps[2] >= 0
    assert gaps[2] < gaps[0] / 4  # the rate 1/√T alone gives an eighth
