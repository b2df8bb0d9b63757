"""Rules for the weight of an average: how much of the old value stays.

See `bilevel.balanced_ema` for the formulas and their source.  A rule's setting may be a tensor with
one number, and the coefficient is then a tensor that is differentiable in it; norms are constants.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

from torch import Tensor

__all__ = [
    "Fixed",
    "Granularity",
    "LiteralRule",
    "Norms",
    "Polynomial",
    "Published",
    "Rule",
    "group_of",
    "measured",
    "summed",
]

Granularity = Literal["tensor", "layer", "global"]

Coefficient = float | Tensor


class Norms(NamedTuple):
    """What a rule may look at: L1 norms of one tensor, layer or set.

    Attributes:
        gradient: ‖g_t‖.
        change: ‖g_t − g_{t−1}‖; None without an earlier gradient.
        move: ‖θ_t − θ_{t−1}‖; None without an earlier value.
        lag: ‖θ_t − θ*_{t−1}‖.
        step: t, from 1.
    """

    gradient: float
    change: float | None
    move: float | None
    lag: float
    step: int


class Rule(ABC):
    """How β is chosen; subclasses are frozen dataclasses."""

    @abstractmethod
    def coefficient(self, norms: Norms) -> Coefficient | None:
        """Return β, or None where the rule says nothing."""

    def balance(self, norms: Norms, fallback: float) -> tuple[Coefficient, bool]:
        """Return β, and whether it is the fallback.

        Args:
            norms: of one group.
            fallback: β where the rule says nothing, or something outside (0, 1).
        """
        beta = self.coefficient(norms)
        return (fallback, True) if beta is None or not 0 < beta < 1 else (beta, False)


@dataclass(frozen=True)
class Fixed(Rule):
    """A constant β in [0, 1]; 0.99 is the usual EMA."""

    old: float | Tensor = 0.99

    def __post_init__(self) -> None:
        if not 0 <= self.old <= 1:
            raise ValueError(f"old must lie in [0, 1], but got {self.old}.")

    def coefficient(self, norms: Norms) -> Coefficient:
        return self.old

    def balance(self, norms: Norms, fallback: float) -> tuple[Coefficient, bool]:
        """Return β; the ends 0 and 1 are meant, and not a fallback."""
        return self.coefficient(norms), False


@dataclass(frozen=True)
class Polynomial(Rule):
    """1 − β = min(1, c/t): c = 1 is the mean of all iterates, c = 0.2 a strong baseline.

    The dynamics of `Published` under a constant drift tend to it (derived).
    """

    c: float | Tensor = 0.2

    def __post_init__(self) -> None:
        if not self.c > 0:
            raise ValueError(f"c must be positive, but got {self.c}.")

    def coefficient(self, norms: Norms) -> Coefficient:
        share = self.c / norms.step
        return 0.0 if share >= 1 else 1 - share

    def balance(self, norms: Norms, fallback: float) -> tuple[Coefficient, bool]:
        """Return β; the ends 0 and 1 are meant, and not a fallback."""
        return self.coefficient(norms), False


@dataclass(frozen=True)
class LiteralRule(Rule):
    """β = (‖g‖ + λ) ‖θ_t − θ_{t−1}‖ / (‖θ_t − θ*‖ ‖g_t − g_{t−1}‖).

    With λ = 0 it does not depend on the number of parameters.  λ = 1, the paper's, carries the
    units of a gradient.
    """

    trade_off: float | Tensor = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.trade_off < math.inf:
            raise ValueError(f"trade_off must not be negative, but got {self.trade_off}.")

    def coefficient(self, norms: Norms) -> Coefficient | None:
        if not norms.change or not norms.move or not norms.lag:
            return None
        return (norms.gradient + self.trade_off) * norms.move / (norms.lag * norms.change)


@dataclass(frozen=True)
class Published(Rule):
    """1 − β = κ (1 + ‖g‖) / (‖θ_t − θ*‖ ‖g_t − g_{t−1}‖), the released code with κ = 2.

    κ fits adapters of about 5 · 10⁵ numbers; 1 − β is inversely proportional to that size.
    """

    kappa: float | Tensor = 2.0

    def __post_init__(self) -> None:
        if not self.kappa > 0:
            raise ValueError(f"kappa must be positive, but got {self.kappa}.")

    def coefficient(self, norms: Norms) -> Coefficient | None:
        if not norms.change or not norms.lag:
            return None
        return 1 - self.kappa * (1 + norms.gradient) / (norms.lag * norms.change)


def group_of(name: str, granularity: Granularity) -> str:
    """Return the group of a tensor: its name, the name up to the last dot, or one for all.

    Raises:
        ValueError: an unknown granularity.
    """
    groups = {"tensor": name, "layer": name.rpartition(".")[0], "global": ""}
    if granularity not in groups:
        raise ValueError(f"granularity must be one of {list(groups)}, but got {granularity!r}.")
    return groups[granularity]


def measured(
    values: Mapping[str, Tensor],
    average: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    earlier: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None,
) -> dict[str, list[float]]:
    """Return ‖g‖ and the lag of each tensor and, given an earlier step, the change and the move.

    Sums in float64: L1 norms overflow in half precision.

    Args:
        values: θ_t.
        average: θ*_{t−1}.
        gradient: g_t.
        earlier: θ_{t−1} and g_{t−1}; None after the first step.
    """
    found = {}
    for name, value in values.items():
        terms = [gradient[name], value - average[name]]
        if earlier is not None:
            terms += [gradient[name] - earlier[1][name], value - earlier[0][name]]
        found[name] = [cast(float, t.abs().double().sum().item()) for t in terms]
    return found


def summed(
    each: Mapping[str, list[float]], granularity: Granularity, step: int
) -> dict[str, Norms]:
    """Return the norms of each group from those of its tensors."""
    totals: dict[str, list[float]] = {}
    for name, norms in each.items():
        group = group_of(name, granularity)
        totals[group] = [a + b for a, b in zip(totals.get(group, [0.0] * 4), norms, strict=False)]
    return {
        group: Norms(
            gradient=t[0],
            change=t[2] if len(t) > 2 else None,
            move=t[3] if len(t) > 2 else None,
            lag=t[1],
            step=step,
        )
        for group, t in totals.items()
    }
