"""Loss-based weights: exact properties, distributed batches, and the regression study."""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.core.reweighting_data import regression
from bilevel.learned_weights import LearnedWeights
from bilevel.reweighting import Reweighter, Temperature
from bilevel.sample_losses import finite_losses, sequence_losses, token_losses
from bilevel.weighing import Reweighting

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


def test_masked_samples_have_no_weight() -> None:
    losses = torch.tensor([1.0, 9.0, 3.0], requires_grad=True)
    loss, info = make("upper")(losses, torch.tensor([True, False, True]))
    assert info.dropped == 1
    assert float(info.weights[1]) == 0.0
    assert torch.allclose(info.weights[[0, 2]], make("upper").weights(torch.tensor([1.0, 3.0])))
    (grad,) = torch.autograd.grad(loss, losses)
    assert torch.equal(grad, info.weights)
    assert info.unweighted == 2.0


@pytest.mark.parametrize("mask", [None, torch.tensor([True, True, False])])
def test_losses_that_are_not_finite_raise_and_name_their_samples(mask: Tensor | None) -> None:
    """Masked ones, too: 0 · NaN inside the graph is NaN."""
    theta = torch.ones(3, requires_grad=True)
    losses = theta * torch.tensor([1.0, 2.0, math.nan])
    for rule in (make("upper"), LearnedWeights(torch.zeros(50))):
        with pytest.raises(FloatingPointError, match=r"samples \[41\]"):
            rule(losses, mask, index=torch.tensor([3, 7, 41]))
    with pytest.raises(FloatingPointError, match=r"samples \[2\]"):
        make("upper")(losses)


def test_dropped_rows_leave_finite_gradients() -> None:
    """A selection alone does not; the loss is that of the batch without the row."""
    x = torch.randn(5, 3, dtype=D, generator=torch.Generator().manual_seed(0))
    x[2] = math.inf
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=D, requires_grad=True)

    def losses_of(rows: Tensor) -> Tensor:
        return (x[rows] @ theta).square()

    whole = losses_of(torch.arange(5))
    (spoiled,) = torch.autograd.grad(whole[whole.isfinite()].sum(), theta)
    assert not spoiled.isfinite().all()

    losses, mask = finite_losses(losses_of, 5)
    assert mask.tolist() == [True, True, False, True, True]
    loss, info = make("upper")(losses, mask)
    (grad,) = torch.autograd.grad(loss, theta)
    expected, _ = make("upper")(losses_of(torch.tensor([0, 1, 3, 4])))
    assert torch.equal(grad, torch.autograd.grad(expected, theta)[0])
    assert info.dropped == 1

    x[2] = 0.0
    assert finite_losses(losses_of, 5)[1].all()
    x[:] = math.nan
    assert not finite_losses(losses_of, 5)[1].any()
    with pytest.raises(FloatingPointError, match=r"rows \[0\] without the other bad rows"):
        finite_losses(lambda r: torch.tensor([1.0, math.nan]) if len(r) == 2 else r / 0.0, 2)


