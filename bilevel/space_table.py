"""A space as a table that a person reads."""

from __future__ import annotations

from typing import Any

import numpy as np

from bilevel.declaration import Declaration
from bilevel.domains import Choice, Domain, Float, Grad, Int, Switch
from bilevel.owners import as_grad
from bilevel.values import default

__all__ = ["table"]


def table(space: Declaration) -> str:
    """Return a title line, a header line, and a line for each name."""
    counts = ", ".join(
        f"{len(names)} {owner}"
        for owner, names in (
            ("grad", space.grad),
            ("sampled", space.sampled),
            ("fixed", space.fixed),
        )
        if names
    )
    title = f"Space of {len(space)} names" + (f": {counts}" if counts else "")
    if not space:
        return title
    rows = [("name", "owner", "range", "scale", "shape", "default", "when")]
    for name, domain in space.items():
        rows.append(
            (
                name,
                space.owner(name),
                _range(domain, space.owner(name)),
                _scale(domain),
                _shape(domain),
                _brief(default(space, name), domain),
                str(domain.condition),
            )
        )
    used = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    lines = ["  " + "  ".join(row[i].ljust(widths[i]) for i in used).rstrip() for row in rows]
    return "\n".join([title, *lines])


def _range(domain: Domain, owner: str) -> str:
    if isinstance(domain, Grad) and domain.scale == "simplex":
        return "simplex"
    if isinstance(domain, Grad) or owner == "grad":
        return as_grad(domain).interval(inside=owner == "grad")
    if isinstance(domain, Float):
        return f"[{domain.low}, {domain.high}]"
    if isinstance(domain, Int):
        return f"{domain.low}..{domain.high}" + (f" by {domain.step}" if domain.step > 1 else "")
    if isinstance(domain, Choice):
        return " | ".join(map(str, domain.values))
    return "False | True" if isinstance(domain, Switch) else ""


def _scale(domain: Domain) -> str:
    if isinstance(domain, Float | Int):
        return "log" if domain.log else "linear"
    return domain.scale if isinstance(domain, Grad) and domain.scale != "simplex" else ""


def _shape(domain: Domain) -> str:
    if not isinstance(domain, Grad):
        return ""
    knots = "" if domain.schedule is None else f"{domain.schedule} knots"
    shape = str(domain.shape) if domain.shape else ""
    return " x ".join(part for part in (knots, shape) if part)


def _brief(value: Any, domain: Domain) -> str:
    if isinstance(domain, Grad) and isinstance(value, tuple):
        elements = np.asarray(value, dtype=np.float64)
        low, high = f"{elements.min():.6g}", f"{elements.max():.6g}"
        return low if low == high else f"{low} to {high}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
