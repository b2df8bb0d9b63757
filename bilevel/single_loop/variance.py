"""Variance reduction: estimates of a full direction from one batch and a memory.

Each function is one step of an estimator around any direction d(x; ξ), from an explicit memory to
the next one; plain sampling, d(x; ξ) itself, needs none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from bilevel.single_loop.oracle import Vectors, mean, plus

__all__ = ["Recursion", "Table", "recursive", "saga", "tabulate"]


class Table(TypedDict):
    """Memory of `saga`.

    Attributes:
        rows: the last direction seen on each batch.
        mean: their average.
    """

    rows: list[Vectors]
    mean: Vectors


def tabulate(rows: list[Vectors]) -> Table:
    """Return the table of directions that were all taken at one point."""
    return {"rows": rows, "mean": mean(rows)}


def saga(table: Table, index: int, fresh: Vectors) -> tuple[Vectors, Table]:
    """Return the SAGA estimate  d(x; i) - row i + mean,  and the table with the new row i.

    Unbiased for uniform i, with a variance that vanishes as all rows approach the directions at
    the limit point.  Memory: one set of directions for each batch.

    Args:
        table: as it was; it stays valid.
        index: i.
        fresh: d(x; i).

    Source: Defazio, Bach & Lacoste-Julien 2014, eq. 1.
    """
    rows = list(table["rows"])
    change = plus(fresh, rows[index], -1.0)
    rows[index] = fresh
    return plus(table["mean"], change), {
        "rows": rows,
        "mean": plus(table["mean"], change, 1.0 / len(rows)),
    }


class Recursion(TypedDict):
    """Memory of `recursive`.

    Attributes:
        at: the previous point.
        estimate: the estimate there.
    """

    at: Vectors
    estimate: Vectors


def recursive(
    direction: Callable[[Vectors], Vectors],
    x: Vectors,
    memory: Recursion | None,
    momentum: float,
) -> Recursion:
    """Return the estimate  d(x; ξ) + (1 - a) (estimate - d(x'; ξ))  after a move from x' to x.

    STORM (Cutkosky & Orabona 2019, eq. 3) for 0 < a < 1; plain sampling for a = 1; SARAH/SPIDER
    (Nguyen et al. 2017; Fang et al. 2018) for a = 0, where the caller starts anew from a full
    pass once in a while.

    Args:
        direction: d(·; ξ), evaluated on the same batches ξ at x' and x.
        x: the current point.
        memory: of the previous point; None for d(x; ξ) itself.
        momentum: a in [0, 1].
    """
    if memory is None or momentum == 1.0:
        return {"at": x, "estimate": direction(x)}
    before = direction(memory["at"])  # x comes second: losses are reported at the latest point
    drift = plus(memory["estimate"], before, -1.0)
    return {"at": x, "estimate": plus(direction(x), drift, 1.0 - momentum)}