@pytest.mark.parametrize("strategy", ["linupper", "quadratic", "learned"])
def test_micro_batches_are_the_whole_batch(strategy: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, theta = torch.randn(9, 4, dtype=D, generator=g), torch.randn(4, dtype=D, generator=g)
    theta.requires_grad_()
    logits = torch.randn(20, dtype=D, generator=g).requires_grad_()
    index, mask = torch.randperm(20, generator=g)[:9], torch.arange(9) != 4
    rule = LearnedWeights(logits) if strategy == "learned" else make(strategy, 0.4)

    def losses(rows: slice) -> Tensor:
        return (x[rows] @ theta).square()

    inputs = [theta, logits] if strategy == "learned" else [theta]
    whole, _ = rule(losses(slice(None)), mask, index=index)
    expected = torch.autograd.grad(whole, inputs)
    parts = [slice(0, 2), slice(2, 7), slice(7, 9)]
    collected = torch.cat([losses(rows).detach() for rows in parts])
    info = rule.weigh(collected, mask, index=index)
    found = [torch.zeros_like(i) for i in inputs]
    for rows in parts:
        grads = torch.autograd.grad(info.loss(losses(rows), rows), inputs, retain_graph=True)
        found = [f + each for f, each in zip(found, grads, strict=True)]
    for one, two in zip(found, expected, strict=True):
        assert torch.allclose(one, two, rtol=1e-13, atol=1e-15)


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


def test_sequences_and_tokens() -> None:
    logits, labels = torch.randn(3, 4, 7, dtype=D), torch.randint(7, (3, 4))
    labels[0, 2:] = -100
    labels[2] = -100
    found, mask = sequence_losses(logits, labels)
    one = torch.nn.functional.cross_entropy(logits[0, :2], labels[0, :2])
    assert float(found[0]) == pytest.approx(float(one))
    assert mask.tolist() == [True, True, False]
    loss, info = make("upper")(found, mask)
    assert info.weights.tolist()[2] == 0.0
    assert float(loss) == pytest.approx(float(make("upper")(found[:2])[0]))

    tokens, active = token_losses(logits, labels)
    assert torch.equal(active, (labels != -100).flatten())
    assert torch.allclose(tokens.view(3, 4).sum(1)[:2] / (labels != -100).sum(1)[:2], found[:2])
    loss, info = make("uniform")(tokens, active)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert float(loss) == pytest.approx(float(plain))
    assert info.dropped == 6


def test_learned_weights_are_a_rule_like_another() -> None:
    g = torch.Generator().manual_seed(0)
    losses = torch.rand(4, dtype=D, generator=g)
    index = torch.tensor([5, 0, 3, 9])
    uniform = [
        rule(losses, index=index, step=3)
        for rule in (make("uniform"), LearnedWeights(torch.zeros(10, dtype=D)))
    ]
    assert torch.allclose(uniform[0][0], uniform[1][0])
    assert uniform[0][1].effective == pytest.approx(uniform[1][1].effective)

    theta = torch.randn(10, dtype=D, generator=g).requires_grad_()
    loss, info = LearnedWeights(theta)(losses, index=index)
    (grad,) = torch.autograd.grad(loss, theta)
    s = theta.detach().sigmoid()[index]
    expected = torch.zeros(10, dtype=D)
    expected[index] = s * (1 - s) * (losses - (s * losses).sum() / s.sum()) / s.sum()
    assert torch.allclose(grad, expected, atol=1e-15)
    assert torch.allclose(info.weights, s / s.sum())


F5 = torch.tensor([1.0, 4.0, 2.0, 3.0, 7.0], dtype=D)
CASES = {"two": [(0, 2), (2, 5)], "empty": [(0, 5), (5, 5)], "three": [(0, 0), (0, 4), (4, 5)]}


def _worker(rank: int, world: int, results: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{results}/store", rank=rank, world_size=world
    )
    group, found = torch.distributed.group.WORLD, {}
    theta = torch.linspace(-2, 2, 5, dtype=D)
    for name, bounds in CASES.items():
        if len(bounds) != world:
            continue
        rows = slice(*bounds[rank])
        mine, logits = F5[rows].clone().requires_grad_(), theta.clone().requires_grad_()
        loss, info = Reweighter("linupper", 0.4)(mine, group=group)
        (grad,) = torch.autograd.grad(loss, mine)
        other, _ = LearnedWeights(logits)(mine, index=torch.arange(5)[rows], group=group)
        (outer,) = torch.autograd.grad(other, logits)
        found[name] = {"weights": info.weights, "grad": grad, "outer": outer}
    # One process has bad input: all raise, and none waits.
    bad = torch.full((2,), math.nan if rank == 0 else 1.0)
    for losses, kind in ((bad, FloatingPointError), (bad[: 2 * rank].sum(), ValueError)):
        try:
            Reweighter()(losses if rank == 0 else bad, group=group)
        except kind as error:
            found[kind.__name__] = str(error)
    try:
        Reweighter()(torch.zeros(0), group=group)
    except ValueError as error:
        found["all empty"] = str(error)
    torch.save(found, f"{results}/{rank}.pt")
    torch.distributed.barrier()  # a process that leaves early aborts the others
    os._exit(0)  # taking gloo down races with its own threads, which may abort the process


@pytest.mark.parametrize("world", [2, 3])
def test_processes_weigh_one_batch(world: int, tmp_path: object) -> None:
    """Batches of any sizes, none included: the weights and averaged gradients of the whole."""
    mp.spawn(_worker, (world, str(tmp_path)), nprocs=world)
    found = [torch.load(f"{tmp_path}/{rank}.pt", weights_only=True) for rank in range(world)]
    expected = make("linupper", 0.4).weights(F5)
    theta = torch.linspace(-2, 2, 5, dtype=D).requires_grad_()
    loss, _ = LearnedWeights(theta)(F5, index=torch.arange(5))
    (outer,) = torch.autograd.grad(loss, theta)
    for name, bounds in CASES.items():
        if len(bounds) != world:
            continue
        cells = [each[name] for each in found]
        assert torch.allclose(torch.cat([c["weights"] for c in cells]), expected, atol=1e-12)
        averaged = torch.cat([c["grad"] for c in cells]) / world
        assert torch.allclose(averaged, expected, atol=1e-12)
        assert torch.allclose(sum(c["outer"] for c in cells) / world, outer, atol=1e-12)
    for rank, each in enumerate(found):
        assert ("process 0: " if rank else "samples [0, 1]") in each["FloatingPointError"]
        assert "one loss a sample" in each["ValueError"]
        assert "the batch is empty" in each["all empty"]


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


def learned(losses: Tensor, index: Tensor | None, shift: float = 0.0) -> Reweighting:
    return LearnedWeights(torch.full((4,), shift))(losses, index=index)[1]


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
        (lambda: Reweighter()(torch.ones(2), torch.zeros(2)), "weights sum to zero"),
        (lambda: Reweighter().weights(torch.ones(2), 0.0), "temperature must be positive"),
        (lambda: Reweighter().weights(torch.ones(2), torch.tensor(-1.0)), "must be positive"),
        (lambda: Reweighter().weights(torch.ones(2), math.nan), "temperature must be positive"),
        (lambda: Reweighter().weights(torch.tensor(1.0)), "one loss a sample"),
        (lambda: Reweighter()(torch.ones(2)).__getitem__(1).loss(torch.ones(3)), "each row"),
        (lambda: LearnedWeights(torch.zeros(2, 2)), "logits must have shape"),
        (lambda: learned(torch.tensor(1.0), torch.tensor(0)), "reduction='none'"),
        (lambda: learned(torch.ones(2), None), "index is missing"),
        (lambda: learned(torch.ones(2), torch.tensor([1])), "index must have shape"),
        (lambda: learned(torch.ones(2), torch.tensor([1, 4])), r"0 ... 3, but got 1 ... 4"),
        (lambda: learned(torch.ones(2), torch.tensor([-1, 2])), r"got -1 ... 2"),
        (lambda: learned(torch.ones(3), torch.tensor([1, 2, 1])), r"repeated samples: \[1\]"),
        (
            lambda: learned(torch.ones(2), torch.tensor([1, 2]), shift=-1e4),
            r"samples \[1, 2\] sum to zero",
        ),
        (lambda: sequence_losses(torch.ones(2, 3), torch.ones(2, 3)), "expected logits of shape"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_indices_must_be_integers() -> None:
    with pytest.raises(TypeError, match="index must be int64"):
        LearnedWeights(torch.zeros(4))(torch.ones(1), index=torch.ones(1))
