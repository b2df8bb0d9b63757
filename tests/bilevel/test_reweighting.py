"""Loss-based weights: exact properties, distributed batches, and the regression study."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bilevel.reweighting import (
    LearnedWeights,
    Reweighter,
    Temperature,
    sequence_losses,
)

D = torch.float64
STRATEGIES = ["linupper", "upper", "quadratic", "extremes", "uniform"]
losses_strategy = st.lists(st.floats(0, 20), min_size=2, max_size=9)


def make(strategy: str, r: float = 0.7, **options: object) -> Reweighter:
    return Reweighter(strategy, r, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(values=losses_strategy, a=st.floats(0.1, 10), b=st.floats(-5, 5))
def test_simplex_invariance_and_equivariance(
    strategy: str, values: list[float], a: float, b: float
) -> None:
    f = torch.tensor(values, dtype=D)
    if float(f.max() - f.min()) < 1e-3:
        return
    rule = make(strategy)
    w = rule.weights(f)
    assert float(w.sum()) == pytest.approx(1.0, abs=1e-12)
    assert (w > 0).all()
    assert torch.allclose(rule.weights(a * f + b), w, atol=1e-9)
    order = torch.randperm(len(f), generator=torch.Generator().manual_seed(len(f)))
    assert torch.allclose(rule.weights(f[order]), w[order], atol=1e-12)
    ratio = float(w.max() / w.min())
    if strategy in ("linupper", "upper"):
        assert ratio == pytest.approx(math.exp(1 / 0.7), rel=1e-9)
        assert float((w * f).sum()) >= float(f.mean()) - 1e-9, "Chebyshev's sum inequality"
    else:
        assert ratio <= math.exp(1 / 0.7) + 1e-9


def test_strategies_at_three_losses() -> None:
    f = torch.tensor([1.0, 2.0, 3.0], dtype=D)  # h = −1, 0, 1
    shapes = {
        "linupper": (0, 1, 1),
        "upper": (0, 0.5, 1),
        "quadratic": (0, 1, 0),
        "extremes": (1, 0, 1),
        "uniform": (0, 0, 0),
    }
    for name, s in shapes.items():
        expected = torch.softmax(torch.tensor(s, dtype=D) / 0.7, dim=0)
        assert torch.allclose(make(name).weights(f), expected, atol=1e-12)
        assert torch.allclose(
            make(name, 1e6).weights(f), torch.full((3,), 1 / 3, dtype=D), atol=1e-5
        )
        assert torch.allclose(make(name).weights(torch.ones(4)), torch.full((4,), 0.25))


def test_the_weights_are_the_optimum_of_the_regularized_program() -> None:
    generator = torch.Generator().manual_seed(0)
    f, r = torch.rand(6, generator=generator, dtype=D), 0.4
    rule = make("linupper", r)
    w = rule.weights(f)
    h = (2 * f - f.max() - f.min()) / (f.max() - f.min())
    s = torch.clamp(h + 1, max=1)

    def value(w: Tensor) -> float:
        return float((w * s).sum() - r * (w * (w * 6).log()).sum())

    best = value(w)
    assert best == pytest.approx(r * math.log(float((s / r).exp().mean())), rel=1e-12)
    for _ in range(50):
        other = torch.softmax(w.log() + 0.1 * torch.randn(6, generator=generator, dtype=D), dim=0)
        assert value(other) <= best + 1e-12


def test_gradients_pass_through_the_losses_alone() -> None:
    theta = torch.randn(5, dtype=D, requires_grad=True)
    losses = theta.square()
    loss, info = make("upper")(losses)
    (grad,) = torch.autograd.grad(loss, theta)
    assert torch.allclose(grad, info.weights * 2 * theta.detach(), atol=1e-12)
    assert not info.weights.requires_grad
    plain, _ = make("uniform")(theta.square())
    assert float(plain.detach()) == pytest.approx(float(theta.detach().square().mean()))


def test_bad_losses_are_dropped_and_never_spread() -> None:
    losses = torch.tensor([1.0, torch.nan, 3.0, torch.inf, 2.0], requires_grad=True)
    mask = torch.tensor([True, True, True, True, False])
    loss, info = make("upper")(losses, mask=mask)
    assert info.dropped == 3
    assert info.weights[[1, 3, 4]].tolist() == [0.0, 0.0, 0.0]
    assert float(info.weights.sum()) == pytest.approx(1.0)
    (grad,) = torch.autograd.grad(loss, losses)
    assert torch.equal(grad, info.weights)
    assert info.unweighted == 2.0


def test_rank_and_cap_tame_an_outlier() -> None:
    f = torch.cat([torch.linspace(1, 2, 31, dtype=D), torch.tensor([50.0], dtype=D)])
    published = make("linupper", 0.4).weights(f)
    assert 8 < float(32 * published.max()) < 10
    assert float(32 * make("linupper", 0.4, norm="rank").weights(f).max()) < 2
    capped = make("linupper", 0.4, cap=2.0).weights(f)
    assert float(32 * capped.max()) == pytest.approx(2.0)
    assert float(capped.sum()) == pytest.approx(1.0)
    rest = published[:-1] / capped[:-1]
    assert torch.allclose(rest, rest[:1].expand(31))
    tied = make("upper", norm="rank").weights(torch.tensor([1.0, 1.0, 2.0]))
    assert float(tied[0]) == float(tied[1])


def test_temperature_schedules() -> None:
    r = Temperature(0.5, start=100.0, burn_in=10, decay=10)
    assert [r.at(t) for t in (0, 9)] == [100.0, 100.0]
    assert [r.at(t) for t in (10, 20, 40)] == [1.0, 0.5, 0.5]
    losses = torch.tensor([1.0, 2.0, 3.0])
    rule = Reweighter("upper", r)
    early, late = (rule(losses, step=t)[1].effective for t in (0, 50))
    assert early == pytest.approx(3.0, abs=1e-3)
    assert late < 2.5


def test_sequences_and_learned_weights() -> None:
    logits, labels = torch.randn(3, 4, 7, dtype=D), torch.randint(7, (3, 4))
    labels[0, 2:] = -100
    labels[2] = -100
    found = sequence_losses(logits, labels)
    one = torch.nn.functional.cross_entropy(logits[0, :2], labels[0, :2])
    assert float(found[0]) == pytest.approx(float(one))
    assert float(found[2]) == 0.0
    theta = torch.zeros(3, dtype=D, requires_grad=True)
    loss = LearnedWeights()(found, theta)
    (grad,) = torch.autograd.grad(loss, theta)
    assert torch.allclose(grad, 0.25 * found / 3)


def _worker(rank: int, port: int, results: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    f = torch.tensor([1.0, 4.0, 2.0, 3.0, 7.0], dtype=D)
    mine = (f[:2] if rank == 0 else f[2:]).requires_grad_()
    loss, info = Reweighter("linupper", 0.4)(mine, group=torch.distributed.group.WORLD)
    (grad,) = torch.autograd.grad(loss, mine)
    torch.save({"weights": info.weights, "grad": grad}, f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_weigh_one_batch(tmp_path: object) -> None:
    """Batches of two and three: the weights and averaged gradients of the whole."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_worker, (port, str(tmp_path)), nprocs=2)
    found = [torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in range(2)]
    f = torch.tensor([1.0, 4.0, 2.0, 3.0, 7.0], dtype=D)
    expected = make("linupper", 0.4).weights(f)
    assert torch.allclose(torch.cat([e["weights"] for e in found]), expected, atol=1e-12)
    averaged = torch.cat([e["grad"] for e in found]) / 2
    assert torch.allclose(averaged, expected, atol=1e-12)


