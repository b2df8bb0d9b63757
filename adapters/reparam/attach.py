"""Putting weight maps on a model, switching and reading them, and merging them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.functional import own_class, parametrized
from adapters.reparam.base import Fold, Reparam, Start, WeightMap, as_matrix
from adapters.reparam.calibrate import Calibrate, collect

__all__ = [
    "Place",
    "adaptable",
    "attach",
    "configured",
    "detach",
    "maps",
    "merge",
    "n_trained",
    "replaced",
]


class Place(NamedTuple):
    """A weight that can be mapped: a module, the name of its weight, and how to read it."""

    module: nn.Module
    tensor: str
    fold: Fold

    @property
    def weight(self) -> Tensor:
        """The weight itself."""
        weight: Tensor = getattr(self.module, self.tensor)
        return weight


def adaptable(model: nn.Module) -> dict[str, Place]:
    """Return the weights that can be mapped, by the name of their module.

    Linear, Conv1d, Conv2d, Embedding, MultiheadAttention (its input projection; the output
    projection is a linear layer of its own) and Conv1D of transformers.
    """
    found = {}
    for name, module in model.named_modules():
        place = _place(module)
        if place is not None:
            found[name] = place
    return found


def _place(module: nn.Module) -> Place | None:
    if isinstance(module, nn.Linear | nn.Embedding):
        return Place(module, "weight", "rows")
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return Place(module, "weight", "flat")
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return Place(module, "in_proj_weight", "rows")
    if type(module).__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        return Place(module, "weight", "transposed")
    return None


def attach(
    model: nn.Module,
    reparam: Reparam | Mapping[str, Reparam],
    targets: str | Sequence[str] | None = None,
    *,
    train: str | Sequence[str] = (),
    calibrate: Calibrate | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, WeightMap]:
    """Freeze a model and put weight maps on some of its weights, in place.

    Args:
        model: any module; only θ and `train` require grad afterwards.
        reparam: the map, or maps by the name of a module.
        targets: names of modules or patterns such as "encoder.*"; None for all that `adaptable`
            returns but embeddings, or for the names of `reparam`.
        train: names or patterns of parameters that stay trained, such as "head.*".
        calibrate: ``(model) -> loss or None`` runs the model on calibration data, for maps that
            start from activations or gradients.  Training data, not validation data.
        generator: of random draws; None for torch's default.

    Returns:
        The maps by the name of their module.

    Raises:
        ValueError: a pattern without a match (the message lists the candidates), no target, a
            model that carries maps already, a part of an adapter of HF PEFT, a tied weight,
            settings that do not fit a weight, or a map that needs calibration data without any.
        TypeError: a weight that is not floating.
    """
    if maps(model):
        raise ValueError(
            f"{type(model).__name__} carries weight maps already, on {', '.join(maps(model))}; "
            "merge(model) first."
        )
    chosen = _chosen(model, reparam, targets)
    if not chosen:
        raise ValueError("targets (or reparam, where it names the modules) must not be empty.")
    places = {name: adaptable(model)[name] for name in chosen}
    _check_places(model, places)
    needs = frozenset().union(*(each.needs for each in chosen.values()))
    given = collect(model, places, needs, calibrate)
    made: dict[str, WeightMap] = {}
    for name, place in places.items():
        with torch.no_grad():
            weight = as_matrix(place.weight, place.fold).detach()
            start = Start(name, weight, *given.get(name, (None, None)), generator)
            parts = chosen[name].start(start)
        made[name] = WeightMap(chosen[name], place.fold, parts).to(weight.device)
    wanted = _trained(model, train, places)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in wanted)
    for name, place in places.items():
        parametrize.register_parametrization(place.module, place.tensor, made[name], unsafe=True)
    return made


def maps(model: nn.Module) -> dict[str, WeightMap]:
    """Return the weight maps of a model by the name of their module."""
    return parametrized(model, WeightMap)


def merge(model: nn.Module) -> nn.Module:
    """Replace each mapped weight by its value: the plain module again, in place.

    Raises:
        ValueError: the model carries no weight maps.
    """
    return _without_maps(model, "merge", keep=True)


def detach(model: nn.Module) -> nn.Module:
    """Take the weight maps off: the pretrained weights again, bit for bit, in place.

    Raises:
        ValueError: the model carries no weight maps.
    """
    return _without_maps(model, "detach", keep=False)


def _without_maps(model: nn.Module, verb: str, keep: bool) -> nn.Module:
    if not maps(model):
        raise ValueError(f"{type(model).__name__} carries no weight maps, so nothing to {verb}.")
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module):
            continue
        for tensor, each in list(module.parametrizations.items()):  # type: ignore[union-attr, operator]
            if any(isinstance(m, WeightMap) for m in each):
                # A deep copy has the same class, from which the next line takes the property.
                own_class(module)
                parametrize.remove_parametrizations(module, tensor, leave_parametrized=keep)
    return model


def n_trained(model: nn.Module) -> int:
    """Return the number of trained parameters."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextmanager
