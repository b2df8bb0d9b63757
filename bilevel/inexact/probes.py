"""Estimates of smoothness constants by products with derivatives: useful, and no certificates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bilevel.inexact.level import Level, Point

__all__ = ["EXACT_SIZE", "estimate", "jacobian_norm", "ritz_values"]

EXACT_SIZE = 32
"""‖J‖ is computed exactly where J has at most as many rows or columns."""

LANCZOS_STEPS = 30
POWER_STEPS = (15, 2)
"""Power iterations for ‖J‖ without and with the last call's vector."""


def estimate(
    level: Level, x: Tensor, theta: Tensor, names: Collection[str]
) -> dict[str, float | Tensor]:
    """Return estimates of the named constants at a point.

    Args:
        level: the losses.
        x: (m, n).
        theta: (d,).
        names: among "mu", "L", "L_g", "L_J", "L_Hinv", "L_direct".
    """
    found: dict[str, float | Tensor] = {}
    point = level.linearize(x, theta)
    if {"mu", "L", "L_Hinv"} & set(names):
        low, high = ritz_values(point.hvp, x)
        found |= {"mu": 0.5 * low, "L": 1.1 * high}
    if "L_g" in names:
        _, high = ritz_values(level.outer_hvp(x, theta), x)
        found["L_g"] = 1.1 * max(high, 0.0)
    if {"L_J", "L_Hinv", "L_direct"} & set(names):
        found |= _differences(level, x, theta, point, names, float(found.get("mu", math.nan)))
    return {name: found[name] for name in names}


def ritz_values(hvp: Callable[[Tensor], Tensor], like: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest Ritz value of `LANCZOS_STEPS` Lanczos steps.

    With full reorthogonalization; exact where the dimension is not larger than the steps.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(like.numel(), generator=generator, dtype=torch.float64)
    basis = [(v / v.norm()).to(like)]
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(min(LANCZOS_STEPS, like.numel())):
        w = hvp(basis[-1].reshape(like.shape)).reshape(-1)
        diagonal.append(float(w @ basis[-1]))
        stack = torch.stack(basis)
        for _ in range(2):
            w = w - stack.T @ (stack @ w)
        size = float(w.norm())
        if not math.isfinite(size):
            raise FloatingPointError("a product with a Hessian is not finite.")
        if size <= 1e3 * torch.finfo(like.dtype).eps * max(map(abs, diagonal)):
            break
        beside.append(size)
        basis.append(w / size)
    k = len(diagonal)
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    off = torch.tensor(beside[: k - 1], dtype=torch.float64)
    matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
    values = torch.linalg.eigvalsh(matrix)
    return float(values[0]), float(values[-1])


def jacobian_norm(
    level: Level, point: Point, v: Tensor | None = None
) -> tuple[Tensor, bool, Tensor | None]:
    """Return ‖Jᵢ‖₂ (m,), whether it is exact, and a vector to start the next call from.

    Exact from all columns, or all rows, where they are few; else the norm of all J stacked by
    power iteration, which under-estimates, plus a tenth.
    """
    d, rows = level.chart.flat, point.gradient
    size = sum(shape.numel() for shape in d.shapes)
    unit = torch.eye(min(size, EXACT_SIZE), dtype=d.dtype, device=rows.device)
    if size <= EXACT_SIZE:
        columns = torch.stack([point.jvp(e) for e in unit])
        gram = torch.einsum("kmn,lmn->mkl", columns, columns)
        return _root(gram), True, None
    if rows.numel() <= EXACT_SIZE and level.samples == 1:
        basis = torch.eye(rows.numel(), dtype=rows.dtype, device=rows.device)
        stacked = torch.stack([point.cross(e.reshape(rows.shape)) for e in basis])
        return _root((stacked @ stacked.T)[None]), True, None
    steps = POWER_STEPS[1]
    if v is None:
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(size, generator=generator, dtype=torch.float64).to(rows.device, d.dtype)
        steps = POWER_STEPS[0]
    norm = 0.0
    for _ in range(steps):
        length = float(v.norm())
        if not length:
            break
        pushed = point.jvp(v / length)
        norm = float(pushed.norm())
        v = point.cross(pushed)
    return rows.new_full((level.samples,), 1.1 * norm), False, v


def _root(gram: Tensor) -> Tensor:
    largest: Tensor = torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0.0)
    return largest.sqrt()


def _differences(
    level: Level, x: Tensor, theta: Tensor, point: Point, names: Collection[str], mu: float
) -> dict[str, Any]:
    """Return twice the largest difference quotients of second derivatives along two directions."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    outer = level.outer(x, theta)
    length = 1e-3 * max(1.0, float(x.norm()) / math.sqrt(x.numel()))
    vectors = [v / v.norm() for v in (outer.gradient, noise.flip(-1)) if bool(v.any())]
    hessian = cross = direct = 0.0
    for way in (point.gradient, noise):
        if not bool(way.any()):
            continue
        moved = x + length * way / way.norm()
        other = level.linearize(moved, theta)
        for v in vectors:
            hessian = max(hessian, float((other.hvp(v) - point.hvp(v)).norm()) / length)
            cross = max(cross, float((other.cross(v) - point.cross(v)).norm()) / length)
        change = (level.outer(moved, theta).direct - outer.direct) * level.samples
        direct = max(direct, float(change.norm()) / length)
    found = {"L_J": 2 * cross, "L_direct": 2 * direct}
    if "L_Hinv" in names:
        found["L_Hinv"] = 2 * hessian / mu**2 if mu > 0 else math.inf
    return found