def regression(strategy: str, corrupted: bool, seed: int, steps: int) -> float:
    """Test error on linear regression, four fifths of the rows near-copies of one."""
    g = torch.Generator().manual_seed(seed)
    truth, x = torch.randn(10, generator=g), torch.randn(1000, 10, generator=g)
    x[:800] = x[0] + 0.02 * torch.randn(800, 10, generator=g)
    y = x @ truth
    if corrupted:
        wrong = 800 + torch.randperm(200, generator=g)[:50]
        y[wrong] = 8 * torch.randn(50, generator=g)
    fresh = torch.randn(500, 10, generator=g)
    theta, rule = torch.zeros(10), make(strategy, 0.4)
    for _ in range(steps):
        rows = torch.randint(1000, (64,), generator=g)
        w = rule.weights((x[rows] @ theta - y[rows]).square())
        theta = theta - 0.05 * 2 * x[rows].T @ (w * (x[rows] @ theta - y[rows]))
    return float((fresh @ (theta - truth)).square().mean())


def test_redundant_rows_and_wrong_labels() -> None:
    """Clean: linupper, quadratic, uniform, extremes; with wrong labels uniform is ahead."""
    mean = {
        (s, c): sum(regression(s, c, seed, 50 if not c else 300) for seed in range(8)) / 8
        for s in ("linupper", "quadratic", "uniform", "extremes")
        for c in (False, True)
    }
    clean = [mean[s, False] for s in ("linupper", "quadratic", "uniform", "extremes")]
    assert clean == sorted(clean)
    assert mean["uniform", True] < mean["linupper", True]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Reweighter("mid"), "strategy must be one of"),  # type: ignore[arg-type]
        (lambda: Reweighter(norm="quantile"), "norm must be"),  # type: ignore[arg-type]
        (lambda: Reweighter(temperature=0.0), "temperature must be positive"),
        (lambda: Reweighter(delta=-1.0), "delta must be positive"),
        (lambda: Reweighter(cap=0.5), "cap must be at least 1"),
        (lambda: Temperature(0.0), "temperatures must be positive"),
        (lambda: Temperature(burn_in=-1), "steps must not be negative"),
        (lambda: Reweighter()(torch.tensor(1.0)), "reduction='none'"),
        (lambda: Reweighter()(torch.ones(0)), "one loss a sample"),
        (lambda: Reweighter()(torch.ones(2), mask=torch.ones(3)), "mask must have shape"),
        (lambda: Reweighter()(torch.ones(2), mask=torch.zeros(2)), "no sample of the batch counts"),
        (lambda: LearnedWeights()(torch.ones(2), torch.ones(3)), "logits must have shape"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
