"""What one evaluation sees: random batches, from a stream or from lists, and random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bilevel.inner import Inner
from bilevel.single_loop.finite import FiniteInner

__all__ = ["Sample", "chance", "listed", "numbers", "stream", "streamed"]


@dataclass(frozen=True)
class Sample:
    """Batches that one evaluation sees; at two points it sees the same ones.

    Attributes:
        inner: batch of f.
        outer: batch of F.
        neumann: batches of f for the factors of a Neumann series.
    """

    inner: Any
    outer: Any
    neumann: Sequence[Any] = ()


def chance(seed: int, k: int) -> random.Random:
    """Return the random numbers of outer step `k`: a resumed run draws the same."""
    return random.Random(f"{seed}/{k}")


def stream(inner: Inner, train: int, extra: int) -> tuple[list[Any], list[Any]]:
    """Return batches of f from the stream: for `train` weight updates, and for all else.

    Drawn at once, those of the weight updates last, as `Inner.adopt` expects.
    """
    batches = inner.inner_batches(extra + train)
    return batches[extra:], batches[:extra]


def streamed(inner: Inner, factors: int = 0) -> Sample:
    """Return a sample from the streams, with batches for `factors` factors of a series."""
    (batch,), series = stream(inner, 1, factors)
    return Sample(batch, inner.outer_batch(), series)


def numbers(inner: FiniteInner, draw: random.Random) -> tuple[int, int]:
    """Return uniform numbers into the lists of f and of F."""
    return (
        draw.randrange(len(inner.inner_batch_list())),
        draw.randrange(len(inner.outer_batch_list())),
    )


def listed(inner: FiniteInner, draw: random.Random, factors: int = 0) -> Sample:
    """Return a sample of uniform draws from the lists."""
    i, j = numbers(inner, draw)
    batches = inner.inner_batch_list()
    series = [batches[draw.randrange(len(batches))] for _ in range(factors)]
    return Sample(batches[i], inner.outer_batch_list()[j], series)
