"""Selectors: exact counts under ties, brute force, and bad input."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapters.select import heads, low_rank, n_of_m, slices, top_k, top_k_global, wanda


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """Small matrices with many ties."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 6))
    entries = st.lists(st.integers(0, 2), min_size=rows * columns, max_size=rows * columns)
    return torch.tensor(draw(entries), dtype=torch.float64).view(rows, columns)


@given(scores(), st.data(), st.booleans())
def test_counts_are_exact_and_the_sum_is_the_best(
    score: Tensor, data: st.DataObject, largest: bool
) -> None:
    k = data.draw(st.integers(0, score.numel()))
    mask = top_k(score, k, largest=largest)
    assert int(mask.sum()) == k
    ordered = sorted(score.flatten().tolist(), reverse=largest)
    assert float(score[mask].sum()) == sum(ordered[:k])
    flat, chosen = score.flatten().tolist(), mask.flatten().tolist()
    for i, j in itertools.combinations(range(len(flat)), 2):
        if flat[i] == flat[j]:
            assert chosen[i] or not chosen[j], "ties go to the lower index"


@given(scores(), scores(), st.data())
def test_global_counts(one: Tensor, two: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, one.numel() + two.numel()))
    masks = top_k_global({"one": one, "two": two}, k)
    assert int(masks["one"].sum() + masks["two"].sum()) == k
    both = torch.cat([one.flatten(), two.flatten()])
    assert torch.equal(torch.cat([m.flatten() for m in masks.values()]), top_k(both, k))


def test_n_of_m_slices_and_heads_against_loops() -> None:
    score = torch.randint(0, 3, (4, 12), generator=torch.Generator().manual_seed(0)).double()
    mask = n_of_m(score, 2, 4)
    for row, kept in zip(score, mask, strict=True):
        for start in range(0, 12, 4):
            assert torch.equal(kept[start : start + 4], top_k(row[start : start + 4], 2))
    rows = slices(score, 2, dim=0)
    assert torch.equal(rows, top_k(score.mean(1), 2)[:, None].expand(4, 12))
    columns = slices(score, 5, dim=1, largest=False)
    assert torch.equal(columns, top_k(score.mean(0), 5, largest=False)[None].expand(4, 12))
    blocks = heads(score, 1, n_heads=2)
    assert torch.equal(blocks[:, 0], top_k(score.view(2, -1).mean(1), 1).repeat_interleave(2))


def test_scores() -> None:
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(9, 5, generator=generator, dtype=torch.float64)
    assert torch.equal(low_rank(w, 5), w.abs())
    u, sigma, vt = torch.linalg.svd(w, full_matrices=False)
    assert torch.allclose(low_rank(w, 2), (u[:, :2] @ sigma[:2].diag() @ vt[:2]).abs())
    assert torch.allclose(wanda(w, x), w.abs() * x.square().sum(0).sqrt())


ONES = torch.ones(4, 6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: top_k(ONES, 25), "k must lie in 0 ... 24, but got 25"),
        (lambda: top_k(ONES, -1), "k must lie in 0 ... 24, but got -1"),
        (lambda: top_k(ONES * torch.nan, 2), "NaN"),
        (lambda: top_k_global({}, 1), "at least one tensor"),
        (lambda: n_of_m(ONES, 2, 4), "m must divide the last dimension 6, but got 4"),
        (lambda: n_of_m(ONES, 4, 3), "n must lie in 0 ... m = 3, but got 4"),
        (lambda: n_of_m(ONES * torch.nan, 1, 3), "NaN"),
        (lambda: slices(ONES, 1, 2), "dim 0 or 1"),
        (lambda: heads(ONES, 1, 3), "n_heads must divide 4 rows, but got 3"),
        (lambda: low_rank(ONES, 0), "rank must be at least 1, but got 0"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
