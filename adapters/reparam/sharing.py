"""One θ for several weight maps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.utils import parametrize

from adapters.reparam.base import WeightMap

__all__ = ["share"]


@torch.no_grad()
def share(modules: Mapping[str, torch.nn.Module], maps: Mapping[str, WeightMap]) -> int:
    """Let maps whose weights and θ have the same shapes share one θ, in place.

    What is fixed in a map, such as the singular vectors of its weight, stays its own.  The θ of
    each group is that of its first map.

    Args:
        modules: the modules that carry the maps, by name; for messages and a check.
        maps: by the same names; see `adapters.reparam.maps`.

    Returns:
        The number of θ that are left.

    Raises:
        ValueError: a map that another's θ moves away from where it stands, such as one that starts
            from the singular vectors of its own weight (SORSA); nothing is shared then.
    """
    groups: dict[object, str] = {}
    pairs: list[tuple[str, str]] = []
    for name, each in maps.items():
        shapes = {n: tuple(p.shape) for n, p in each.named_parameters()}
        weight = _original(modules[name])
        first = groups.setdefault(
            (type(each.reparam), tuple(weight.shape), each.fold, *sorted(shapes.items())), name
        )
        if first != name:
            pairs.append((name, first))
    for name, first in pairs:
        weight, each = _original(modules[name]), maps[name]
        moved = torch.func.functional_call(each, dict(maps[first].named_parameters()), (weight,))
        if not torch.equal(each(weight), moved):
            raise ValueError(
                f"{name} cannot share the tensors of {first}: with them "
                f"{type(each.reparam).__name__} would start from another weight."
            )
    for name, first in pairs:
        for n in list(maps[name]._parameters):
            maps[name]._parameters[n] = maps[first]._parameters[n]
    return len(groups)


def _original(module: torch.nn.Module) -> torch.Tensor:
    """Return the weight below a module's only map."""
    assert parametrize.is_parametrized(module)
    (each,) = module.parametrizations.values()  # type: ignore[operator]
    original: torch.Tensor = each.original
    return original
