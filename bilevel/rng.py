"""State of the global random generators: torch, numpy and random."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

__all__ = ["global_seed", "rng_state", "seed_generators", "set_rng_state"]


def rng_state() -> dict[str, Any]:
    """Return the state of the global generators as plain data."""
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": {
            # int64: torch cannot store every unsigned integer type.
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
        "random": {"version": version, "internal": list(internal), "gauss": gauss},
    }
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Set the global generators to a state from `rng_state`."""
    torch.set_rng_state(state["torch"])
    keys = state["numpy"]["keys"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", keys, *state["numpy"]["rest"]))  # noqa: NPY002
    saved = state["random"]
    random.setstate((saved["version"], tuple(saved["internal"]), saved["gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_generators(seed: int) -> None:
    """Seed the global generators."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def global_seed(seed: int | None) -> Iterator[None]:
    """Seed the global generators inside the block and put them back after it; None: do nothing."""
    if seed is None:
        yield
        return
    before = rng_state()
    seed_generators(seed)
    try:
        yield
    finally:
        set_rng_state(before)
