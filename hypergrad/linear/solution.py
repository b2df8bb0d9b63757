"""The linear solver contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from hypergrad.status import Status

__all__ = ["LinearSolver", "Matvec", "Memory", "Solution"]

Matvec = Callable[[Tensor], Tensor]
"""``v -> A v`` on vectors of shape (n,)."""

Memory = dict[str, Tensor | int]
"""What a solver keeps from one system to the next nearby one, such as a preconditioner."""

T = TypeVar("T")
Products = Generator[Tensor, Tensor, T]
"""A computation with A: it yields a vector (n,), or vectors as the rows of a matrix (m, n), and
is sent their products with A in the same shape.  Its solver need not know whether they are
evaluated alone or together with those of other systems."""


@dataclass(frozen=True)
class Solution:
    """An answer to A x = b and how good it is.

    Attributes:
        x: the best iterate found, shape (n,).
        residual: ‖A x − b‖₂ / ‖b‖₂; None where a solver does not look at it.
        n_matvec: products with A used.
        status: `Status.CONVERGED`, or why the solver stopped before.
        memory: to hand to the next call; None where a solver keeps nothing.
    """

    x: Tensor
    residual: float | None
    n_matvec: int
    status: Status
    memory: Memory | None = None


class LinearSolver(ABC):
    """A way to solve A x = b.  Subclasses are frozen dataclasses and define `_solve`."""

    def solve(
        self, matvec: Matvec, b: Tensor, x0: Tensor | None = None, memory: Memory | None = None
    ) -> Solution:
        """Solve A x = b.

        Args:
            matvec: ``v -> A v``, A square.
            b: right-hand side, a floating vector of shape (n,).
            x0: where to start, such as the solution of a nearby system; zero if None.
                Solvers that do not iterate ignore it.
            memory: `Solution.memory` of a nearby system.

        Raises:
            ValueError: b is not a vector, or x0 does not have its shape.
            FloatingPointError: b, x0 or a product with A is not finite.
        """
        return self.solve_many(matvec, [b], [x0], memory)[0]

    def solve_many(
        self,
        matvec: Matvec,
        b: Sequence[Tensor],
        x0: Sequence[Tensor | None] | None = None,
        memory: Memory | None = None,
        *,
        vectorize: bool = True,
    ) -> list[Solution]:
        """Solve A x = b for several right-hand sides, each as `solve` does.

        The systems advance together: a round of theirs is one call of `torch.vmap` on `matvec`,
        and what depends on A only (a preconditioner, a factorization) is made once and counted
        with the first system.

        Args:
            matvec: ``v -> A v``, A square.
            b: right-hand sides, vectors of shape (n,).
            x0: where to start each.
            memory: see `solve`.
            vectorize: False evaluates the products of several vectors one by one, for
                operations without a batching rule.

        Raises:
            ValueError, FloatingPointError: see `solve`.
        """
        starts = [None] * len(b) if x0 is None else list(x0)
        if len(starts) != len(b):
            raise ValueError(f"x0 has {len(starts)} vectors, but b has {len(b)}.")
        systems = [_Scaled.of(*pair) for pair in zip(b, starts, strict=True)]
        if len({s.b.shape for s in systems}) > 1:
            raise ValueError(f"b must be of one length, but got {[len(s.b) for s in systems]}.")
        found = [Solution(s.b, 0.0, 0, Status.CONVERGED, memory) for s in systems]
        todo = [i for i, s in enumerate(systems) if s.size]
        if not todo:
            return found
        [(shared, made)] = _run([self._prepare(systems[todo[0]].b, memory)], matvec, vectorize)
        iterations = [self._solve(s.b, s.x0, s.size, shared) for s in (systems[i] for i in todo)]
        for i, (solution, used) in zip(todo, _run(iterations, matvec, vectorize), strict=True):
            used += made if i == todo[0] else 0
            found[i] = replace(solution, x=systems[i].size * solution.x, n_matvec=used)
        return found

    def _prepare(self, like: Tensor, memory: Memory | None) -> Products[Any]:
        """Make what all systems with one A share.

        Args:
            like: a vector of the systems' length, dtype and device.
            memory: see `solve`.
        """
        return None
        yield  # a generator that asks for no product

    @abstractmethod
    def _solve(self, b: Tensor, x0: Tensor | None, size: float, shared: Any) -> Products[Solution]:
        """Solve with checked arguments and ‖b‖ = 1, so that residuals are relative.

        The caller counts the products: `n_matvec` of what is returned is not used.

        Args:
            b: right-hand side divided by its norm.
            x0: start divided by the same number.
            size: that number, for absolute tolerances.
            shared: from `_prepare`.
        """


@dataclass(frozen=True)
class _Scaled:
    """A system with ‖b‖ = 1, or with b = 0 and size 0."""

    b: Tensor
    x0: Tensor | None
    size: float

    @classmethod
    def of(cls, b: Tensor, x0: Tensor | None) -> _Scaled:
        """Check a system and scale it."""
        if b.dim() != 1 or not b.is_floating_point():
            raise ValueError(
                f"b must be a floating vector, but got shape {tuple(b.shape)} and dtype {b.dtype}."
            )
        if x0 is not None and x0.shape != b.shape:
            raise ValueError(f"x0 has shape {tuple(x0.shape)}, but b has {tuple(b.shape)}.")
        for name, vector in (("b", b), ("x0", x0)):
            if vector is not None and not bool(torch.isfinite(vector).all()):
                raise FloatingPointError(f"{name} must be finite, but has NaN or infinite entries.")
        largest = float(torch.linalg.vector_norm(b, torch.inf)) if b.numel() else 0.0
        if largest == 0.0:
            return cls(torch.zeros_like(b), None, 0.0)
        # In two steps, because squares of large or small entries leave the range of float32.
        scaled = b / largest
        length = norm(scaled)
        size = largest * length
        return cls(scaled / length, None if x0 is None else x0 / size, size)


def _run(iterations: Sequence[Products[T]], matvec: Matvec, vectorize: bool) -> list[tuple[T, int]]:
    """Run computations in step; return what each returned and the products it used."""
    done: dict[int, T] = {}
    used = [0] * len(iterations)
    replies: dict[int, Tensor | None] = dict.fromkeys(range(len(iterations)))
    while True:
        asked: dict[int, Tensor] = {}
        for i, reply in replies.items():
            try:
                # The first `send` of a generator has to be None.
                asked[i] = iterations[i].send(reply)  # type: ignore[arg-type]
            except StopIteration as stop:
                done[i] = stop.value
                continue
            used[i] += 1 if asked[i].dim() == 1 else len(asked[i])
        if not asked:
            return [(done[i], used[i]) for i in range(len(iterations))]
        replies = dict(zip(asked, _products(list(asked.values()), matvec, vectorize), strict=True))


def _products(asked: list[Tensor], matvec: Matvec, vectorize: bool) -> Sequence[Tensor]:
    if len(asked) == 1 and asked[0].dim() == 1:
        return [matvec(asked[0])]
    rows = torch.cat([v.reshape(-1, v.shape[-1]) for v in asked])
    if vectorize and len(rows) > 1:
        found: Tensor = torch.vmap(matvec)(rows)
    else:
        found = torch.stack([matvec(v) for v in rows])
    parts = torch.split(found, [v.numel() // v.shape[-1] for v in asked])
    return [part.reshape(v.shape) for part, v in zip(parts, asked, strict=True)]


def norm(v: Tensor) -> float:
    """‖v‖₂ as a number."""
    return float(torch.linalg.vector_norm(v))


def start(b: Tensor, x0: Tensor | None, damping: float = 0.0) -> Products[tuple[Tensor, Tensor]]:
    """Return x and its residual b − (A + damping · I) x, for ‖b‖ = 1.

    A start worse than zero is dropped.
    """
    if x0 is not None and bool(x0.any()):
        r = b - (yield from damped(x0, damping))
        if norm(r) < 1.0:
            return x0, r
    return torch.zeros_like(b), b


def damped(v: Tensor, damping: float) -> Products[Tensor]:
    """Return (A + damping · I) v."""
    av = yield v
    return torch.add(av, v, alpha=damping) if damping else av


def asymmetric(u: Tensor, au: Tensor, v: Tensor, av: Tensor) -> bool:
    """Tell from two products whether A is not symmetric: uᵀAv ≠ vᵀAu.

    Wide of rounding, because the products may be evaluated in fewer digits than the vectors have.
    """
    difference = abs(float(torch.dot(u, av)) - float(torch.dot(v, au)))
    size = norm(u) * norm(av) + norm(v) * norm(au)
    return bool(difference > torch.finfo(u.dtype).eps ** 0.25 * size)


def finite(value: float, what: str) -> float:
    """Return `value`, or raise FloatingPointError where it is NaN or infinite."""
    if value - value != 0.0:
        raise FloatingPointError(
            f"{what} is {value}: a product with the operator is not finite, or it overflowed."
        )
    return value