def configured(model: nn.Module, values: Mapping[str, Any]) -> Iterator[dict[str, WeightMap]]:
    """Run a block with settings of all maps replaced, by tensors where a gradient is wanted.

    Args:
        model: with maps.
        values: by name; names that are no settings of a map do not concern it.
    """
    found = maps(model)
    before = {name: each.reparam for name, each in found.items()}
    try:
        for each in found.values():
            each.reparam = replaced(each.reparam, values)
        yield found
    finally:
        for name, each in found.items():
            each.reparam = before[name]


def replaced(reparam: Reparam, values: Mapping[str, Any]) -> Reparam:
    """Return a map with those of the values that are settings of it."""
    names = {field.name for field in dataclasses.fields(reparam)}  # type: ignore[arg-type]
    mine = {name: value for name, value in values.items() if name in names}
    return dataclasses.replace(reparam, **mine) if mine else reparam  # type: ignore[type-var]


def _chosen(
    model: nn.Module,
    reparam: Reparam | Mapping[str, Reparam],
    targets: str | Sequence[str] | None,
) -> dict[str, Reparam]:
    candidates = adaptable(model)
    if isinstance(reparam, Mapping):
        if targets is not None:
            raise ValueError("targets must be None where reparam names the modules.")
        for name in reparam:
            _matching("reparam", name, list(candidates))
        return dict(reparam)
    if not isinstance(reparam, Reparam):
        raise TypeError(f"reparam must be a Reparam such as LoRA(rank=4), but got {reparam!r}.")
    if targets is None:
        names = [n for n, p in candidates.items() if not isinstance(p.module, nn.Embedding)]
        if not names:
            raise ValueError(f"{type(model).__name__} has no layer that a weight map fits.")
    else:
        wanted = _matching("targets", targets, list(candidates))
        names = [name for name in candidates if name in wanted]
    return dict.fromkeys(names, reparam)


def _matching(
    argument: str, patterns: str | Sequence[str], candidates: Sequence[str]
) -> Collection[str]:
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        hits = [name for name in candidates if fnmatchcase(name, pattern)]
        if not hits:
            raise ValueError(
                f"{argument}: nothing that fits matches {pattern!r}; candidates are "
                f"{', '.join(candidates) or 'none'}."
            )
        found.update(hits)
    return found


def _trained(
    model: nn.Module, train: str | Sequence[str], places: Mapping[str, Place]
) -> Collection[str]:
    """Return the names of the parameters that stay trained as they are."""
    wanted = _matching("train", train, [name for name, _ in model.named_parameters()])
    mapped = {id(place.weight) for place in places.values()}
    both = [name for name, p in model.named_parameters() if name in wanted and id(p) in mapped]
    if both:
        raise ValueError(
            f"train: {train!r} matches {', '.join(both)}, which a map keeps frozen; leave it out "
            "of train or of targets."
        )
    return wanted


def _check_places(model: nn.Module, places: Mapping[str, Place]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(_storage(parameter), []).append(name)
    adapted = _peft_layers(model)
    for name, place in places.items():
        around = [outer for outer in adapted if name.startswith(f"{outer}." if outer else "")]
        if around:
            raise ValueError(
                f"{name}: it is part of {around[0]}, an adapter of HF PEFT, whose own merging "
                "would lose the map; merge_and_unload() the model first, or leave it out."
            )
        if parametrize.is_parametrized(place.module, place.tensor):
            raise ValueError(
                f"{name}: its {place.tensor} has a parametrization already, which merge could not "
                "tell from the map; remove it first (torch.nn.utils.parametrize), or leave it out."
            )
        if not place.weight.is_floating_point():
            raise TypeError(
                f"{name}: a weight map needs a floating weight, but it is {place.weight.dtype}."
            )
        sharing = owners.get(_storage(place.weight), [])
        if len(sharing) > 1:
            raise ValueError(
                f"{name}: its weight is shared by {', '.join(sharing)}, and a map on one of them "
                "would untie them; leave it out of targets, or untie them first."
            )


def _peft_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that HF PEFT has wrapped; none where it is not imported."""
    peft = sys.modules.get("peft.tuners.tuners_utils")
    if peft is None:
        return []
    return [name for name, m in model.named_modules() if isinstance(m, peft.BaseTunerLayer)]


def _storage(tensor: Tensor) -> int:
    """Return what tied tensors have in common; one without data (meta, empty) is only itself."""
    return tensor.data_ptr() or id(tensor)
