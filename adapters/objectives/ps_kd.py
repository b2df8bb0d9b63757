"""PS-KD: targets softened by the network's own predictions of the last epoch.

    min_w  mean_b −Σ_k Q_bk log softmax(f_w(x_b))_k,     Q = (1 − α_t) onehot(y) + α_t P

    α_t = α_T (t/T)^p,   P[i] ← d P[i] + (1 − d) softmax(f_w(x_i))

P, one row for each training sample, holds onehot(y) until the sample has been seen, so the first
epoch is plain cross entropy whatever α_T is.  P is taken from the forward pass of the training
step, before the step.  All weights are trained, nothing is frozen.

Hypergradients hold P constant: that past predictions depend on weights, and so on α_T, is left out
(a truncation).  The decay d of the table acts through P only, so it belongs to the sampler.  The
stream of batches drops the few samples left over at the end of an epoch; their rows keep an older
prediction.

Source: Kim, Ji, Yoon and Hwang, "Self-Knowledge Distillation with Progressive Refinement of
Targets", ICCV 2021.  The exponent p, the cosine shape and the decay are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.losses import half_squares, soft_cross_entropy
from adapters.method import Batch, Method, keep
from adapters.networks import MLP
from adapters.tasks import Classification
from bilevel.domains import Choice, Float, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import SGD, Optimizer, Value

__all__ = ["PSKD"]


class PSKD(Method):
    """Progressive self-knowledge distillation: targets softened by the last epoch's predictions."""

    name = "ps_kd"
    space = Space(
        softening=Grad(0.8, low=0.0, high=0.99, doc="α_T, weight of P at the last epoch; smooth"),
        shape=Choice("power", "cosine", default="power", doc="of α_t over the epochs"),
        exponent=Grad(
            1.0,
            low=0.0,
            high=3.0,
            when={"shape": "power"},
            doc="p: near 0 constant, 1 linear; smooth",
        ),
        delay=Float(0.0, 0.5, default=0.0, doc="share of the epochs without softening"),
        table_decay=Float(0.0, 0.99, default=0.0, doc="d; 0 keeps the last prediction"),
        lr=Grad(0.1, low=1e-3, high=1.0, scale="log", doc="learning rate; smooth"),
        weight_decay=Grad(5e-4, low=1e-6, high=1e-2, scale="log", doc="L2 penalty; smooth"),
        epochs=Int(1, 300, log=True, default=40, doc="T; later epochs keep α_T"),
        activation=Choice("relu", "tanh", "silu", default="relu", doc="hidden activation"),
        batch=Int(16, 512, log=True, default=64, doc="samples of a batch"),
    ).own(lr="sampler")

    def network(self) -> nn.Module:
        """A perceptron with two hidden layers of 128 units."""
        task = cast(Classification, self.setting.task)
        activation = self.setting.constants["activation"]
        return MLP(task.input_shape, task.n_classes, width=128, activation=activation)

    def attach(self, model: nn.Module) -> None:
        """Start the table at the labels."""
        task = cast(Classification, self.setting.task)
        self.memory["table"] = F.one_hot(task.split("train")["y"], task.n_classes).to(task.dtype)

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        """The space's "batch"."""
        return cast(int, hparams["batch"])

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """SGD with Nesterov momentum 0.9."""
        return SGD(lr=hyper("lr"), momentum=0.9, nesterov=True)

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ λ ‖w‖²: for SGD the same as weight decay, and seen by every estimator."""
        return half_squares(hparams["weight_decay"], model.parameters())

    def epoch(self, step: int) -> int:
        """Return the epoch of a step, 1 ... T."""
        rows = len(self.setting.task.split("train")["y"])
        batches = rows // min(rows, self.setting.constants["batch"])
        return int(min(step // batches + 1, self.setting.constants["epochs"]))

    def softening(self, hparams: Mapping[str, Any], epoch: int) -> Any:
        """Return α_t of an epoch."""
        progress = epoch / hparams["epochs"]
        if hparams["shape"] == "cosine":
            alpha = hparams["softening"] * (1 - math.cos(math.pi * progress)) / 2
        else:
            alpha = hparams["softening"] * progress ** hparams["exponent"]
        # Zero, but a function of the hyperparameters: a hypergradient in the delay is zero, too.
        return 0.0 * alpha if progress <= hparams["delay"] else alpha

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Cross entropy with softened targets."""
        logits = model(batch["x"])
        keep(batch, predicted=logits)
        alpha = self.softening(hparams, self.epoch(batch["step"]))
        hot = F.one_hot(batch["y"], logits.shape[1]).to(logits.dtype)
        targets = (1 - alpha) * hot + alpha * self.memory["table"][batch["index"]]
        return soft_cross_entropy(logits, targets).mean()

    def after_batch(self, batch: Batch) -> Mapping[str, float]:
        """P[I] ← d P[I] + (1 − d) softmax(z); the first prediction replaces the label."""
        table, rows = self.memory["table"], batch["index"]
        predicted = batch["kept"]["predicted"].softmax(dim=1)
        first = self.epoch(batch["step"]) == 1
        decay = 0.0 if first else self.setting.constants["table_decay"]
        table[rows] = torch.lerp(predicted, table[rows], decay)
        return {}
