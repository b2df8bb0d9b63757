"""Smoothness constants of a nested problem: given by the user, or estimated and marked so."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bilevel.inexact import probes
from hypergrad.tree import Tree

if TYPE_CHECKING:
    from bilevel.inexact.level import Level, Point

__all__ = ["BOUND", "VALUE", "Constants", "NotStronglyConvexError", "Rule", "Smoothness"]

Rule = float | Callable[[Mapping[str, Tensor], Tree], "float | Tensor"]
"""A number, or ``(hparams, params) -> number or (m,)``: one for all samples or one for each."""

VALUE = frozenset({"mu", "L", "L_g"})
"""What value bounds and lower-level solvers need."""

BOUND = VALUE | {"L_J", "L_Hinv", "jacobian", "L_direct"}
"""What the hypergradient bound needs."""


class NotStronglyConvexError(ValueError):
    """The inner loss has no positive strong convexity constant at these hyperparameters."""


@dataclass(frozen=True)
class Constants:
    """Constants at a point, tensors of shape (m,): one entry for each sample.

    Derivatives in hyperparameters are those in θ.  What was not asked for is zero.

    Attributes:
        mu: h is μ-strongly convex in x.
        L: ∇ₓh is L-Lipschitz in x.
        L_g: ∇ₓg is Lipschitz in x.
        L_J: J = ∂²h/∂x∂θ is Lipschitz in x.
        L_Hinv: (∂²h/∂x²)⁻¹ is Lipschitz in x.
        jacobian: ‖J‖₂ at the point, or more.
        L_direct: ∂g/∂θ is Lipschitz in x.
        g_convex: whether g is convex in x.
        estimated: names of those that are estimates and no bounds.
    """

    mu: Tensor
    L: Tensor
    L_g: Tensor
    L_J: Tensor
    L_Hinv: Tensor
    jacobian: Tensor
    L_direct: Tensor
    g_convex: bool
    estimated: frozenset[str]


@dataclass(frozen=True)
class Smoothness:
    """Constants of single samples as functions of the hyperparameters; None is estimated.

    L_J, jacobian and L_direct concern derivatives in the hyperparameters h that the losses see;
    the chain rule to the coordinates θ that move is applied to them.  ‖J‖₂ is computed exactly
    where it is left out and θ (or x) has at most 32 entries.

    Estimates are never certificates.  μ is half the smallest Ritz value of 30 Lanczos steps, L
    and L_g are largest Ritz values plus a tenth, Lipschitz constants of second derivatives come
    from differences along the gradient and a random direction, times two.

    Attributes:
        mu: strong convexity of h in x.
        L: Lipschitz constant of ∇ₓh.
        L_g: of ∇ₓg.
        L_J: of J = ∂²h/∂x∂h in x.
        L_H: of ∂²h/∂x² in x; gives L_Hinv = L_H/μ².
        L_Hinv: of (∂²h/∂x²)⁻¹ in x.
        jacobian: bound on ‖J‖₂ at the given params.
        L_direct: Lipschitz constant in x of ∂g/∂h; needed where g depends on h directly.
        g_convex: whether g is convex in x, which makes value bounds tighter.
        every: outer steps between two estimates.
        assumed: names of constants that are given but no bounds, such as the penalty as μ of a
            network; they certify as little as estimates.
    """

    mu: Rule | None = None
    L: Rule | None = None
    L_g: Rule | None = None
    L_J: Rule | None = None
    L_H: Rule | None = None
    L_Hinv: Rule | None = None
    jacobian: Rule | None = None
    L_direct: Rule | None = None
    g_convex: bool = False
    every: int = 10
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "assumed":
                unknown = set(value) - {f.name for f in fields(self)}
                if unknown:
                    raise ValueError(f"Smoothness: assumed names no constant {sorted(unknown)}.")
            elif field.name == "every":
                if value < 1:
                    raise ValueError(f"Smoothness: every must be at least 1, but got {value!r}.")
            elif not (value is None or callable(value) or isinstance(value, bool)):
                least = None if field.name in {"mu", "L"} else 0.0
                _check(field.name, torch.tensor(float(value), dtype=torch.float64), None, least)

    def estimates(self, needed: Collection[str], direct: bool) -> frozenset[str]:
        """Return which of the needed constants are not given.

        Args:
            needed: names, `VALUE` or `BOUND`.
            direct: whether the outer loss depends on the hyperparameters directly.
        """
        missing = {name for name in needed if getattr(self, name) is None}
        if self.L_H is not None:
            missing.discard("L_Hinv")
        if not direct:
            missing.discard("L_direct")
        return frozenset(missing)

    def at(
        self,
        level: Level,
        x: Tensor,
        theta: Tensor,
        memory: Mapping[str, Any],
        needed: Collection[str] = VALUE,
        point: Point | None = None,
    ) -> tuple[Constants, dict[str, Any]]:
        """Return constants at a point, and what to remember for the next one.

        Args:
            level: the losses.
            x: (m, n).
            theta: (d,).
            memory: earlier estimates; {} at first.
            needed: names.
            point: the linearization at x, where there is one; needed for `BOUND`.

        Raises:
            NotStronglyConvexError: μ ≤ 0, given or estimated.
            ValueError: another constant out of its range; L < μ.
            FloatingPointError: a constant is not finite.
        """
        hparams, params = level.chart.hparams(theta), level.params(x)
        direct = level.direct
        missing = self.estimates(needed, direct)
        needed_in_theta = {"L_J", "jacobian", "L_direct"}
        stretch = level.chart.stretch(theta) if not needed_in_theta.isdisjoint(needed) else 1.0
        remembered = dict(memory)
        found: dict[str, Tensor] = {}
        for name in sorted(set(needed) - missing):
            rule = getattr(self, name)
            if name == "L_Hinv" and rule is None:
                continue
            if rule is None:  # L_direct of an outer loss without hyperparameters
                found[name] = x.new_zeros(level.samples)
                continue
            value = rule(hparams, params) if callable(rule) else rule
            given = _tensor(value, x).expand(level.samples)
            scale = stretch if name in needed_in_theta else 1.0
            least = None if name in {"mu", "L"} else 0.0
            found[name] = _check(name, given * scale, hparams, least)
        guesses = missing - {"jacobian"}
        if guesses:
            fresh = level.outer_step < remembered.get("until", -1) and guesses <= set(
                remembered.get("guesses", {})
            )
            if not fresh:
                made = probes.estimate(level, x, theta, guesses)
                remembered |= {"guesses": made, "until": level.outer_step + self.every}
            for name in guesses:
                guess = _tensor(remembered["guesses"][name], x)
                if name == "mu" and not guess > 0:
                    raise NotStronglyConvexError(
                        f"mu: the smallest curvature of the inner loss was estimated as "
                        f"{float(guess):.3g}, but it must be strongly convex; add a quadratic "
                        "penalty, or give mu."
                    )
                found[name] = guess.expand(level.samples)
        if "jacobian" in missing and point is not None:
            sizes, exact, v = probes.jacobian_norm(level, point, remembered.get("v"))
            found["jacobian"] = sizes
            if exact:
                missing -= {"jacobian"}
            else:
                remembered["v"] = v
        if "L_Hinv" in needed and "L_Hinv" not in found and self.L_H is not None:
            rule = self.L_H
            value = rule(hparams, params) if callable(rule) else rule
            given = _tensor(value, x).expand(level.samples)
            found["L_Hinv"] = _check("L_H", given, hparams, 0.0) / found["mu"].square()
        if "L" not in missing and "mu" not in missing:
            low = found["L"] < found["mu"] * (1 - 1e-6)
            if bool(low.any()):
                raise ValueError(
                    f"L must be at least mu, but L = {float(found['L'][low][0]):.6g} and mu = "
                    f"{float(found['mu'][low][0]):.6g} at {_shown(hparams)}."
                )
        found["L"] = torch.maximum(found["L"], found["mu"])
        zero = x.new_zeros(level.samples)
        names = [f.name for f in fields(Constants)][:7]
        numbers = {name: found.get(name, zero) for name in names}
        doubtful = missing | {name for name in self.assumed if name in needed}
        return Constants(**numbers, g_convex=self.g_convex, estimated=doubtful), remembered


def _tensor(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a constant as a tensor; a number keeps all its digits until the end."""
    tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    return tensor.detach().to(like)


def _check(
    name: str, value: Tensor, hparams: Mapping[str, Tensor] | None, least: float | None
) -> Tensor:
    """Return the value where it is finite and positive, or at least `least`."""
    at = "" if hparams is None else f" at {_shown(hparams)}"
    if not bool(torch.isfinite(value).all()):
        raise FloatingPointError(f"{name} must be finite, but got {value.tolist()}{at}.")
    if least is None and not bool((value > 0).all()):
        error = NotStronglyConvexError if name == "mu" else ValueError
        hint = ": the inner loss must be strongly convex" if name == "mu" else ""
        raise error(f"{name} must be positive, but got {float(value.min()):.6g}{at}{hint}.")
    if least is not None and not bool((value >= least).all()):
        raise ValueError(
            f"{name} must be at least {least:g}, but got {float(value.min()):.6g}{at}."
        )
    return value


def _shown(hparams: Mapping[str, Tensor]) -> str:
    parts = []
    for name, value in hparams.items():
        low, high = float(value.min()), float(value.max())
        span = f"{low:.4g}" if math.isclose(low, high) else f"{low:.4g} to {high:.4g}"
        parts.append(f"{name} = {span}")
    return ", ".join(parts)
