"""Values of optimizer hyperparameters: numbers, tensors, or names of what is being tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from hypergrad.tree import Leaves, Tree, leaf_names

__all__ = [
    "Hyper",
    "Value",
    "Values",
    "check_betas",
    "constants",
    "double_dtype",
    "is_zero",
    "resolve",
    "tuned",
]

Value = Any
"""``float | Tensor | Hyper | tree of these``; see `Optimizer`."""

Values = dict[str, float | Tensor]
"""Resolved hyperparameters by name: a number, a scalar tensor or one entry per parameter."""


@dataclass(frozen=True)
class Hyper:
    """Stands for ``hparams[name]`` in an optimizer: the hyperparameter that is tuned.

    Attributes:
        name: key in hparams; the entry is a tensor or a tree of tensors.
        transform: applied to each tensor of the entry, such as `torch.exp`.
    """

    name: str
    transform: Callable[[Tensor], Tensor] | None = None

    def read(self, hparams: Tree) -> Tree:
        """Return the transformed entry.

        Raises:
            ValueError: hparams has no such entry.
        """
        if not isinstance(hparams, Mapping) or self.name not in hparams:
            known = list(hparams) if isinstance(hparams, Mapping) else type(hparams).__name__
            raise ValueError(f"Hyper({self.name!r}) is not an entry of hparams, which has {known}.")
        entry = hparams[self.name]
        return entry if self.transform is None else optree.tree_map(self.transform, entry)


def resolve(key: str, value: Value, hparams: Tree, params: Leaves) -> float | Tensor:
    """Look up a value and broadcast it to the flat vector of trained tensors.

    Returns:
        A number, a scalar tensor in double precision, or a vector with one entry per element
        of the flat vector in the dtype of params.  (A vector made of numbers alone stays in
        double precision, as numbers do.)

    Raises:
        ValueError: a shape or tree that does not fit params; a tensor that requires grad but
            is not in hparams.
    """
    if isinstance(value, Hyper):
        spec = value.read(hparams)
    else:
        spec = optree.tree_map(lambda leaf: _read(key, leaf, hparams), value)
    if isinstance(spec, float):
        return spec
    if isinstance(spec, Tensor):
        if spec.numel() == 1:
            return spec.reshape(()).to(double_dtype(spec.device))
        return _vector_of_tensor(key, spec, params)
    return _vector_of_tree(key, spec, params)


def double_dtype(device: torch.device) -> torch.dtype:
    """Return float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def _read(key: str, value: Value, hparams: Tree) -> Any:
    """Return one leaf of a value as a float, a constant tensor or an entry of hparams."""
    if isinstance(value, Hyper):
        return value.read(hparams)
    if isinstance(value, bool):
        raise TypeError(f"optimizer {key} must be a number, but got {value}.")
    if isinstance(value, int | float):
        return float(value)
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"optimizer {key} is a tensor that requires grad, but a hypergradient is taken in "
            f"hparams only; put it there and write {key}=Hyper(name)."
        )
    if not isinstance(value, Tensor):
        raise TypeError(
            f"optimizer {key} must be a number, a tensor, a Hyper or a tree of these, but got "
            f"{value!r}."
        )
    return value


def _vector_of_tensor(key: str, value: Tensor, params: Leaves) -> Tensor:
    """Spread one tensor over the flat vector: an entry per trained tensor, or per element."""
    sizes = [t.numel() for t in params.tensors]
    like = params.tensors[0]
    single = len(sizes) == 1 and value.shape == like.shape
    if single or value.shape == (sum(sizes),):
        return value.reshape(-1).to(like)
    if value.shape == (len(sizes),):
        return torch.cat([value[i].expand(n) for i, n in enumerate(sizes)]).to(like)
    raise ValueError(
        f"optimizer {key} has shape {tuple(value.shape)}; expected a scalar, one entry per trained "
        f"tensor ({len(sizes)},), one per element ({sum(sizes)},), or a tree like params."
    )


def _vector_of_tree(key: str, tree: Tree, params: Leaves) -> Tensor:
    """Spread a prefix of the params tree over the flat vector."""
    # Integers mark where the trained tensors stand; constants keep their place.
    slots = params.rebuild(range(len(params.tensors)))  # type: ignore[arg-type]
    try:
        spread = optree.broadcast_prefix(tree, slots)
    except ValueError as error:
        raise ValueError(
            f"optimizer {key} must be a scalar or a tree like params (or a prefix of it), but its "
            f"leaves are {leaf_names(tree, key)} and the trained ones are {params.names}."
        ) from error
    found: dict[int, Any] = {}
    for slot, value in zip(optree.tree_leaves(slots), spread, strict=True):
        if isinstance(slot, int):
            found.setdefault(slot, value)
    like = params.tensors[0]
    numbers = all(isinstance(v, float) for v in found.values())
    dtype = double_dtype(like.device) if numbers else like.dtype
    pieces = []
    for i, tensor in enumerate(params.tensors):
        value = torch.as_tensor(found[i], dtype=dtype, device=like.device)
        if value.numel() != 1 and value.shape != tensor.shape:
            raise ValueError(
                f"optimizer {key} has shape {tuple(value.shape)} for {params.names[i]}, which has "
                f"shape {tuple(tensor.shape)}; expected a scalar or the same shape."
            )
        pieces.append(value.reshape(-1).expand(tensor.numel()))
    return torch.cat(pieces)


def constants(values: Values) -> Values:
    """Detach values; a scalar tensor becomes a number, as `torch.optim` takes it."""
    return {
        key: (v.detach() if v.dim() else v.item()) if isinstance(v, Tensor) else v
        for key, v in values.items()
    }


def is_zero(value: Value) -> bool:
    """Whether a value is the number 0, so that its term can be left out."""
    return isinstance(value, int | float) and value == 0


def check_betas(name: str, betas: Any) -> None:
    """Raise ValueError unless betas are a pair."""
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{name} betas must be a pair (beta1, beta2), but got {betas!r}.")


def tuned(values: Values) -> dict[str, Tensor]:
    """Return the values that depend on hparams."""
    return {k: v for k, v in values.items() if isinstance(v, Tensor) and v.requires_grad}
