"""Unconstrained coordinates z of bounded values v = T(z), and schedules over training progress.

With σ the logistic function and s(z) = log(1 + eᶻ), T is

    ==========================  =====================================
    linear, low and high        v = low + (high - low) σ(z)
    linear, low only            v = low + s(z)
    linear, high only           v = high - s(-z)
    linear, no bounds           v = z
    log                         v = exp(u), u = T(z) for the linear
                                scale with the logarithms as bounds
    simplex of n elements       stick breaking, z has n - 1 elements
    ==========================  =====================================

All of them increase in z, except that an element of a simplex also falls as earlier ones rise.
They are compositions of `torch.distributions.transforms`, by `biject_to` where it has one.
Hypergradients with respect to z follow from those with respect to v by the chain rule.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import (
    AffineTransform,
    ComposeTransform,
    ExpTransform,
    SoftplusTransform,
    Transform,
)

from bilevel.domains import Grad

__all__ = ["bijection", "constrain", "coordinate", "coordinate_shape", "interpolate"]


class _Exp(ExpTransform):
    """exp that stays finite: exponents are cut just below overflow."""

    def _call(self, x: Tensor) -> Tensor:
        info = torch.finfo(x.dtype)
        return x.clamp(max=math.log(info.max) * (1 - 4 * info.eps)).exp()


class _Softplus(SoftplusTransform):
    """log(1 + eˣ) to the last digit; torch's own is off by 2e-9 where it turns linear."""

    def _call(self, x: Tensor) -> Tensor:
        return torch.logaddexp(x, torch.zeros_like(x))


@lru_cache(maxsize=1024)
def bijection(low: float | None, high: float | None, scale: str) -> Transform:
    """Return T for given bounds; `T(z)` is a value and `T.inv(v)` its coordinate.

    Args:
        low: lower bound or None.
        high: upper bound or None.
        scale: "linear", "log" or "simplex"; see `Grad`.
    """
    if scale == "simplex":
        return cast(Transform, biject_to(constraints.simplex))
    if scale == "log":
        logs = [None if bound is None else math.log(bound) for bound in (low, high)]
        return ComposeTransform([bijection(logs[0], logs[1], "linear"), _Exp()])
    if low is not None and high is not None:
        interval = constraints.interval(low, high)  # type: ignore[no-untyped-call]
        return cast(Transform, biject_to(interval))
    if low is not None:
        return ComposeTransform([_Softplus(), AffineTransform(low, 1.0)])
    if high is not None:
        mirror = AffineTransform(0.0, -1.0)
        return ComposeTransform([mirror, _Softplus(), AffineTransform(high, -1.0)])
    return cast(Transform, biject_to(constraints.real))


def coordinate_shape(domain: Grad) -> tuple[int, ...]:
    """Return the shape of z: that of a value, a simplex has one element less."""
    shape = domain.value_shape
    return (*shape[:-1], shape[-1] - 1) if domain.scale == "simplex" else shape


def coordinate(domain: Grad, value: Tensor) -> Tensor:
    """Return z = T⁻¹(v), differentiable and finite for every value strictly inside the bounds.

    Args:
        domain: bounds and scale.
        value: float32 or float64, shape `domain.value_shape`, as `Grad.check` returns it.
    """
    z = bijection(domain.low, domain.high, domain.scale).inv(value)
    # Close to a bound, the distance to it can round to zero and its logarithm to -inf.
    limit = -math.log(torch.finfo(value.dtype).tiny)
    return torch.nan_to_num(z, nan=math.nan, posinf=limit, neginf=-limit)


def constrain(domain: Grad, z: Tensor) -> Tensor:
    """Return v = T(z), strictly inside the bounds however large z is; differentiable.

    Where T(z) rounds onto a bound, the nearest number inside is returned; the derivative is
    still that of T, so that an optimizer can come back from there.

    Args:
        domain: bounds and scale.
        z: float32 or float64, shape `coordinate_shape(domain)`.
    """
    value = bijection(domain.low, domain.high, domain.scale)(z)
    low, high = domain.limits(value.dtype)
    if low is None and high is None:
        return cast(Tensor, value)
    exact = value.detach()
    return cast(Tensor, value + (exact.clamp(low, high) - exact))


def interpolate(domain: Grad, knots: Tensor, progress: float | Tensor) -> Tensor:
    """Return the value of a schedule at a progress t ∈ [0, 1]; differentiable in knots and t.

    Knot i of k stands at tᵢ = i/(k - 1).  Between knots v is linear in t; on a log scale log v
    is.  Bounds and simplex hold between knots because they hold at them.

    Args:
        domain: a `Grad` with a schedule.
        knots: shape (k, *shape).
        progress: steps done over all steps, a number or a tensor with one element.

    Returns:
        A tensor of `domain.shape`.

    Raises:
        ValueError: no schedule, knots of another shape, or t outside [0, 1].
    """
    if domain.schedule is None:
        raise ValueError("interpolate: the domain has no schedule; its value is constant.")
    if knots.shape != domain.value_shape:
        raise ValueError(
            f"knots must have shape {domain.value_shape}, but got {tuple(knots.shape)}."
        )
    t = float(progress.detach()) if isinstance(progress, Tensor) else float(progress)
    if not 0 <= t <= 1:
        raise ValueError(f"progress must be in [0, 1], but got {t}.")
    last = domain.schedule - 1
    left = min(int(t * last), last - 1)
    start, end = knots[left], knots[left + 1]
    weight = torch.as_tensor(progress, dtype=knots.dtype, device=knots.device) * last - left
    if domain.scale == "log":
        return torch.exp(torch.lerp(start.log(), end.log(), weight))
    return torch.lerp(start, end, weight)
