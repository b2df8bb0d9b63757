"""ALLoRA: LoRA whose gradients shrink as a row of the increment grows.

    W = W₀ + M,  M = B A;   row i of ∂L/∂M is multiplied by  c_i = (‖M_i‖^{2q} + 1/η²)^{−1/2}

With q = ½, the paper's, the norm itself stands under the root, not its square.  Trained: A, B and
the last layer; frozen: W₀ and the biases; no dropout, no scale.  The forward is that of LoRA.

The factor is a stop-gradient in training: W = W₀ + M̄ + c ⊙ (M − M̄) with c and M̄ = M detached.  On a
model of your own they are detached in the forward: right for training, 12 % off in a hypergradient
through training.  The learner makes both `Method.detached` quantities, so that hypergradients are
exact.  η changes the path and not the stationary points: its hypergradient
needs `Unrolled`.  Under Adam the factor nearly cancels for B.

Source: Huang and Balestriero, ALLoRA, arXiv 2410.09692, section 3.  q and g are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters.finetune import DECAY, learning_rate
from adapters.method import Batch
from adapters.reparam import Parts, Reparam, Start, configured, replaced
from adapters.weights.method import WeightAdapter
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space

__all__ = ["ALLoRA", "ALLoRAMethod"]


@dataclass(frozen=True)
class ALLoRA(Reparam):
    """W = W₀ + B A with scaled gradients.

    Attributes:
        rank: r.
        eta_sq: η².
        exponent: q.
        gain: g, the start of A relative to LoRA's.
        granularity: a norm for each "row", or one for the "matrix".
        stop_gradient: whether the factor is detached in the forward; False, for losses that are
            differentiated through training, leaves the gradient of LoRA unless `frozen` is there.
        frozen: factors c, shape (outputs, 1), and increment M̄ from outside.
    """

    rank: int = 4
    eta_sq: float | Tensor = 2.0
    exponent: float | Tensor = 0.5
    gain: float | Tensor = 1.0
    granularity: Literal["row", "matrix"] = "row"
    stop_gradient: bool = True
    frozen: tuple[Tensor, Tensor] | None = None

    def start(self, start: Start) -> Parts:
        if self.granularity not in ("row", "matrix"):
            raise ValueError(
                f"granularity must be 'row' or 'matrix', but got {self.granularity!r}."
            )
        r, (rows, columns) = start.check_rank(self.rank), start.weight.shape
        first = start.uniform(r, columns, bound=1 / math.sqrt(columns))
        return Parts({"A": start.zeros(r, columns), "B": start.zeros(rows, r)}, {"A0": first})

    def increment(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return M = B A."""
        return parts["B"] @ (self.gain * parts["A0"] + parts["A"])

    def factor(self, increment: Tensor) -> Tensor:
        """Return c, shape (outputs, 1)."""
        squares = increment.square().sum(dim=1, keepdim=True)
        if self.granularity == "matrix":
            squares = squares.sum().expand_as(squares)
        # The smallest normal number: the power has an infinite derivative at zero.
        tiny = torch.finfo(squares.dtype).tiny
        norms = torch.where(squares > 0, squares.clamp(min=tiny), 1.0) ** self.exponent
        return (torch.where(squares > 0, norms, 0.0) + 1 / self.eta_sq) ** -0.5

    def weight(self, w: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        increment = self.increment(parts)
        if self.frozen is not None:
            c, detached = self.frozen
        elif self.stop_gradient:
            detached = increment.detach()
            c = self.factor(detached)
        else:
            return w + increment
        return w + detached + c * (increment - detached)


class ALLoRAMethod(WeightAdapter):
    """ALLoRA: LoRA with a learning rate that falls as a row grows (Huang and Balestriero, 2024)."""

    name = "allora"
    reparam = ALLoRA
    space = Space(
        lr=learning_rate(0.01),
        weight_decay=DECAY,
        eta_sq=Grad(2.0, low=0.1, high=16.0, scale="log", doc="η², the gain at the start; smooth"),
        exponent=Grad(0.5, low=0.05, high=1.0, doc="q of the norm, ½ in the paper; smooth"),
        gain=Grad(1.0, low=0.1, high=3.0, scale="log", doc="start g of A; smooth"),
        granularity=Choice("row", "matrix", default="row", doc="what a factor belongs to"),
        rank=Int(1, 32, log=True, default=4, doc="rank r of the increment"),
    ).own(lr="sampler")

    def settings(self) -> Reparam:
        """The map without stop-gradients of its own."""
        return replaced(super().settings(), {"stop_gradient": False})

    def detached(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch
    ) -> dict[str, Tensor]:
        """The factor and the increment of each layer."""
        found = {}
        with configured(model, hparams) as layers:
            for name, layer in layers.items():
                reparam = layer.reparam
                assert isinstance(reparam, ALLoRA)
                increment = reparam.increment(layer.parts)
                found[f"allora/{name}/factor"] = reparam.factor(increment)
                found[f"allora/{name}/increment"] = increment
        return found

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """The task's loss at W₀ + M̃."""
        task = self.setting.task
        with configured(model, hparams) as layers:
            for name, layer in layers.items():
                pair = (batch[f"allora/{name}/factor"], batch[f"allora/{name}/increment"])
                layer.reparam = replaced(layer.reparam, {"frozen": pair})
            losses: Tensor = task.measure(model(batch["x"]), batch)["loss"]
            return losses.mean()
