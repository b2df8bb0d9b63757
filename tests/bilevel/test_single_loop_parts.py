"""Directions, Neumann series and variance reduction against dense algebra."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel.single_loop import FiniteSum, Randomized, Truncated
from bilevel.single_loop.directions import (
    full_hypergradient,
    full_joint,
    hypergradient,
    joint,
    sgd_adjoint,
)
from bilevel.single_loop.draws import Sample
from bilevel.single_loop.oracle import Oracle, Vectors, average, mean, plus
from bilevel.single_loop.variance import recursive, saga, tabulate
from tests.bilevel.quadratic import DIM, Quadratic

PROBLEM = Quadratic(5, noise=0.3)
EXACTLY = {"rtol": 1e-12, "atol": 1e-12}
G = torch.Generator().manual_seed(0)


def _rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


X = {"w": _rand(DIM), "v": _rand(DIM), "z": _rand(DIM)}
Y = {"w": _rand(DIM), "v": _rand(DIM), "z": _rand(DIM)}


@pytest.fixture
def oracle() -> Oracle:
    inner = PROBLEM.inner()
    return Oracle(inner, inner.space.coordinates(inner.hparams))


def _samples() -> list[Sample]:
    return [Sample(b, c) for b in PROBLEM.inner_batches for c in PROBLEM.outer_batches]


def _close(found: Vectors, expected: Vectors) -> None:
    assert set(found) == set(expected)
    for name, vector in expected.items():
        torch.testing.assert_close(found[name], vector, **EXACTLY)


def _by_hand(x: Vectors, b: Any, c: Any) -> Vectors:
    w, v, h = x["w"], x["v"], x["z"]
    return {
        "w": b["H"] @ w - b["B"] @ h - b["c"],
        "v": b["H"] @ v + w - c["t"],
        "z": PROBLEM.alpha * (h - c["s"]) - b["B"].T @ v,
    }


def test_joint_directions_of_each_sample_match_dense_algebra(oracle: Oracle) -> None:
    for sample in _samples():
        _close(joint(oracle, X, sample), _by_hand(X, sample.inner, sample.outer))


def test_joint_directions_are_unbiased(oracle: Oracle) -> None:
    full = _by_hand(
        X,
        {"H": PROBLEM.H, "B": PROBLEM.B, "c": PROBLEM.c},
        {"t": PROBLEM.t, "s": PROBLEM.s},
    )
    _close(mean([joint(oracle, X, sample) for sample in _samples()]), full)
    _close(full_joint(oracle, X, PROBLEM.inner()), full)


def test_the_optimum_is_the_joint_fixed_point(oracle: Oracle) -> None:
    h = PROBLEM.best
    at = {"w": PROBLEM.weights(h), "v": PROBLEM.adjoint(h), "z": h}
    zero = torch.zeros(DIM, dtype=torch.float64)
    _close(full_joint(oracle, at, PROBLEM.inner()), {"w": zero, "v": zero, "z": zero})


def test_directions_in_bounded_coordinates_follow_the_chain_rule() -> None:
    """d_z = c'(z)ᵀ d_h, checked against a central difference of h = c(z)."""
    bounded = Quadratic(5, noise=0.3, bound=2.0)
    inner, eps = bounded.inner(), 1e-6
    z = inner.space.coordinates(inner.hparams)

    def h(step: float) -> Tensor:
        return inner.space.constrain({"h": X["z"] + step})["h"]  # c acts on each entry

    slope = (h(eps) - h(-eps)) / (2 * eps)
    sample = _samples()[3]
    found = joint(Oracle(inner, z), X, sample)
    expected = _by_hand({**X, "z": h(0.0)}, sample.inner, sample.outer)
    torch.testing.assert_close(found["z"], slope * expected["z"], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(found["w"], expected["w"], **EXACTLY)


def _dense_series(H: Tensor, g: Tensor, terms: int, lr: float) -> Tensor:
    factor = torch.eye(DIM).double() - lr * H
    return -lr * sum(torch.linalg.matrix_power(factor, q) @ g for q in range(terms))


def test_truncated_series_has_one_term_more_than_factors(oracle: Oracle) -> None:
    at = average([oracle.linearize(X, b) for b in PROBLEM.inner_batches])
    g = _rand(DIM)
    found = Truncated(6, 0.4).adjoint([at] * 6, g, 0.4)
    torch.testing.assert_close(found, _dense_series(PROBLEM.H, g, 7, 0.4), **EXACTLY)


def test_randomized_series_is_the_truncated_one_in_expectation(oracle: Oracle) -> None:
    at = average([oracle.linearize(X, b) for b in PROBLEM.inner_batches])
    g, series = _rand(DIM), Randomized(6, 0.4)
    found = torch.stack([series.adjoint([at] * p, g, 0.4) for p in range(6)]).mean(0)
    torch.testing.assert_close(found, _dense_series(PROBLEM.H, g, 6, 0.4), **EXACTLY)
    draws = torch.tensor([series.factors(k) for k in range(3000)])
    counts = torch.bincount(draws, minlength=6)
    assert len(counts) == 6
    assert counts.min() > 400  # 500 expected, standard deviation 20


def test_series_with_batches_drawn_anew_is_unbiased(oracle: Oracle) -> None:
    """The average over all pairs of batches is the product of the averages."""
    g, lists = _rand(DIM), PROBLEM.inner_batches
    points = [oracle.linearize(X, batch) for batch in lists]
    pairs = [Truncated(2, 0.4).adjoint([p, q], g, 0.4) for p in points for q in points]
    expected = _dense_series(PROBLEM.H, g, 3, 0.4)
    torch.testing.assert_close(torch.stack(pairs).mean(0), expected, **EXACTLY)


def test_hypergradient_of_all_data_matches_dense_algebra(oracle: Oracle) -> None:
    lr, series = 0.5, Truncated(80, 0.5)
    found = full_hypergradient(oracle, X, PROBLEM.inner(), series, 80, lr)
    v = -torch.linalg.solve(PROBLEM.H, X["w"] - PROBLEM.t)
    expected = PROBLEM.alpha * (X["z"] - PROBLEM.s) - PROBLEM.B.T @ v
    torch.testing.assert_close(found["z"], expected, rtol=0, atol=1e-10)
    # and is the average of the samples' where all factors see all data
    flat = Quadratic(1)
    one = Oracle(flat.inner(), {"h": X["z"]})
    sample = Sample(flat.inner_batches[0], flat.outer_batches[0], flat.inner_batches * 80)
    _close(
        hypergradient(one, X, sample, series, lr),
        full_hypergradient(one, X, flat.inner(), series, 80, lr),
    )


def test_adjoint_steps_solve_the_linear_system(oracle: Oracle) -> None:
    batch = {"H": PROBLEM.H, "B": PROBLEM.B, "c": PROBLEM.c}
    g = _rand(DIM)
    v = sgd_adjoint(oracle, X, g, [batch] * 120, 0.8)
    torch.testing.assert_close(v, -torch.linalg.solve(PROBLEM.H, g), rtol=0, atol=1e-10)


def test_saga_averages_to_the_full_direction_and_forgets_its_start(oracle: Oracle) -> None:
    def row(x: Vectors, i: int) -> Vectors:
        return joint(oracle, x, Sample(PROBLEM.inner_batches[i], PROBLEM.outer_batches[0]))

    count = len(PROBLEM.inner_batches)
    table = tabulate([row(X, i) for i in range(count)])
    kept = mean(table["rows"])
    # Unbiased at a new point, whatever the table holds.
    estimates = [saga(table, i, row(Y, i))[0] for i in range(count)]
    at_y = mean([row(Y, i) for i in range(count)])
    _close(mean(estimates), at_y)
    for i in range(count):
        _, table = saga(table, i, row(Y, i))
    _close(table["mean"], at_y)  # a sweep at a fixed point: the average is the full direction
    _close(table["mean"], mean(table["rows"]))
    _close(saga(table, 2, row(Y, 2))[0], at_y)  # and every estimate is exact
    _close(kept, mean([row(X, i) for i in range(count)]))  # the first table was left alone


def test_spider_telescopes(oracle: Oracle) -> None:
    """Every estimate is the start plus the sum of differences along the path."""
    path = [X, Y, *({n: _rand(DIM) for n in X} for _ in range(4))]
    samples = _samples()[: len(path) - 1]
    start = full_joint(oracle, path[0], PROBLEM.inner())
    memory: Any = {"at": path[0], "estimate": start}
    expected = start
    for before, x, sample in zip(path, path[1:], samples, strict=False):
        memory = recursive(lambda at, s=sample: joint(oracle, at, s), x, memory, 0.0)
        change = plus(joint(oracle, x, sample), joint(oracle, before, sample), -1.0)
        expected = plus(expected, change)
        _close(memory["estimate"], expected)
    # With the same full sample in each difference, the sum is the full direction at the end.
    memory = {"at": path[0], "estimate": start}
    for x in path[1:]:
        memory = recursive(lambda at: full_joint(oracle, at, PROBLEM.inner()), x, memory, 0.0)
    _close(memory["estimate"], full_joint(oracle, path[-1], PROBLEM.inner()))


def test_storm_is_a_mixture_of_plain_sampling_and_spider(oracle: Oracle) -> None:
    sample, other = _samples()[:2]

    def direction(at: Vectors) -> Vectors:
        return joint(oracle, at, sample)

    memory: Any = {"at": Y, "estimate": joint(oracle, Y, other)}
    plain = recursive(direction, X, memory, 1.0)["estimate"]
    spider = recursive(direction, X, memory, 0.0)["estimate"]
    _close(plain, direction(X))
    _close(recursive(direction, X, None, 0.3)["estimate"], direction(X))
    mixed = recursive(direction, X, memory, 0.3)["estimate"]
    _close(mixed, plus({n: 0.3 * d for n, d in plain.items()}, spider, 0.7))


def test_finite_sum_averages_and_draws_uniformly() -> None:
    inner: FiniteSum = PROBLEM.inner()
    expected = [
        PROBLEM._inner_loss(inner.params, inner.hparams, b).item() for b in PROBLEM.inner_batches
    ]
    assert inner.evaluate("train")["loss"] == pytest.approx(sum(expected) / 5, rel=1e-14)
    place = {id(batch): i for i, batch in enumerate(PROBLEM.inner_batches)}
    drawn = [place[id(batch)] for batch in inner.inner_batches(2000)]
    assert min(drawn.count(i) for i in range(5)) > 320  # 400 expected, standard deviation 18
    again = PROBLEM.inner()
    assert [place[id(batch)] for batch in again.inner_batches(50)] == drawn[:50]
    assert inner.splits == ("train", "val")
