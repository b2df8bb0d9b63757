"""DiffoRA: which modules of a network are adapted, by a relaxed matrix of gates.

    w_lj = W₀ + G_lj (g(W₀, θ_lj) − W₀),   G = softmax over each row of α, or sigmoid(α)
    min_α L_val(θ*(α), α)   s. t.   θ*(α) = argmin_θ L_train(θ, α)

One entry of α for each module j of layer l.  Search alternates a step of θ on training batches and
a step of α on validation batches; then the best share ρ of the modules is kept, and they are
adapted anew.  Works over anything with a `gate`: every weight map of `adapters.reparam` has one.

Only the abstract of the paper and a summary could be read: relaxation, update and discretization
are the standard form of differentiable search (derived), and whether the paper uses softmax rows or
sigmoids is open.  Score, the gradient of the validation loss in the gates at G = 1, is a simpler
selector that was at least as good in small studies.

Source: Jiang, Wang and Yuan, DiffoRA, arXiv 2502.08905.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

__all__ = ["DifferentialSearch", "Gated", "Selection", "discretize", "gates", "stability"]

Relaxation = Literal["softmax", "sigmoid"]
Loss = Callable[[Any], Tensor]


class Gated(Protocol):
    """Anything that can be switched: 1 on, 0 off, and differentiable between."""

    gate: float | Tensor


def gates(logits: Tensor, relaxation: Relaxation = "softmax") -> Tensor:
    """Return G of α, shape (layers, modules): rows that sum to one, or independent sigmoids.

    Raises:
        ValueError: α is no matrix, or an unknown relaxation.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must be a matrix, but have shape {tuple(logits.shape)}.")
    if relaxation not in ("softmax", "sigmoid"):
        raise ValueError(f"relaxation must be 'softmax' or 'sigmoid', but got {relaxation!r}.")
    return torch.softmax(logits, dim=1) if relaxation == "softmax" else torch.sigmoid(logits)


