"""Calling a module with other tensors in the place of its parameters and buffers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

__all__ = ["Swap"]

T = TypeVar("T")


class Swap:
    """The places of a module's parameters and buffers, found once and filled many times.

    What `torch.func.functional_call` does, which finds the places anew and looks for tied
    weights at every call: as long as the forward pass of a small network takes.

    Args:
        module: whose parameters and buffers are swapped; tied parameters go by their first name.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._places: dict[str, list[tuple[dict[str, Tensor | None], str]]] = {}
        self._buffers = [name for name, _ in module.named_buffers()]
        first: dict[int, str] = {}
        for prefix, owner in module.named_modules():
            for kind in (owner._parameters, owner._buffers):
                for key, tensor in kind.items():
                    if tensor is not None:
                        name = f"{prefix}.{key}" if prefix else key
                        name = first.setdefault(id(tensor), name)
                        self._places.setdefault(name, []).append((kind, key))

    def buffers(self) -> dict[str, Tensor]:
        """Return the module's present buffers by name."""
        found = {}
        for name in self._buffers:
            kind, key = self._places[name][0]
            if (tensor := kind[key]) is not None:
                found[name] = tensor
        return found

    @contextmanager
    def filled(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Put tensors in their places, and the module's own back afterwards.

        A module that replaces a buffer during the block (``self.count = self.count + 1``) has
        its own one back as well.

        Raises:
            ValueError: the module has no tensor of that name.
        """
        before: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        try:
            for name, tensor in tensors.items():
                if name not in self._places:
                    raise ValueError(
                        f"params: {name!r} is not a tensor of the module, which has "
                        f"{list(self._places)}."
                    )
                for kind, key in self._places[name]:
                    before.append((kind, key, kind[key]))
                    kind[key] = tensor
            yield
        finally:
            for kind, key, own in reversed(before):
                kind[key] = own

    def call(self, tensors: Mapping[str, Tensor], function: Callable[[nn.Module], T]) -> T:
        """Return ``function(module)`` with tensors in their places, and copies of the buffers."""
        buffers = {name: b.detach().clone() for name, b in self.buffers().items()}
        with self.filled({**buffers, **tensors}):
            return function(self.module)
