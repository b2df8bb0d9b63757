"""How a hypergradient was obtained, or why its solver stopped early."""

from __future__ import annotations

from enum import Enum

__all__ = ["Status"]


class Status(Enum):
    """Outcome of an estimator or a linear solver; never discarded, never silent.

    `ok` is true where the result is what was asked for: the tolerance was met, or no
    tolerance was involved.  A result with `ok` false is the best iterate found.
    """

    EXACT = "exact", True, "the derivative of the computation itself; no iterative solve"
    CONVERGED = "converged", True, "the residual reached the tolerance"
    APPROXIMATE = "approximate", True, "biased by construction: a truncated or one-step formula"
    MAX_ITER = "max_iter", False, "the iteration limit came before the tolerance"
    STALLED = "stalled", False, "rounding stopped the residual above the tolerance"
    NEGATIVE_CURVATURE = (
        "negative_curvature",
        False,
        "the operator is not positive definite: params are not at an inner minimum; "
        "add damping or use a GGN operator",
    )
    NOT_SYMMETRIC = (
        "not_symmetric",
        False,
        "the operator is not symmetric, but the solver needs that it is; use GMRES or Direct",
    )
    BREAKDOWN = "breakdown", False, "the operator is singular along a direction"
    DIVERGED = "diverged", False, "the residual grew: the iteration does not contract"

    ok: bool
    message: str

    def __new__(cls, value: str, ok: bool, message: str) -> Status:
        member = object.__new__(cls)
        member._value_ = value
        member.ok = ok
        member.message = message
        return member

    def __str__(self) -> str:
        return f"{self.value}: {self.message}"
