"""MAID: descent with inexact hypergradients whose accuracy adapts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from bilevel.inexact.armijo import FixedAccuracy
from bilevel.inexact.base import positive
from bilevel.inexact.constants import BOUND, VALUE
from bilevel.inexact.hypergradient import InexactHypergradient, Tools, estimate_error

__all__ = ["MAID", "DescentTest"]

DescentTest = Literal["certified", "estimate", "off"]


@dataclass(frozen=True, kw_only=True)
class MAID(FixedAccuracy):
    """Method of adaptive inexact descent: `FixedAccuracy` whose ε and δ find their level.

    The descent test asks for ω ≤ (1 - η) ‖z‖, ω a bound on ‖z - ∇f‖; where it fails, and where a
    line search does, ε and δ shrink by ν and the step size is *reset*, because a sufficient
    decrease cannot be certified below a least step size however small α is.  Every failure adds
    a trial to the next line search.  After an accepted step ε and δ grow by ν̄.

    With "certified" and given constants the method converges, ‖∇f(θ_k)‖ → 0 (theorem 3.19).  The
    bound is pessimistic: "estimate" tests the goal-oriented estimate of the error (two more
    linear systems), and "off" nothing.  The certified decrease of accepted steps is the same.

    The run ends where rounding stops the accuracy (status LINESEARCH, "accuracy floor"), or at
    `tolerance`.  In the trace `certified` is 1 where no constant in use was estimated; `omega`
    or `error_estimate` is what the test looked at.

    Attributes:
        descent_test: "certified", "estimate" or "off".
        eta: η, the margin of the descent test.
        nu: ν, factor of ε and δ for more accuracy.
        nu_bar: ν̄, factor of ε and δ after an accepted step.
        eps_floor: the run ends where it would need a smaller ε; None leaves that to rounding.
        max_refinements: the run ends after so many refinements without an accepted step.

    Source: Salehi, Mukherjee, Roberts and Ehrhardt 2025 (arXiv 2308.10098), algorithms 3.1, 3.2.
    """

    lam: float = 0.1
    descent_test: DescentTest = "certified"
    eta: float = 0.5
    nu: float = 0.5
    nu_bar: float = 1.05
    eps_floor: float | None = None
    max_refinements: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.descent_test not in get_args(DescentTest):
            raise ValueError(
                f"MAID: descent_test must be one of {list(get_args(DescentTest))}, but got "
                f"{self.descent_test!r}."
            )
        if not self.lam < self.eta < 1:
            raise ValueError(
                f"MAID: 0 < lam < eta < 1 must hold, but lam = {self.lam!r}, eta = {self.eta!r}."
            )
        if not 0 < self.nu < 1 or not 1 <= self.nu_bar < math.inf:
            raise ValueError(
                f"MAID: nu must be in (0, 1) and nu_bar at least 1, but got {self.nu!r} and "
                f"{self.nu_bar!r}."
            )
        if self.eps_floor is not None:
            positive("MAID", eps_floor=self.eps_floor)
        if self.max_refinements < 1:
            raise ValueError(
                f"MAID: max_refinements must be at least 1, but got {self.max_refinements!r}."
            )

    def _finer(self, search: dict[str, Any], why: str) -> str | None:
        if self.eps_floor is not None and search["eps"] <= self.eps_floor:
            return f"accuracy floor: {why} at ε = {search['eps']:.3g}, eps_floor={self.eps_floor:g}"
        if search["refinements"] >= self.max_refinements:
            return f"{why} after {search['refinements']} refinements, at ε = {search['eps']:.3g}"
        search["eps"] *= self.nu
        search["delta"] *= self.nu
        search["refinements"] += 1
        return None

    def _coarser(self, search: dict[str, Any]) -> None:
        search["eps"] *= self.nu_bar
        search["delta"] *= self.nu_bar

    def _test(
        self, tools: Tools, found: InexactHypergradient, theta: Tensor
    ) -> tuple[float | None, bool]:
        if self.descent_test == "off" or not found.norm:
            return found.omega, found.norm > 0
        error = found.omega
        if self.descent_test == "estimate":
            error = estimate_error(tools, found, theta)
        return error, error is not None and error <= (1 - self.eta) * found.norm

    @property
    def _needed(self) -> frozenset[str]:
        return BOUND if self.descent_test == "certified" else VALUE
