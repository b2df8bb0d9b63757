"""The two losses at points (x, θ), with counted derivatives, one row of x for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import optree
import torch
from torch import Tensor

from bilevel.inexact.charts import Chart
from bilevel.inexact.samples import SampleLoss, SampleProblem
from bilevel.inner import Inner
from bilevel.metrics import Cost
from hypergrad import Problem
from hypergrad.operators import vector_jacobian
from hypergrad.problem import check_scalar, inner_gradient
from hypergrad.tree import Leaves, Tree, trainable_leaves, zeros_for_none

__all__ = ["Level", "Outer", "Point"]


@dataclass(frozen=True)
class Outer:
    """The outer loss at a point.

    Attributes:
        values: gᵢ, shape (m,).
        gradient: ∇ₓgᵢ, shape (m, n).
        direct: mean of ∂gᵢ/∂θ, shape (d,).
    """

    values: Tensor
    gradient: Tensor
    direct: Tensor


@dataclass(frozen=True)
class Point:
    """∇ₓh at a point, and products with its derivatives; each product is counted.

    Attributes:
        gradient: ∇ₓhᵢ, shape (m, n).
        hvp: (m, n) -> rows Hᵢ vᵢ.
        cross: (m, n) -> Σᵢ Jᵢᵀ vᵢ, shape (d,).
        jvp: (d,) -> rows Jᵢ t.
        third: (e, q) -> the gradient of Σᵢ eᵢᵀHᵢqᵢ in x, (m, n), and in θ, (d,).
    """

    gradient: Tensor
    hvp: Callable[[Tensor], Tensor]
    cross: Callable[[Tensor], Tensor]
    jvp: Callable[[Tensor], Tensor]
    third: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Level:
    """Evaluates an inner level's losses on one pair of batches.

    Args:
        inner: the inner level; a `SampleProblem` has as many samples as its params have rows,
            any other problem is one sample.
        chart: coordinates θ.
        inner_batch: batch of h.
        outer_batch: batch of g.
        outer_step: number of the outer step.
        rows: samples to look at; every tensor of params and batches has one row for each sample.

    Attributes:
        chart: see above.
        outer_step: see above.
        samples: m.
        steps: iterations of lower-level solvers so far.
        gradients: gradient evaluations so far, of h and of g, all samples together.
        hvps: products with second derivatives so far.
        direct: whether the outer loss was seen to depend on θ directly.
        reached: names of the hyperparameters that a derivative has arrived at.

    Raises:
        ValueError: the tensors of a `SampleProblem` differ in their number of rows.
    """

    def __init__(
        self,
        inner: Inner,
        chart: Chart,
        inner_batch: Any,
        outer_batch: Any,
        outer_step: int = 0,
        rows: Sequence[int] | None = None,
    ) -> None:
        self.chart, self.outer_step = chart, outer_step
        params, problem = inner.params, inner.problem
        if rows is not None:
            index = list(rows)
            params, inner_batch, outer_batch = (
                optree.tree_map(lambda t: _pick(t, index), tree)
                for tree in (params, inner_batch, outer_batch)
            )
        self._inner_batch, self._outer_batch = inner_batch, outer_batch
        self._params = trainable_leaves(params)
        self.samples = 1
        self._rows = False
        if isinstance(problem, SampleProblem):
            counts = {
                name: _rows(t) for name, t in zip(self._params.names, self._tensors, strict=True)
            }
            if len(set(counts.values())) > 1 or None in counts.values():
                raise ValueError(
                    "params of a SampleProblem must have one row for each sample, but the numbers "
                    f"of rows are {counts}."
                )
            self.samples, self._rows = len(self._tensors[0]), True
            self._sample_outer: SampleLoss = self._checked(problem.sample_outer_loss, "outer")
            sample_inner = self._checked(problem.sample_inner_loss, "inner")
            self._problem = Problem(
                lambda w, h, batch: sample_inner(w, h, batch).sum(), problem.outer_loss
            )
        else:
            self._problem = problem
            self._sample_outer = lambda w, h, batch: problem.outer_loss(w, h, batch).reshape(1)
        self.steps = self.gradients = self.hvps = 0
        self.direct = False
        self.reached: set[str] = set()

    @property
    def _tensors(self) -> list[Tensor]:
        return list(self._params.tensors)

    def _checked(self, loss: SampleLoss, which: str) -> SampleLoss:
        def evaluate(w: Tree, h: Tree, batch: Any) -> Tensor:
            values = loss(w, h, batch)
            if values.shape != (self.samples,):
                raise ValueError(
                    f"the {which} loss of a SampleProblem must return one value for each of the "
                    f"{self.samples} samples, but got shape {tuple(values.shape)}."
                )
            return values

        return evaluate

    @property
    def cost(self) -> Cost:
        """Work so far."""
        return Cost(steps=self.steps, gradients=self.gradients, hvps=self.hvps)

    @property
    def start(self) -> Tensor:
        """The inner level's current weights as rows (m, n)."""
        return self._pack([t.detach() for t in self._tensors])

    def params(self, x: Tensor) -> Tree:
        """Return the tree of weights at x, marked as trained."""
        return self._params.rebuild(self._leaves(x))

    def slope(self, x: Tensor, theta: Tensor) -> tuple[float, Tensor]:
        """Return Σᵢ hᵢ and the rows ∇ₓhᵢ, without second derivatives.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.gradients += 1
        w, h = self._at(x, theta)
        value, gradient = inner_gradient(self._problem, w, h, self._inner_batch, create_graph=False)
        return float(value), self._pack(gradient).detach()

    def linearize(self, x: Tensor, theta: Tensor) -> Point:
        """Return ∇ₓh and products with its derivatives.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        self.gradients += 1
        w, h = self._at(x, theta)
        _, gradient = inner_gradient(self._problem, w, h, self._inner_batch)
        rows = self._pack(gradient)

        def hvp(v: Tensor) -> Tensor:
            self.hvps += 1
            found = vector_jacobian(gradient, w.tensors, self._unpack(v))
            return self._pack(zeros_for_none(found, w.tensors))

        def cross(v: Tensor) -> Tensor:
            self.hvps += 1
            found = vector_jacobian(gradient, h.tensors, self._unpack(v))
            self._mark(found)
            return self.chart.flat.pack(zeros_for_none(found, h.tensors))

        def jvp(t: Tensor) -> Tensor:
            # J t by differentiating the linear map u -> Jᵀu.
            self.hvps += 1
            u = torch.zeros_like(rows, requires_grad=True)
            if not rows.requires_grad:
                return torch.zeros_like(rows)
            pulled = torch.autograd.grad(rows, h.tensors, u, create_graph=True, allow_unused=True)
            self._mark(pulled)
            kept = [
                (p, piece)
                for p, piece in zip(pulled, self.chart.flat.unpack(t), strict=True)
                if p is not None and p.requires_grad
            ]
            if not kept:
                return torch.zeros_like(rows)
            (pushed,) = torch.autograd.grad(
                [p for p, _ in kept], u, [piece for _, piece in kept], retain_graph=True,
                allow_unused=True,
            )  # fmt: skip
            return torch.zeros_like(rows) if pushed is None else pushed.detach()

        def third(e: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            self.hvps += 2
            inputs = [*w.tensors, *h.tensors]
            if not rows.requires_grad:
                return torch.zeros_like(rows), torch.zeros_like(theta)
            product = torch.autograd.grad(rows, w.tensors, q, create_graph=True, allow_unused=True)
            hq = self._pack(zeros_for_none(product, w.tensors))
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if hq.requires_grad:
                found = torch.autograd.grad(hq, inputs, e, retain_graph=True, allow_unused=True)
            cut = len(w.tensors)
            return (
                self._pack(zeros_for_none(found[:cut], w.tensors)),
                self.chart.flat.pack(zeros_for_none(found[cut:], h.tensors)),
            )

        return Point(rows.detach(), hvp, cross, jvp, third)

    def value(self, x: Tensor, theta: Tensor) -> Tensor:
        """Return gᵢ, shape (m,); entries may not be finite."""
        w, h = self._at(x, theta)
        with torch.no_grad():
            return self._sample_outer(w.tree(), h.tree(), self._outer_batch).detach()

    def outer(self, x: Tensor, theta: Tensor) -> Outer:
        """Return the outer loss and its gradients.

        Raises:
            FloatingPointError: a value or a derivative is not finite.
            ValueError: the loss depends on no weight.
        """
        return self._outer(x, theta)[0]

    def outer_hvp(self, x: Tensor, theta: Tensor) -> Callable[[Tensor], Tensor]:
        """Return v -> ∇²ₓₓgᵢ vᵢ at a point."""
        _, gradient, w = self._outer(x, theta, create_graph=True)

        def product(v: Tensor) -> Tensor:
            self.hvps += 1
            found = vector_jacobian(gradient, w.tensors, self._unpack(v))
            return self._pack(zeros_for_none(found, w.tensors))

        return product

    def _outer(
        self, x: Tensor, theta: Tensor, create_graph: bool = False
    ) -> tuple[Outer, list[Tensor], Leaves]:
        self.gradients += 1
        w, h = self._at(x, theta)
        with torch.enable_grad():
            values = self._sample_outer(w.tree(), h.tree(), self._outer_batch)
            total = values.sum()
            check_scalar(total, "outer_loss")
            inputs = [*w.tensors, *h.tensors]
            found: Sequence[Tensor | None] = [None] * len(inputs)
            if total.requires_grad:
                found = torch.autograd.grad(
                    total, inputs, create_graph=create_graph, allow_unused=True
                )
        in_x, in_theta = found[: len(w.tensors)], found[len(w.tensors) :]
        if all(g is None for g in in_x):
            raise ValueError(
                f"outer_loss depends on none of the parameters {w.names}; was it computed under "
                "no_grad, or with a detached tensor?"
            )
        self._mark(in_theta)
        self.direct = self.direct or any(g is not None for g in in_theta)
        gradient = zeros_for_none(in_x, w.tensors)
        rows = self._pack(gradient).detach()
        direct = self.chart.flat.pack(zeros_for_none(in_theta, h.tensors)).detach()
        for what, vector in (("weights", rows), ("hyperparameters", direct)):
            if not bool(torch.isfinite(vector).all()):
                raise FloatingPointError(f"the gradient of outer_loss in the {what} is not finite.")
        return Outer(values.detach(), rows, direct / self.samples), gradient, w

    def _at(self, x: Tensor, theta: Tensor) -> tuple[Leaves, Leaves]:
        w = Leaves(self._leaves(x), self._params.names, self._params.rebuild)
        names, constrain = self.chart.names, self.chart.constrain
        h = Leaves(
            [p.detach().clone().requires_grad_() for p in self.chart.flat.unpack(theta)],
            [f"hparams[{name!r}]" for name in names],
            lambda values: constrain(dict(zip(names, values, strict=True))),
        )
        return w, h

    def _leaves(self, x: Tensor) -> list[Tensor]:
        return [piece.detach().clone().requires_grad_() for piece in self._unpack(x)]

    def _pack(self, tensors: Sequence[Tensor]) -> Tensor:
        dtype = torch.float32
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        return torch.cat([t.reshape(self.samples, -1).to(dtype) for t in tensors], 1)

    def _unpack(self, x: Tensor) -> list[Tensor]:
        sizes = [t.numel() // self.samples for t in self._tensors]
        pieces = torch.split(x.reshape(self.samples, -1), sizes, 1)
        return [p.reshape(t.shape).to(t.dtype) for p, t in zip(pieces, self._tensors, strict=True)]

    def _mark(self, found: Sequence[Tensor | None]) -> None:
        pairs = zip(self.chart.names, found, strict=True)
        self.reached |= {name for name, piece in pairs if piece is not None}


def _pick(leaf: Any, index: list[int]) -> Any:
    return (
        leaf[index].detach().requires_grad_(leaf.requires_grad)
        if isinstance(leaf, Tensor)
        else leaf
    )


def _rows(tensor: Tensor) -> int | None:
    return len(tensor) if tensor.dim() else None