def discretize(scores: Tensor, share: float, scope: Literal["row", "global"] = "row") -> Tensor:
    """Return a mask of the best share of the modules.

    K = max(1, ⌊ρ N⌋) in each row, or max(1, ⌊ρ L N⌋) of all; ties go to the lower layer and module.

    Args:
        scores: α or other scores, shape (layers, modules).
        share: ρ in (0, 1].
        scope: "row" keeps K in every layer, "global" may leave a layer empty.

    Raises:
        ValueError: ρ outside (0, 1], NaN scores, or an unknown scope.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], but got {share}.")
    if scores.dim() != 2 or scores.isnan().any():
        raise ValueError("scores must be a matrix without NaN.")
    if scope not in ("row", "global"):
        raise ValueError(f"scope must be 'row' or 'global', but got {scope!r}.")
    rows = scores.detach() if scope == "row" else scores.detach().reshape(1, -1)
    count = max(1, math.floor(share * rows.shape[1] + 1e-9))
    mask = torch.zeros_like(rows, dtype=torch.bool)
    mask.scatter_(1, rows.argsort(dim=1, descending=True, stable=True)[:, :count], True)
    return mask.view(scores.shape)


def stability(masks: Sequence[Tensor]) -> float:
    """Return the mean Jaccard index of pairs of selections; below .4 they are mostly noise.

    Raises:
        ValueError: fewer than two selections.
    """
    if len(masks) < 2:
        raise ValueError(f"stability compares at least two selections, but got {len(masks)}.")
    found = [
        float((a & b).sum() / (a | b).sum().clamp(min=1))
        for a, b in itertools.combinations(masks, 2)
    ]
    return sum(found) / len(found)


@dataclass(frozen=True)
class Selection:
    """What a search found.

    Attributes:
        logits: α, shape (layers, modules); for the score selector the accumulated scores.
        mask: the kept modules.
        names: of the kept modules.
        history: α after each outer step, shape (steps, layers, modules).
    """

    logits: Tensor
    mask: Tensor
    names: list[str]
    history: Tensor


@dataclass(frozen=True)
class DifferentialSearch:
    """Search for the modules that are worth adapting.

        rows = [["0"], ["2"]]  # names of modules, one row a layer
        found = DifferentialSearch()(maps(model), rows, params, loss, train, val, share=0.5)

    Attributes:
        steps: steps of θ.
        warm_up: steps of θ before α moves: at B = 0 the first-order gradient of α is exactly zero.
        lr: of Adam on θ.
        gate_lr: of Adam on α, betas (.5, .999).
        relaxation: of the gates.
        hypergradient: "first_order" takes ∂L_val/∂α; "finite_difference" adds the response of one
            step of length `lr` by a central difference (Liu et al., DARTS, 2019); "score" leaves
            all gates at one and accumulates −∂L_val/∂G.
        scope: see `discretize`.

    Raises:
        ValueError: a count or rate out of its range, or an unknown name.
    """

    steps: int = 200
    warm_up: int = 20
    lr: float = 5e-3
    gate_lr: float = 2e-2
    relaxation: Relaxation = "softmax"
    hypergradient: Literal["first_order", "finite_difference", "score"] = "first_order"
    scope: Literal["row", "global"] = "row"

    def __post_init__(self) -> None:
        if not 0 <= self.warm_up < self.steps:
            raise ValueError(
                f"warm_up must lie in 0 ... steps − 1 = {self.steps - 1}, but got {self.warm_up}."
            )
        if not self.lr > 0 or not self.gate_lr > 0:
            raise ValueError(f"rates must be positive, but got {self.lr} and {self.gate_lr}.")
        if self.hypergradient not in ("first_order", "finite_difference", "score"):
            raise ValueError(f"unknown hypergradient {self.hypergradient!r}.")

    def __call__(
        self,
        modules: Mapping[str, Gated],
        rows: Sequence[Sequence[str]],
        params: Sequence[nn.Parameter],
        loss: Loss,
        train: Callable[[int], Any],
        val: Callable[[int], Any],
        *,
        share: float,
    ) -> Selection:
        """Train θ and α in turn, and select.

        Args:
            modules: gated modules by name.
            rows: their names, one row for each layer, rows of one length.
            params: θ; every one takes part in the loss.
            loss: ``(batch) -> scalar`` of the model with its gates.
            train: step -> training batch.
            val: step -> validation batch; never of training samples.
            share: ρ.

        Raises:
            ValueError: rows of different lengths, an unknown or repeated name, no parameter, or
                gates that the loss does not depend on.
            FloatingPointError: a loss is not finite.
        """
        flat = _checked(modules, rows, params)
        discretize(torch.zeros(len(rows), len(rows[0])), share, self.scope)
        like = params[0]
        logits = torch.zeros(len(rows), len(rows[0]), dtype=like.dtype, device=like.device)
        scores, history = torch.zeros_like(logits), []
        inner = torch.optim.Adam(params, self.lr)
        outer = torch.optim.Adam([logits.requires_grad_()], self.gate_lr, betas=(0.5, 0.999))
        try:
            for step in range(self.steps):
                if step >= self.warm_up:
                    if self.hypergradient == "score":
                        scores -= self._outer(flat, modules, logits, params, loss, train, val, step)
                    else:
                        logits.grad = self._outer(
                            flat, modules, logits, params, loss, train, val, step
                        )
                        outer.step()
                    history.append((scores if self._scoring else logits.detach()).clone())
                self._set(flat, modules, self._gates(logits).detach())
                found = torch.autograd.grad(_finite(loss(train(step))), params)
                for parameter, gradient in zip(params, found, strict=True):
                    parameter.grad = gradient
                inner.step()
        finally:
            for name in flat:
                modules[name].gate = 1.0
            inner.zero_grad()
        result = scores if self._scoring else logits.detach()
        mask = discretize(result, share, self.scope)
        names = [name for name, kept in zip(flat, mask.flatten().tolist(), strict=True) if kept]
        return Selection(result, mask, names, torch.stack(history))

    @property
    def _scoring(self) -> bool:
        return self.hypergradient == "score"

    def _gates(self, logits: Tensor) -> Tensor:
        return torch.ones_like(logits) if self._scoring else gates(logits, self.relaxation)

    def _set(self, flat: Sequence[str], modules: Mapping[str, Gated], values: Tensor) -> None:
        for name, value in zip(flat, values.flatten(), strict=True):
            modules[name].gate = value

    def _outer(
        self,
        flat: Sequence[str],
        modules: Mapping[str, Gated],
        logits: Tensor,
        params: Sequence[nn.Parameter],
        loss: Loss,
        train: Callable[[int], Any],
        val: Callable[[int], Any],
        step: int,
    ) -> Tensor:
        """Return the gradient of the validation loss in α, or in the gates for the score."""
        if self._scoring:
            ones = torch.ones_like(logits).requires_grad_()
            self._set(flat, modules, ones)
            return _gradient(_finite(loss(val(step))), [ones])[0]

        def gradient(batch: Any) -> Tensor:
            self._set(flat, modules, gates(logits, self.relaxation))
            return _gradient(_finite(loss(batch)), [logits])[0]

        if self.hypergradient == "first_order":
            return gradient(val(step))
        saved = [p.detach().clone() for p in params]
        self._set(flat, modules, gates(logits, self.relaxation).detach())
        moved = torch.autograd.grad(_finite(loss(train(step))), params)
        _write(params, [w - self.lr * g for w, g in zip(saved, moved, strict=True)])
        self._set(flat, modules, gates(logits, self.relaxation))
        direct, *response = _gradient(_finite(loss(val(step))), [logits, *params])
        norm = torch.sqrt(torch.stack([g.square().sum() for g in response]).sum())
        epsilon = 0.01 / float(norm.clamp(min=1e-12))
        ends = []
        for sign in (1.0, -1.0):
            _write(params, [w + sign * epsilon * g for w, g in zip(saved, response, strict=True)])
            ends.append(gradient(train(step)))
        _write(params, saved)
        return direct - self.lr * (ends[0] - ends[1]) / (2 * epsilon)


def _checked(
    modules: Mapping[str, Gated], rows: Sequence[Sequence[str]], params: Sequence[nn.Parameter]
) -> list[str]:
    if not rows or len({len(row) for row in rows}) != 1 or not rows[0]:
        raise ValueError(
            f"rows must be of one length of at least 1, but have {[len(r) for r in rows]}."
        )
    flat = [name for row in rows for name in row]
    unknown = [name for name in flat if name not in modules]
    if unknown or len(set(flat)) != len(flat):
        raise ValueError(
            f"rows must name each module once; unknown: {unknown}, known: {', '.join(modules)}."
        )
    if not params or not all(p.requires_grad for p in params):
        raise ValueError("params must hold parameters that require grad.")
    return flat


def _finite(loss: Tensor) -> Tensor:
    if not loss.detach().isfinite().all():
        raise FloatingPointError(f"the loss is {float(loss.detach())}.")
    return loss


def _gradient(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    if found[0] is None:
        raise ValueError("the loss does not depend on any gate; do the modules read `gate`?")
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


@torch.no_grad()
def _write(params: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(params, values, strict=True):
        parameter.copy_(value)
