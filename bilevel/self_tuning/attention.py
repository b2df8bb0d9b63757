"""Multi-head attention whose projections respond to the hyperparameters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bilevel.self_tuning.layers import Response
from bilevel.self_tuning.perturbation import broadcast
from hypergrad.attention import math_attention

__all__ = ["ResponseAttention"]


class ResponseAttention(Response, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` whose input and output projections respond.

    The rows of the stacked input projection (3E, E) are scaled; `out_proj` is a response layer
    of its own.
    """

    def attach(self, n: int, perturbation: Any, respond: bool = True) -> None:
        """See `Response.attach`."""
        super().attach(n, perturbation, respond)
        # Fused inference of nn.TransformerEncoderLayer would go around the response.
        self._qkv_same_embed_dim = False

    def detach(self) -> None:
        """See `Response.detach`."""
        self._qkv_same_embed_dim = True
        super().detach()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention`; batched inputs, (rows, length, E)."""
        q, k, v = (
            torch.unflatten(self._project(x, i), -1, (self.num_heads, -1)).transpose(1, 2)
            for i, x in enumerate((query, key, value))
        )
        mask = self._mask(key_padding_mask, attn_mask, q)
        rate = self.dropout if self.training else 0.0
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            attention = (scores if mask is None else scores + mask).softmax(-1)
            heads = F.dropout(attention, rate) @ v
        else:
            with math_attention():
                heads = F.scaled_dot_product_attention(q, k, v, mask, rate)
        out = self.out_proj(heads.transpose(1, 2).flatten(-2))
        if not need_weights:
            return out, None
        return out, attention.mean(1) if average_attn_weights else attention

    def _project(self, x: Tensor, part: int) -> Tensor:
        """Return the queries (part 0), keys or values."""
        rows = slice(part * self.embed_dim, (part + 1) * self.embed_dim)
        weight, response = self.masked("in_proj_weight")
        bias = self._parameters["in_proj_bias"]
        w, b = weight[rows], None if bias is None else bias[rows]
        factor, p = self.factor("in_proj_weight"), self.perturbation
        y = p.through(x, lambda v: F.linear(v, w, b), lambda v: F.linear(v, w))
        if factor is None or response is None:
            return y
        what = "MultiheadAttention"
        moved = F.linear(p.seen(x), response[rows])
        total = broadcast(factor[..., rows], y, -1, what) * moved
        offset = None if bias is None else self.moved("in_proj_bias")
        if offset is not None:
            total = total + broadcast(offset[..., rows], y, -1, what)
        return p.add(y, total)

    def _mask(
        self, padding: Tensor | None, attention: Tensor | None, like: Tensor
    ) -> Tensor | None:
        """Return one additive mask; in a boolean one True means that a key is not seen."""
        total: Tensor | None = None
        for mask, shape in ((padding, (len(like), 1, 1, -1)), (attention, None)):
            if mask is None:
                continue
            if mask.dtype == torch.bool:
                mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
            if shape is not None:
                mask = mask.view(shape)
            elif mask.dim() == 3:
                mask = mask.view(len(like), self.num_heads, *mask.shape[1:])
            total = mask if total is None else total + mask
        return total
