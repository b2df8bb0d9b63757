"""One value of a space: its default and its check, depending on who owns it."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from bilevel.conditions import same
from bilevel.declaration import Declaration
from bilevel.domains import Grad
from bilevel.owners import as_grad, shared_default

__all__ = ["checked", "default"]

_FLOATS = (torch.float32, torch.float64)


def default(space: Declaration, name: str) -> Any:
    """Return the value that a name has where none is given."""
    owner, domain = space.owner(name), space[name]
    if owner == "fixed":
        return space.constants[name]
    if owner == "shared":
        return shared_default(cast(Grad, domain))  # a Grad by check_owner
    return domain.default_value


def checked(
    space: Declaration,
    name: str,
    value: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Any:
    """Return a value in the type that its domain and owner ask for.

    Raises:
        TypeError: another type, or a dtype that is neither float32 nor float64.
        ValueError: outside the domain, on a bound of a gradient-owned name, different elements of
            a shared one, or another value than the constant of a fixed one.
    """
    owner, domain = space.owner(name), space[name]
    constant = space.constants.get(name)
    if owner == "grad":
        smooth = as_grad(domain)
        # In the precision of the caller first: rounding must not hide a value on a bound.
        tensor = _cast(smooth.check(name, value, inside=True), value, dtype, device)
        low, high = smooth.limits(tensor.dtype)
        if low is None and high is None:
            return tensor
        # Rounding to a smaller dtype may have put it on a bound.
        exact = tensor.detach()
        inside = exact.clamp(low, high)
        return tensor if torch.equal(inside, exact) else tensor + (inside - exact)
    if not isinstance(domain, Grad):
        result = domain.check(name, value)
        if owner == "fixed" and not same(result, constant):
            raise ValueError(_fixed(name, constant, value))
        return result
    tensor = domain.check(name, value)
    if owner == "fixed":
        # In float32: the same constant may come back from a tensor of that dtype.
        kept = domain.check(name, constant).float()
        if not torch.equal(tensor.detach().cpu().float(), kept):
            raise ValueError(_fixed(name, constant, value))
    if owner == "shared" and not bool((tensor == tensor.flatten()[0]).all()):
        raise ValueError(f"{name} is shared: all elements must be equal, but got {value!r}.")
    return _cast(tensor, value, dtype, device) if domain.value_shape else float(tensor.detach())


def _fixed(name: str, constant: Any, value: Any) -> str:
    return f"{name} is fixed at {constant!r}, but got {value!r}; use fix({name}=...) to change it."


def _cast(
    tensor: Tensor, given: Any, dtype: torch.dtype | None, device: torch.device | str | None
) -> Tensor:
    if dtype is None:
        standard = torch.get_default_dtype()
        fallback = standard if standard in _FLOATS else torch.float32
        dtype = tensor.dtype if isinstance(given, Tensor) else fallback
    if dtype not in _FLOATS:
        raise TypeError(f"dtype must be torch.float32 or torch.float64, but got {dtype}.")
    # A number stands for all elements by stride 0; a caller may write into what it gets.
    return tensor.to(device=device, dtype=dtype).contiguous()
