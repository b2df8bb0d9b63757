"""The time loops of LSTM and GRU with one hidden-to-hidden weight for each example.

    u_t = (W + diag(f_b) R) h_{t-1} + c_b,      f = G s the factors, c_b the offsets (bias),

the hidden part of the pre-activations of example b.  Derivatives are written out, because what
autograd would do in each time step costs more than the products of a small layer: products for
weights are done once for all steps, and derivatives of the gates in a few operations.

`lstm_scan` and `gru_scan` return outputs and final states; with `tangents` they also carry the
first-order change of every state, along tangents of the inputs and the response f ⊙ (R h) + c, at
values that do not respond; see `Perturbation.add` for the gradient there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["Hidden", "Tangents", "gru_scan", "lstm_scan"]


@dataclass(frozen=True)
class Hidden:
    """The hidden-to-hidden map of a layer with k gates.

    Attributes:
        weight: W, shape (kH, H).
        response: R, of the same shape.
        factor: f, shape (B, kH).
        bias: of all examples, shape (kH,); None for none.
        offset: change of the bias, shape (B, kH); None for none.
    """

    weight: Tensor
    response: Tensor
    factor: Tensor
    bias: Tensor | None
    offset: Tensor | None

    def constant(self) -> Tensor:
        """Return bias + offset, shape (B, kH)."""
        parts = [p for p in (self.bias, self.offset) if p is not None]
        if not parts:
            return torch.zeros_like(self.factor)
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return total.expand_as(self.factor)


@dataclass(frozen=True)
class Tangents:
    """First-order changes along the response.

    Attributes:
        into: of the input part of the pre-activations, shape (B, T, kH).
        states: of the initial states, each of shape (B, H).
    """

    into: Tensor
    states: tuple[Tensor, ...]


def lstm_scan(
    into: Tensor, h: Tensor, c: Tensor, hidden: Hidden, tangents: Tangents | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return h_1 … h_T, shape (B, T, H), c_T, and their tangents.

    Args:
        into: input part of the pre-activations, gates i, f, g, o; shape (B, T, 4H).
        h: h_0, shape (B, H).
        c: c_0, shape (B, H).
        hidden: the hidden-to-hidden map.
        tangents: of the inputs; None for weights that respond themselves.
    """
    constant, linear = _constant(hidden, tangents)
    found: tuple[Tensor, ...] = _LSTM.apply(  # type: ignore[no-untyped-call]
        into, h, c, hidden.weight, hidden.response, hidden.factor, constant, linear
    )
    return (found[0], found[1], None, None) if linear is None else found  # type: ignore[return-value]


