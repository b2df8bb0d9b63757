"""Owners: who moves a hyperparameter.  Data beside the declaration, changed without editing it."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor

from bilevel.domains import Domain, Float, Grad

__all__ = ["OWNERS", "as_grad", "check_owner", "plain", "shared_default"]

OWNERS = ("grad", "sampler", "shared", "fixed")


def check_owner(name: str, domain: Domain, owner: str) -> None:
    """Refuse an owner that a domain cannot have.

    Raises:
        ValueError: unknown owner, or one that the domain refuses; says why.
    """
    if owner not in OWNERS:
        known = ", ".join(map(repr, OWNERS))
        raise ValueError(f"own: the owner of {name} must be one of {known}, but got {owner!r}.")
    reason = domain.refusal(owner)
    if reason is not None:
        raise ValueError(f"own: {name} cannot be owned by {owner!r}: {reason}.")


def as_grad(domain: Domain) -> Grad:
    """Return the smooth form of a gradient-owned domain: a `Float` as a bounded `Grad`."""
    if isinstance(domain, Float):
        scale: Literal["linear", "log"] = "log" if domain.log else "linear"
        return Grad(domain.default_value, domain.low, domain.high, scale)
    return cast(Grad, domain)  # no other domain accepts the owner, see check_owner


def shared_default(domain: Grad) -> float:
    """Return one value for all elements: the mean of init, geometric on a log scale."""
    init = domain.check("init", domain.init)
    first = float(init.flatten()[0])
    if bool((init == first).all()):  # the mean of equal numbers can be off by a rounding
        return first
    return float(init.log().mean().exp() if domain.scale == "log" else init.mean())


def plain(value: Any) -> Any:
    """Return a checked value as what JSON can hold, in one way only.

    A tensor with equal elements becomes a number, another one nested tuples.
    """
    if not isinstance(value, Tensor):
        return value
    first = float(value.detach().flatten()[0])
    if bool((value.detach() == first).all()):
        return first

    def tuples(values: Any) -> Any:
        return tuple(map(tuples, values)) if isinstance(values, list) else values

    return tuples(value.detach().to(torch.float64).tolist())
