"""Attention on the one backend that has second derivatives."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["math_attention"]


def math_attention() -> AbstractContextManager[None]:
    """Run `scaled_dot_product_attention` on its math backend, on every device.

    The fused backends have no double backward.  The switch costs ten microseconds, which counts
    in a loop of small steps: enter it outside of the loop, nested uses are then free.
    """
    return _ON if _thread.inside else _switched()


class _Thread(threading.local):
    inside = False


_thread = _Thread()
_ON: AbstractContextManager[None] = nullcontext()


@contextmanager
def _switched() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH):
        _thread.inside = True
        try:
            yield
        finally:
            _thread.inside = False
