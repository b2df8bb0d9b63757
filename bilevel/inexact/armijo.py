"""Inexact descent with a line search that certifies its decrease, at one fixed accuracy."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bilevel.algorithm import OuterStep
from bilevel.inexact.base import InexactAlgorithm, InexactState, certified, diverged, positive
from bilevel.inexact.bounds import rounding
from bilevel.inexact.constants import VALUE
from bilevel.inexact.hypergradient import (
    InexactHypergradient,
    Tools,
    estimate_error,
    inexact_hypergradient,
)
from bilevel.inexact.line_search import Outcome, try_point
from bilevel.inner import Inner
from bilevel.metrics import RunStatus
from hypergrad import Status

__all__ = ["FixedAccuracy"]


@dataclass(frozen=True, kw_only=True)
class FixedAccuracy(InexactAlgorithm):
    """Gradient descent with inexact hypergradients and a line search at one accuracy ε = δ.

    A step is taken where the inexact sufficient decrease holds,

        ψ(α) = U⁺(θ - α z) - U⁻(θ) + λ α ‖z‖² ≤ 0,   U⁻ ≤ f ≤ U⁺ from the value bounds (2.3),

    which implies f(θ - α z) ≤ f(θ) - λ α ‖z‖² for the true f.  With a projection, α ‖z‖² becomes
    ‖θ - θ⁺‖²/α.  A trial whose solve is not finite, or ends at the cap, is rejected.  The run
    ends where no step passes: at a loose ε that is far from the optimum.

    Attributes:
        eps: accuracy of the lower level, an absolute distance.
        delta: residual of the adjoint system; None for the same number.
        alpha: first step size; None for 0.1 √d/‖z‖, a move of 0.1 in each coordinate.
        rho: step size factor after a rejected trial.
        rho_bar: step size factor after an accepted one.
        lam: λ, the Armijo fraction.
        max_backtracks: trials of one line search.
        barzilai_borwein: begin each line search at ‖Δθ‖²/⟨Δθ, Δz⟩ where that is positive, and
            at most at ten times the step size that would come next without it.
        nonmonotone: ζ in [0, 1): compare with the Zhang–Hager average of earlier lower bounds
            instead of the last one; 0 is monotone.  Where nothing tests z, as here and in
            ``MAID(descent_test="off")``, f may then rise as far as that average.
        tolerance: converged where ‖z‖ and its error (bound, or estimate) are at most this.
        work: most lower-level gradients of one outer step, a multiple of `lower_cap`; a line
            search that needs more goes on in the next outer step.

    Raises:
        ValueError: an argument out of its range.

    Source: Salehi et al. 2025, lemma 3.5; Zhang and Hager 2004; Barzilai and Borwein 1988.
    """

    eps: float = 0.1
    delta: float | None = None
    alpha: float | None = None
    rho: float = 0.5
    rho_bar: float = 10 / 9
    lam: float = 1e-4
    max_backtracks: int = 10
    barzilai_borwein: bool = False
    nonmonotone: float = 0.0
    tolerance: float | None = None
    work: int = 4000

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        positive(name, eps=self.eps)
        for key in ("delta", "alpha", "tolerance"):
            value = getattr(self, key)
            if value is not None:
                positive(name, **{key: value})
        if not 0 < self.rho < 1 or not 1 <= self.rho_bar < math.inf:
            raise ValueError(
                f"{name}: rho must be in (0, 1) and rho_bar at least 1, but got {self.rho!r} and "
                f"{self.rho_bar!r}."
            )
        if not 0 < self.lam < 1:
            raise ValueError(f"{name}: lam must be in (0, 1), but got {self.lam!r}.")
        if self.max_backtracks < 1:
            raise ValueError(
                f"{name}: max_backtracks must be at least 1, but got {self.max_backtracks!r}."
            )
        if not 0 <= self.nonmonotone < 1:
            raise ValueError(
                f"{name}: nonmonotone must be in [0, 1), but got {self.nonmonotone!r}."
            )
        if self.work < 2 * self.lower_cap:
            raise ValueError(
                f"{name}: work must be at least 2 lower_cap = {2 * self.lower_cap}, one solve at θ "
                f"and one at a trial point, but got {self.work!r}."
            )

    def next_steps(self, state: InexactState) -> int:
        """See `OuterAlgorithm.next_steps`."""
        return self.work

    def _start(self) -> dict[str, Any]:
        return {
            "eps": self.eps, "delta": self.eps if self.delta is None else self.delta,
            "alpha": self.alpha, "tried": 0, "trial_alpha": None, "failures": 0, "refinements": 0,
            "reference": None, "weight": 1.0, "last_theta": None, "last_z": None,
        }  # fmt: skip

    # How accuracy adapts; not at all here.

    def _finer(self, search: dict[str, Any], why: str) -> str | None:
        """Ask for more accuracy, or say why there is none."""
        return f"{why} at the fixed accuracy ε = {search['eps']:.3g}; use a smaller eps, or MAID"

    def _coarser(self, search: dict[str, Any]) -> None:
        """Take less accuracy after an accepted step."""

    def _test(
        self, tools: Tools, found: InexactHypergradient, theta: Tensor
    ) -> tuple[float | None, bool]:
        """Return the error of z that was looked at, and whether z is good enough."""
        return None, found.norm > 0

    @property
    def _needed(self) -> frozenset[str]:
        return VALUE

    def step(self, inner: Inner, state: InexactState) -> tuple[OuterStep, InexactState]:
        """See `OuterAlgorithm.step`.

        Raises:
            Diverged: a loss, a derivative or a constant is not finite at the current point.
            NotStronglyConvexError: the inner loss has no positive μ there.
            ValueError: a hyperparameter enters neither loss.
        """
        tools = self._tools(inner, state)
        try:
            return self._step(inner, state, tools)
        except FloatingPointError as error:
            raise diverged(error, tools) from error

    def _step(
        self, inner: Inner, state: InexactState, tools: Tools
    ) -> tuple[OuterStep, InexactState]:
        level, theta, search = tools.level, state["theta"], dict(state["search"])
        x, q, memory = level.start, state["q"], state["memory"]
        while True:
            tools = self._within(tools)
            found, memory = inexact_hypergradient(
                tools, x, theta, search["eps"], search["delta"], memory, q, self._needed
            )
            x, q = found.x, found.q
            unsolved = found.solve_status is Status.MAX_ITER
            error, good = self._test(tools, found, theta)
            stop = None if unsolved else self._converged(tools, found, theta, error)
            outcome: Outcome | None = None
            if stop is None and good:
                outcome = self._search(tools, found, theta, search, memory)
                if outcome.trial is not None or outcome.waiting:
                    break
            if stop is None and not unsolved:
                why = "no step size passes" if good else "the hypergradient fails the descent test"
                if found.norm == 0:
                    why = "z is zero, δ being above ‖∇g‖,"
                stop = self._floor(found, outcome, good) or self._finer(search, why)
            if stop is not None or level.steps > self.work - self.lower_cap:
                break
        converged = stop is not None and stop.startswith("converged")
        status = RunStatus.RUNNING
        if stop is not None:
            status = RunStatus.CONVERGED if converged else RunStatus.LINESEARCH
        used = (self._needed | {"mu", "L_g"}) - {"L"}
        sure = not self.damping and certified(found.constants, frozenset(used), found)
        extra = {
            "eps": search["eps"], "delta": search["delta"], "alpha": search["alpha"] or 0.0,
            "accepted": 0.0, "tried": float(search["tried"]), "z_norm": found.norm,
            "refinements": float(search["refinements"]), "start_loss": found.value,
        }  # fmt: skip
        if error is not None:
            extra["omega" if found.omega is not None else "error_estimate"] = error
        loss, where = found.value, theta
        if outcome is not None and outcome.trial is not None:
            trial = outcome.trial
            x, where, loss = trial.x, trial.theta, trial.value
            extra |= {"accepted": 1.0, "alpha": outcome.alpha, "tried": float(outcome.tried)}
            extra |= {"lower": trial.lower, "upper": trial.upper}
            q_weight = self.nonmonotone * search["weight"]
            reference = found.lower if search["reference"] is None else search["reference"]
            search["reference"] = (q_weight * reference + trial.lower) / (q_weight + 1)
            search["weight"] = q_weight + 1
            search |= {
                "alpha": self.rho_bar * outcome.alpha, "trial_alpha": None, "tried": 0,
                "failures": 0, "refinements": 0, "last_theta": theta, "last_z": found.z,
            }  # fmt: skip
            self._coarser(search)
        self._adopt(inner, tools, x, where)
        bound = found.omega if found.omega is not None and sure else None
        report = self._report(
            tools, found, where, loss, extra,
            certified=sure, error_bound=bound, status=status, reason=stop or "",
        )  # fmt: skip
        return report, {
            "step": state["step"] + 1,
            "theta": where,
            "q": q,
            "memory": memory,
            "search": search,
        }

    def _within(self, tools: Tools) -> Tools:
        """Return the tools with the cap that is left of this outer step's work."""
        left = max(1, min(self.lower_cap, self.work - tools.level.steps))
        return replace(tools, lower_cap=left)

    def _converged(
        self, tools: Tools, found: InexactHypergradient, theta: Tensor, error: float | None
    ) -> str | None:
        """Say that θ is stationary, where it is."""
        if found.omega == 0 and found.norm == 0:
            return "converged: the hypergradient and its error bound are zero"
        nonzero = found.outer.gradient.norm(dim=1) > 0
        answered = bool((found.q.abs().amax(1) > 0)[nonzero].all())
        if found.norm == 0 and answered:
            return "converged: the hypergradient is exactly zero"
        if self.tolerance is None or found.norm > self.tolerance or found.norm == 0:
            return None
        if error is None:
            error = estimate_error(tools, found, theta)
        if error > self.tolerance:
            return None
        return f"converged: ‖z‖ = {found.norm:.3g} and its error are within the tolerance"

    def _floor(
        self, found: InexactHypergradient, outcome: Outcome | None, good: bool
    ) -> str | None:
        """Say that the step is zero, or that rounding leaves no more accuracy, where it does."""
        if outcome is not None and outcome.stationary:
            return "converged: the projected step is zero, all moving coordinates are at a bound"
        dtype, eps = found.z.dtype, float(found.eps.max())
        if outcome is not None and outcome.hidden:
            return f"accuracy floor: rounding in {dtype} hides the differences of f that are left"
        solve = found.solve_status is Status.STALLED
        if solve and (good or found.adjoint.status is Status.STALLED):
            what = "no step passes" if good else "the descent test fails"
            return f"accuracy floor: rounding in {dtype} stops ε at {eps:.3g}, and {what}"
        return None

    def _first_alpha(self, found: InexactHypergradient, theta: Tensor, search: Any) -> float:
        """Return the step size that the line search begins with."""
        if search["trial_alpha"] is not None:
            return float(search["trial_alpha"])
        if search["alpha"] is None:
            search["alpha"] = 0.1 * math.sqrt(len(theta)) / found.norm
        if self.barzilai_borwein and search["last_z"] is not None:
            s, y = theta - search["last_theta"], found.z - search["last_z"]
            sy = float(s.double() @ y.double())
            if sy > 0:
                # Unbounded, one long step into a huge κ costs a whole lower-level cap.
                return min(float(s.double() @ s.double()) / sy, 10.0 * float(search["alpha"]))
        return float(search["alpha"])

    def _search(
        self,
        tools: Tools,
        found: InexactHypergradient,
        theta: Tensor,
        search: dict[str, Any],
        memory: dict[str, Any],
    ) -> Outcome:
        """Backtrack until ψ ≤ 0, the trials are spent, or the work of this outer step is."""
        level = tools.level
        alpha = self._first_alpha(found, theta, search)
        noise, move = rounding(found.outer.values), 0.0
        reference = found.lower
        if self.nonmonotone and search["reference"] is not None:
            reference = max(reference, search["reference"])
        for tried in range(search["tried"], self.max_backtracks + search["failures"]):
            if level.steps > self.work - self.lower_cap:
                search |= {"tried": tried, "trial_alpha": alpha}
                return Outcome(waiting=True)
            where = level.chart.project(theta - alpha * found.z)
            move = float((where - theta).double().norm())
            if move == 0.0:
                return Outcome(stationary=level.chart.kind == "box")
            trial = try_point(self._within(tools), found.x, where, search["eps"], memory)
            if trial is None:  # too bold: the next line search begins below it, too
                search["alpha"] = min(search["alpha"] or alpha, self.rho * alpha)
            elif trial.upper - reference + self.lam * move**2 / alpha <= 0:
                return Outcome(trial, alpha=alpha, tried=tried + 1)
            alpha *= self.rho
        search |= {"tried": 0, "trial_alpha": None, "failures": search["failures"] + 1}
        exact = found.upper - found.lower <= 4 * noise
        return Outcome(hidden=exact and move**2 / (alpha / self.rho) <= 16 * noise)
