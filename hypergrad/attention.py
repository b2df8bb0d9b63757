"""Attention on the one backend that has second derivatives."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["math_attention"]


def math_attention() -> AbstractContextManager[None]:
    """Run `scaled_dot_product_attention` on its math backend, on every device.

    The fused backends have no double backward.  The switch costs ten microseconds, which counts
    in a loop of small steps: enter it outside of the loop, nested uses are then free.
    """
    flags: tuple[Callable[[], bool], ...] = (
        cuda.math_sdp_enabled,
        cuda.flash_sdp_enabled,
        cuda.mem_efficient_sdp_enabled,
        cuda.cudnn_sdp_enabled,
    )
    if [enabled() for enabled in flags] == [True, False, False, False]:
        return nullcontext()
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context
