"""Random state: seeded scopes for pure losses, and exact replay of a step's draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["RandomState", "seeded"]

Device = torch.device | str


def _accelerators(devices: Iterable[Device]) -> list[torch.device]:
    """Return the distinct devices that have a generator of their own, besides the CPU's."""
    distinct = {torch.device(d) for d in devices}
    return sorted((d for d in distinct if d.type not in ("cpu", "meta")), key=str)


@contextmanager
def seeded(seed: int | Tensor, devices: Iterable[Device] = ()) -> Iterator[None]:
    """Run a block with the default generators at `seed`, and put their state back after it.

    A loss whose random draws (dropout, noise) happen in ``seeded(batch["seed"])`` is a pure
    function of its arguments: finite differences and replays see the same masks.

    Args:
        seed: any integer, or a tensor of one.
        devices: devices besides the CPU on which the block draws.

    Raises:
        TypeError: a generator, which lives on one device and has a state of its own.
    """
    if isinstance(seed, torch.Generator):
        raise TypeError("seed must be an integer, but got a generator; pass its initial_seed().")
    places = _accelerators(devices)
    with RandomState.capture(places).restored_after():
        torch.default_generator.manual_seed(int(seed))
        for device in places:
            fresh = torch.Generator(device=device).manual_seed(int(seed))
            _module(device).set_rng_state(fresh.get_state(), device)
        yield


@dataclass(frozen=True)
class RandomState:
    """State of the default generators of the CPU and of some devices."""

    cpu: Tensor
    others: tuple[tuple[torch.device, Tensor], ...]

    @classmethod
    def capture(cls, devices: Iterable[Device] = ()) -> RandomState:
        """Record the current state."""
        others = tuple((d, _module(d).get_rng_state(d)) for d in _accelerators(devices))
        return cls(torch.get_rng_state(), others)

    def restore(self) -> None:
        """Set the generators to this state."""
        torch.set_rng_state(self.cpu)
        for device, state in self.others:
            _module(device).set_rng_state(state, device)

    @contextmanager
    def restored_after(self) -> Iterator[None]:
        """Run a block and restore this state, whatever happens in it."""
        try:
            yield
        finally:
            self.restore()


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
