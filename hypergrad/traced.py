"""Whether a computation is being recorded instead of done."""

from __future__ import annotations

from torch.fx.experimental.proxy_tensor import get_proxy_mode

__all__ = ["is_traced"]


def is_traced() -> bool:
    """Whether make_fx is recording: tensors have no values then, and cannot be checked.

    Compiled programs return flags of finiteness instead; see `hypergrad.compiled`.
    """
    return get_proxy_mode() is not None
