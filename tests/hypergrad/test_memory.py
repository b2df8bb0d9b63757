"""What the memory modes hold, and which one "auto" takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hypergrad import SGD, Adam, Unrolled, trajectory
from hypergrad.memory import Footprint, fitting_length
from tests.hypergrad.naive import vector
from tests.hypergrad.problems import CASES, _dropout, module
from tests.hypergrad.test_unrolled_contract import run


@given(st.integers(1, 300), st.integers(0, 10**6), st.integers(1, 10**6))
def test_segments_hold_nearly_the_least(steps: int, graph: int, state: int) -> None:
    """By brute force over all lengths: rounding costs at most an eighth."""
    held = [steps / n * state + n * (graph + state) for n in range(1, steps + 1)]
    chosen = fitting_length(steps, graph, state, limit=-1)
    assert held[chosen - 1] <= 1.125 * min(held)
    assert chosen <= max(1, round(steps**0.5))
    assert fitting_length(steps, graph, state, limit=steps * (graph + state)) == steps


def test_footprint_counts_each_storage_once() -> None:
    x = torch.randn(10, 10, requires_grad=True)
    footprint = Footprint({"held": x})
    with footprint.watched():
        y = x.exp()  # saves its result of 400 bytes
        (y * y.t()).sum()  # saves two views of it
    assert footprint.bytes == 400


@pytest.mark.parametrize("free", [0, 1 << 40])
def test_auto_changes_no_bit(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout and fresh batches; little memory makes segments, much keeps the graph."""
    monkeypatch.setattr(trajectory, "free_bytes", lambda device: free)
    case, rule = module(_dropout, seeded=False), Adam(0.01)
    torch.manual_seed(5)
    graph, end = run(case, Unrolled(rule, 7, memory="graph"))
    random = torch.get_rng_state()
    torch.manual_seed(5)
    auto, end_auto = run(case, Unrolled(rule, 7))
    assert torch.equal(vector(auto.grad), vector(graph.grad))
    assert torch.equal(vector(auto.params), vector(graph.params))
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(end["optimizer"]["exp_avg"], end_auto["optimizer"]["exp_avg"])
    assert (auto.n_grad > graph.n_grad) == (free == 0)


def test_auto_fetches_each_batch_once_where_the_graph_fits() -> None:
    """So that a batch may come from an iterator."""
    case = CASES["mlp"]()
    fetched: list[int] = []

    def batch(t: int) -> Any:
        fetched.append(t)
        return case.inner

    estimator = Unrolled(SGD(0.1), 5, truncation=3)
    state = estimator.init(case.problem, case.params, case.hparams)
    estimator(case.problem, case.params, case.hparams, batch, case.outer, state)
    assert fetched == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_a_segment_may_have_any_length(length: int) -> None:
    case = CASES["mlp"]()
    graph, _ = run(case, Unrolled(Adam(0.01), 7, memory="graph"))
    found, _ = run(case, Unrolled(Adam(0.01), 7, memory="segments", segment=length))
    assert torch.equal(vector(found.grad), vector(graph.grad))


def test_forward_is_one_of_the_modes() -> None:
    case = CASES["direct_outer"]()
    graph, _ = run(case, Unrolled(SGD(0.1, 0.9), 6, memory="graph"))
    found, _ = run(case, Unrolled(SGD(0.1, 0.9), 6, memory="forward"))
    assert torch.allclose(vector(found.grad), vector(graph.grad), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"memory": "segments", "segment": 8},
            "between 1 and the 7 differentiated steps, but got 8",
        ),
        (
            {"memory": "segments", "segment": 0},
            "between 1 and the 7 differentiated steps, but got 0",
        ),
        ({"memory": "segments", "segment": 5, "truncation": 4}, "between 1 and the 4 different"),
        ({"segment": 3}, "segment=3 is for memory='segments', but memory is 'auto'"),
        ({"memory": "forward", "truncation": 3}, "truncation=3 needs a backward pass"),
    ],
)
def test_bad_modes_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Unrolled(SGD(0.1), 7, **options)