def gru_scan(
    into: Tensor, h: Tensor, hidden: Hidden, tangents: Tangents | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return h_1 … h_T, shape (B, T, H), and its tangent; see `lstm_scan`, gates r, z, n."""
    constant, linear = _constant(hidden, tangents)
    found = _GRU.apply(  # type: ignore[no-untyped-call]
        into, h, hidden.weight, hidden.response, hidden.factor, constant, linear
    )
    return (found, None) if linear is None else found


Linear = tuple[Tangents, Tensor | None] | None
"""Tangents, and the change of the bias as one."""


def _constant(hidden: Hidden, tangents: Tangents | None) -> tuple[Tensor, Linear]:
    """Return bias + offset, and what a linearized loop needs.

    There the offset belongs to the tangents; it stays in the graph of the bias as a zero.
    """
    total = hidden.constant()
    if tangents is None:
        return total, None
    if hidden.offset is None:
        return total, (tangents, None)
    still = hidden.offset.detach()
    return total - still, (tangents, still)


def _products(
    hidden: Tensor, outer: Tensor, factor: Tensor, wanted: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients in W and R, all steps at once.

    Args:
        hidden: h_0 … h_{T-1}, shape (T, B, H).
        outer: gradients in u, shape (T, B, kH), and beside them, where there are twice as many
            columns, those gradients times f.
        factor: f.
        wanted: which of the two.
    """
    h, gates = hidden.flatten(0, 1), factor.shape[1]
    flat = outer.flatten(0, 1)
    if flat.shape[1] > gates and all(wanted):
        both = flat.T @ h
        return both[:gates], both[gates:]
    weight = flat[:, :gates].T @ h if wanted[0] else None
    if not wanted[1]:
        return weight, None
    scaled = flat[:, gates:] if flat.shape[1] > gates else (outer * factor).flatten(0, 1)
    return weight, scaled.T @ h


def _inner(outer: Tensor, changes: Tensor) -> Tensor:
    """Return the sum over time of a product, shape (B, kH)."""
    total = torch.zeros_like(changes[0])
    for d, change in zip(outer, changes, strict=True):
        total.addcmul_(d, change)
    return total


class _LSTM(torch.autograd.Function):
    """See `lstm_scan`."""

    @staticmethod
    def forward(
        ctx: Any,
        into: Tensor,
        h: Tensor,
        c: Tensor,
        weight: Tensor,
        response: Tensor,
        factor: Tensor,
        constant: Tensor,
        linear: Linear,
    ) -> tuple[Tensor, ...]:
        rows, steps, gates = into.shape
        size = gates // 4
        both = torch.cat([weight, response])
        x = into.transpose(0, 1)
        changes, acts = x.new_empty(steps, rows, gates), x.new_empty(steps, rows, gates)
        cells = x.new_empty(steps + 1, rows, size)
        squashed, outputs = x.new_empty(steps, rows, size), x.new_empty(steps + 1, rows, size)
        outputs[0], cells[0] = h, c
        moved: list[Tensor] = []
        if linear is not None:
            (dh, dc), offset = linear[0].states, linear[1]
            extra = linear[0].into.transpose(0, 1)
        for t in range(steps):
            product = outputs[t] @ both.T
            own, change = product[:, :gates], changes[t]
            change.copy_(product[:, gates:])
            a = acts[t]
            torch.add(own, x[t], out=a).add_(constant)
            if linear is None:
                a.addcmul_(factor, change)
            a[:, : 2 * size].sigmoid_()
            a[:, 2 * size : 3 * size].tanh_()
            a[:, 3 * size :].sigmoid_()
            i, f, g, o = a.view(rows, 4, size).unbind(1)
            torch.mul(f, cells[t], out=cells[t + 1])
            cells[t + 1].addcmul_(i, g)
            torch.tanh(cells[t + 1], out=squashed[t])
            torch.mul(o, squashed[t], out=outputs[t + 1])
            if linear is not None:
                da = torch.addcmul(extra[t], factor, change).addmm_(dh, weight.T)
                if offset is not None:
                    da += offset
                da = da.view(rows, 4, size)
                slope = a - a.square()
                di, df, dg, do = (slope.view(rows, 4, size) * da).unbind(1)
                dg = da[:, 2] * (1 - g.square())
                dc = (f * dc).addcmul_(df, cells[t]).addcmul_(di, g).addcmul_(i, dg)
                dh = (do * squashed[t]).addcmul_(o * (1 - squashed[t].square()), dc)
                moved.append(dh)
        ctx.save_for_backward(both, factor, changes, acts, cells, squashed, outputs)
        ctx.linear = linear is not None
        out, end = outputs[1:].transpose(0, 1), cells[-1].clone()
        if linear is None:
            return out, end
        found = out, end, torch.stack(moved, 1), dc
        ctx.mark_non_differentiable(*found[2:])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        both, factor, changes, acts, cells, squashed, outputs = ctx.saved_tensors
        steps, rows, gates = acts.shape
        size, one = gates // 4, acts.new_ones(())
        back = both[:gates] if ctx.linear else both
        outer = acts.new_empty(steps, rows, len(back))
        dh, dc = torch.zeros_like(cells[0]), grads[1].clone()
        for t in reversed(range(steps)):
            a = acts[t].view(rows, 4, size)
            i, f, g, o = a.unbind(1)
            s = squashed[t]
            dh = dh + grads[0][:, t]
            dc.addcmul_(dh, torch.addcmul(o, o * s, s, value=-1))
            d = outer[t, :, :gates].view(rows, 4, size)
            torch.mul(dc, g, out=d[:, 0])
            torch.mul(dc, cells[t], out=d[:, 1])
            torch.mul(dc, i, out=d[:, 2])
            torch.mul(dh, s, out=d[:, 3])
            slope = torch.addcmul(a, a, a, value=-1)
            torch.addcmul(one, g, g, value=-1, out=slope[:, 2])
            d.mul_(slope)
            dc.mul_(f)
            if not ctx.linear:
                torch.mul(outer[t, :, :gates], factor, out=outer[t, :, gates:])
            dh = outer[t] @ back
        wanted = ctx.needs_input_grad
        weight, response = _products(outputs[:-1], outer, factor, wanted[3:5])
        outer = outer[..., :gates]
        of_factor = _inner(outer, changes) if wanted[5] else None
        of_constant = outer.sum(0) if wanted[6] else None
        return outer.transpose(0, 1), dh, dc, weight, response, of_factor, of_constant, None


class _GRU(torch.autograd.Function):
    """See `gru_scan`."""

    @staticmethod
    def forward(
        ctx: Any,
        into: Tensor,
        h: Tensor,
        weight: Tensor,
        response: Tensor,
        factor: Tensor,
        constant: Tensor,
        linear: Linear,
    ) -> Any:
        rows, steps, gates = into.shape
        size = gates // 3
        both = torch.cat([weight, response])
        x = into.transpose(0, 1)
        changes, acts = x.new_empty(steps, rows, gates), x.new_empty(steps, rows, gates)
        inner = x.new_empty(steps, rows, size)
        outputs = x.new_empty(steps + 1, rows, size)
        outputs[0] = h
        moved: list[Tensor] = []
        if linear is not None:
            (dh,), offset, extra = linear[0].states, linear[1], linear[0].into.transpose(0, 1)
        for t in range(steps):
            product, change = outputs[t] @ both.T, changes[t]
            change.copy_(product[:, gates:])
            u = constant + product[:, :gates]
            if linear is None:
                u.addcmul_(factor, change)
            a = acts[t]
            torch.add(x[t, :, : 2 * size], u[:, : 2 * size], out=a[:, : 2 * size])
            a[:, : 2 * size].sigmoid_()
            r, z, n = a.view(rows, 3, size).unbind(1)
            inner[t] = u[:, 2 * size :]
            torch.addcmul(x[t, :, 2 * size :], r, inner[t], out=n)
            n.tanh_()
            torch.lerp(n, outputs[t], z, out=outputs[t + 1])
            if linear is not None:
                du = torch.addmm(factor * change, dh, weight.T)
                if offset is not None:
                    du += offset
                dr, dz = ((extra[t] + du)[:, : 2 * size] * (a - a.square())[:, : 2 * size]).chunk(
                    2, 1
                )
                dn = extra[t, :, 2 * size :] + dr * inner[t] + r * du[:, 2 * size :]
                dn = dn * (1 - n.square())
                dh = dn + z * (dh - dn) + dz * (outputs[t] - n)
                moved.append(dh)
        ctx.save_for_backward(both, factor, changes, acts, inner, outputs)
        ctx.linear = linear is not None
        out = outputs[1:].transpose(0, 1)
        if linear is None:
            return out
        tangent = torch.stack(moved, 1)
        ctx.mark_non_differentiable(tangent)
        return out, tangent

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        both, factor, changes, acts, inner, outputs = ctx.saved_tensors
        steps, rows, gates = acts.shape
        size = gates // 3
        back = both[:gates] if ctx.linear else both
        into, outer = torch.empty_like(acts), acts.new_empty(steps, rows, len(back))
        dh = torch.zeros_like(outputs[0])
        for t in reversed(range(steps)):
            r, z, n = acts[t].view(rows, 3, size).unbind(1)
            dh = dh + grads[0][:, t]
            d = into[t].view(rows, 3, size)
            torch.mul(dh, (1 - z) * (1 - n.square()), out=d[:, 2])
            torch.mul(dh, (outputs[t] - n) * (z - z.square()), out=d[:, 1])
            torch.mul(d[:, 2], inner[t] * (r - r.square()), out=d[:, 0])
            own = outer[t, :, :gates]
            own.copy_(into[t])
            own[:, 2 * size :].mul_(r)
            if not ctx.linear:
                torch.mul(own, factor, out=outer[t, :, gates:])
            dh = torch.addmm(dh * z, outer[t], back)
        wanted = ctx.needs_input_grad
        weight, response = _products(outputs[:-1], outer, factor, wanted[2:4])
        outer = outer[..., :gates]
        of_factor = _inner(outer, changes) if wanted[4] else None
        of_constant = outer.sum(0) if wanted[5] else None
        return into.transpose(0, 1), dh, weight, response, of_factor, of_constant, None
