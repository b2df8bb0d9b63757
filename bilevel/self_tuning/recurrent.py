"""LSTM and GRU whose input and hidden weights respond to the hyperparameters.

Both products of a step are response layers over the gates' pre-activations (4H or 3H rows).
DropConnect acts on the hidden-to-hidden weights, one mask for a whole sequence (Merity et al.
2018), and on weight and response alike.  Without per-example shifts the fused kernels run, with
them the loops of `scan`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from bilevel.self_tuning.layers import Response, affine, materialize, pick
from bilevel.self_tuning.perturbation import broadcast, dropout_mask, pack, unpack
from bilevel.self_tuning.scan import Hidden, Tangents, gru_scan, lstm_scan

__all__ = ["ResponseGRU", "ResponseLSTM"]

State = tuple[Tensor, ...]
"""(h,) of a GRU or (h, c) of an LSTM, each of shape (rows, H)."""


class _Recurrent(Response):
    """What both share.

    Attributes:
        between: hyperparameter that is the rate of dropout between layers; None for the
            layer's own `dropout`.
    """

    between: tuple[str, int | None] | None
    num_layers: int
    hidden_size: int
    bias: bool
    dropout: float

    def attach(self, n: int, perturbation: Any, respond: bool = True) -> None:
        """See `Response.attach`."""
        super().attach(n, perturbation, respond)
        self.between = None

    def detach(self) -> None:
        """See `Response.detach`."""
        del self.between
        super().detach()
        cast(nn.LSTM, self)._init_flat_weights()

    def _fan_in(self) -> int:
        return self.hidden_size

    def forward(self, input: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
        """See the plain layer; inputs of shape (rows, time, features)."""
        if not isinstance(input, Tensor) or input.dim() != 3:
            raise ValueError(
                f"{type(self).__name__} needs a tensor of shape (rows, time, features), but got "
                f"{tuple(input.shape) if isinstance(input, Tensor) else type(input).__name__}."
            )
        starts = self._unpack(input, hx)
        x, ends = input, []
        for k in range(self.num_layers):
            x, end = self._layer(k, x, starts[k])
            ends.append(end)
            if k < self.num_layers - 1:
                x = self._drop(x)
        return x, self._pack([torch.stack(part) for part in zip(*ends, strict=True)])

    def _drop(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if self.between is None:
            return F.dropout(x, self.dropout)
        rate = pick(self.perturbation.values, self.between)
        if isinstance(rate, Tensor) and rate.dim() == 1:
            rate = rate.view(-1, 1, 1)
        mask = dropout_mask(rate, x.shape, x)
        return self.perturbation.through(x, lambda v: v * mask)

    def _layer(self, k: int, x: Tensor, start: State) -> tuple[Tensor, State]:
        names = [f"{kind}_l{k}" for kind in ("weight_ih", "weight_hh")]
        names += [f"{kind}_l{k}" for kind in ("bias_ih", "bias_hh")] if self.bias else []
        p = self.perturbation
        responds = p.shift is not None and not set(names).isdisjoint(self.responding)
        if p.linearized:
            alone = not responds and unpack(x)[1] is None
        else:
            alone = not responds or cast(Tensor, p.shift).dim() == 1
        if alone:
            return self._fused(x, start, [self._whole(name) for name in names])
        bias = iter(names[2:])
        into = affine(self, x, F.linear, names[0], next(bias, None), dropconnect=False)
        return self._scan(into, start, self._hidden(names[1], next(bias, None), x))

    def _whole(self, name: str) -> Tensor:
        """Return a parameter at a shift that all examples share."""
        weight, response = self.masked(name) if "weight_hh" in name else self.pair(name)[:2]
        gate, shift = self.pair(name)[2], self.perturbation.shift
        if shift is None or response is None or gate is None:
            return weight
        return materialize(weight, response, gate, shift, 0)

    def _hidden(self, weight: str, bias: str | None, x: Tensor) -> Hidden:
        """Return the hidden-to-hidden map; one that does not respond has zero factors."""
        w, response = self.masked(weight)
        factor = self.factor(weight)
        if response is None or factor is None:
            response, factor = torch.zeros_like(w), w.new_zeros(len(w))
        broadcast(factor, x, -1, type(self).__name__)
        offset = None if bias is None else self.moved(bias)
        rows = len(x), len(w)
        return Hidden(
            w,
            response,
            factor.expand(rows),
            None if bias is None else cast(Tensor, self._parameters[bias]),
            None if offset is None else offset.expand(rows),
        )

    def _carried(self, into: Tensor, start: State) -> tuple[Tensor, State, Tangents | None]:
        """Return values and tangents of what a scan starts from."""
        if not self.perturbation.linearized:
            return into, start, None
        value, tangent = unpack(into)
        states = [unpack(s) for s in start]
        zero = torch.zeros_like(value) if tangent is None else tangent
        moved = tuple(torch.zeros_like(v) if t is None else t for v, t in states)
        return value, tuple(v for v, _ in states), Tangents(zero.detach(), moved)

    # What differs between the two.

    def _unpack(self, x: Tensor, hx: Any) -> list[State]:
        raise NotImplementedError

    def _pack(self, ends: list[Tensor]) -> Any:
        raise NotImplementedError

    def _fused(self, x: Tensor, start: State, weights: list[Tensor]) -> tuple[Tensor, State]:
        raise NotImplementedError

    def _scan(self, into: Tensor, start: State, hidden: Hidden) -> tuple[Tensor, State]:
        raise NotImplementedError

    def _zeros(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.num_layers, len(x), self.hidden_size)


class ResponseLSTM(_Recurrent, nn.LSTM):  # type: ignore[misc]
    """`torch.nn.LSTM` that responds."""

    def _unpack(self, x: Tensor, hx: Any) -> list[State]:
        h, c = (self._zeros(x), self._zeros(x)) if hx is None else hx
        return list(zip(h.unbind(), c.unbind(), strict=True))

    def _pack(self, ends: list[Tensor]) -> Any:
        return ends[0], ends[1]

    def _fused(self, x: Tensor, start: State, weights: list[Tensor]) -> tuple[Tensor, State]:
        states = [s[None] for s in start]
        out, h, c = torch.lstm(x, states, weights, self.bias, 1, 0.0, self.training, False, True)
        return out, (h[0], c[0])

    def _scan(self, into: Tensor, start: State, hidden: Hidden) -> tuple[Tensor, State]:
        into, start, tangents = self._carried(into, start)
        out, end, moved, moved_end = lstm_scan(into, start[0], start[1], hidden, tangents)
        if moved is not None and moved_end is not None:
            out, end = pack(out, moved), pack(end, moved_end)
        return out, (out[:, -1], end)


class ResponseGRU(_Recurrent, nn.GRU):  # type: ignore[misc]
    """`torch.nn.GRU` that responds."""

    def _unpack(self, x: Tensor, hx: Any) -> list[State]:
        return [(h,) for h in (self._zeros(x) if hx is None else hx).unbind()]

    def _pack(self, ends: list[Tensor]) -> Any:
        return ends[0]

    def _fused(self, x: Tensor, start: State, weights: list[Tensor]) -> tuple[Tensor, State]:
        out, h = torch.gru(
            x, start[0][None], weights, self.bias, 1, 0.0, self.training, False, True
        )
        return out, (h[0],)

    def _scan(self, into: Tensor, start: State, hidden: Hidden) -> tuple[Tensor, State]:
        into, start, tangents = self._carried(into, start)
        out, moved = gru_scan(into, start[0], hidden, tangents)
        if moved is not None:
            out = pack(out, moved)
        return out, (out[:, -1],)
