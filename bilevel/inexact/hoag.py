"""HOAG: hypergradient descent with accuracies from a schedule and step sizes from a heuristic."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bilevel.algorithm import OuterStep
from bilevel.inexact.base import InexactAlgorithm, InexactState, diverged, positive
from bilevel.inexact.hypergradient import inexact_hypergradient
from bilevel.inner import Inner
from bilevel.metrics import RunStatus
from bilevel.single_loop import Decay

__all__ = ["HOAG", "AccuracySchedule", "Geometric"]


@dataclass(frozen=True)
class Geometric:
    """ε_k = first · ratioᵏ.

    Raises:
        ValueError: an argument out of its range.
    """

    first: float = 0.1
    ratio: float = 0.9

    def __post_init__(self) -> None:
        positive("Geometric", first=self.first)
        if not 0 < self.ratio < 1:
            raise ValueError(f"Geometric: ratio must be in (0, 1), but got {self.ratio!r}.")

    def __call__(self, k: int) -> float:
        """Return ε_k."""
        return float(self.first * self.ratio**k)


AccuracySchedule = Geometric | Decay
"""ε_k for outer step k = 0, 1, ..."""


@dataclass(frozen=True, kw_only=True)
class HOAG(InexactAlgorithm):
    """Hyperparameter optimization with approximate gradient.

    Lower level and adjoint are solved to ε_k.  With s the length of the last move and Λ the
    inverse step size, first ‖z₀‖/√d,

        g_k ≤ g_{k-1} + C ε_k + (C + 1) ε_{k-1} s - Λ s²:  Λ ← 0.95 Λ, step;
        g_k ≥ 1.2 g_{k-1}:  go back, Λ ← 2 Λ, halve all further ε;
        else step.

    There is no certificate: the schedule is chosen by hand.

    Attributes:
        schedule: ε_k, summable: a `Geometric`, or a `Decay` of power above 1.
        alpha: first step size 1/Λ; None for √d/‖z₀‖.
        slack: C.
        tolerance: converged where ‖z‖ is at most this.

    Source: Pedregosa 2016 (arXiv 1602.02355), with the step size rule of its published code.
    """

    schedule: AccuracySchedule = field(default_factory=partial(Decay, 0.1, 2.0))
    alpha: float | None = None
    slack: float = 0.25
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("alpha", "tolerance"):
            if getattr(self, key) is not None:
                positive("HOAG", **{key: getattr(self, key)})
        if not self.slack >= 0:
            raise ValueError(f"HOAG: slack must be at least 0, but got {self.slack!r}.")

    def _start(self) -> dict[str, Any]:
        return {
            "inverse": None if self.alpha is None else 1 / self.alpha,
            "scale": 1.0, "last_value": None, "last_eps": 0.0, "moved": 0.0, "last_theta": None,
        }  # fmt: skip

    def step(self, inner: Inner, state: InexactState) -> tuple[OuterStep, InexactState]:
        """See `OuterAlgorithm.step`.

        Raises:
            Diverged: a loss, a derivative or a constant is not finite.
            NotStronglyConvexError: the inner loss has no positive μ.
            ValueError: a hyperparameter enters neither loss.
        """
        tools, search, theta = self._tools(inner, state), dict(state["search"]), state["theta"]
        level = tools.level
        eps = search["scale"] * self.schedule(state["step"])
        try:
            found, memory = inexact_hypergradient(
                tools, level.start, theta, eps, eps, state["memory"], state["q"]
            )
        except FloatingPointError as error:
            raise diverged(error, tools) from error
        if search["inverse"] is None and found.norm > 0:
            search["inverse"] = found.norm / math.sqrt(len(theta))
        value, last, s = found.value, search["last_value"], search["moved"]
        extra = {"eps": eps, "alpha": 1 / search["inverse"] if search["inverse"] else 0.0}
        status, reason = RunStatus.RUNNING, ""
        if self.tolerance is not None and 0 < found.norm <= self.tolerance:
            status, reason = RunStatus.CONVERGED, f"‖z‖ = {found.norm:.3g} is within the tolerance"
        report = self._report(
            tools, found, theta, value, extra, certified=False, status=status, reason=reason
        )
        back = last is not None and value >= last + 0.2 * abs(last)
        going = theta
        if back:
            going = search["last_theta"]
            search |= {"inverse": 2 * search["inverse"], "scale": search["scale"] / 2}
            search |= {"last_value": None}
        elif search["inverse"] is not None and status is RunStatus.RUNNING:
            allowed = self.slack * eps + (self.slack + 1) * search["last_eps"] * s
            if last is not None and value <= last + allowed - search["inverse"] * s**2:
                search["inverse"] *= 0.95
            going = level.chart.project(theta - found.z / search["inverse"])
            search |= {"last_theta": theta, "last_value": value, "last_eps": eps}
            search["moved"] = float((going - theta).double().norm())
        self._adopt(inner, tools, found.x, theta)
        inner.set_hparams(level.chart.hparams(going))
        return report, {
            "step": state["step"] + 1,
            "theta": going,
            "q": found.q,
            "memory": memory,
            "search": search,
        }

    def retreat(self, inner: Inner, state: InexactState) -> InexactState | None:
        """Go back half of the last move and double Λ; see `OuterAlgorithm.retreat`."""
        search = state["search"]
        if search["last_theta"] is None:
            return None
        theta = (state["theta"] + search["last_theta"]) / 2
        inner.set_hparams(self._chart(inner).hparams(theta))
        moved, inverse = search["moved"] / 2, 2 * search["inverse"]
        return {**state, "theta": theta, "search": {**search, "moved": moved, "inverse": inverse}}
