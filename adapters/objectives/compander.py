"""Weight compander: bounded weights whose amplitude and slope are tuned on validation data.

    w = a φ(v/b) for every weight matrix,   a = s α,  b = s α/γ,   s = the layer's first spread

Trained: v and the biases; nothing is frozen.  α and γ, one of each layer, are smooth
hyperparameters: tuned on the validation loss by hypergradients, where the published way, training
them on the training loss, undoes the regularization.  The decay acts on v.

Source: Cakaj, Mehnert and Yang, arXiv 2306.16993; see `bilevel.compander`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.losses import half_squares
from adapters.method import Batch, Method
from adapters.networks import MLP
from adapters.tasks import Classification
from bilevel.compander import WeightCompander, bake, bound, compand, companders
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space

__all__ = ["CompandedNetwork"]


class CompandedNetwork(Method):
    """Weight compander: bounded weights, their bound and slope tuned (Cakaj et al., 2023)."""

    name = "compander"
    space = Space(
        lr=Grad(0.02, low=1e-4, high=0.5, scale="log", doc="learning rate; smooth"),
        weight_decay=Grad(1e-4, low=1e-7, high=0.1, scale="log", doc="L2 penalty on v; smooth"),
        amplitude=Grad(2.0, low=0.25, high=8.0, scale="log", doc="α, one per layer; smooth"),
        gamma=Grad(2.0, low=0.25, high=8.0, scale="log", doc="slope γ, one per layer; smooth"),
        shape=Choice("arctan", "softsign", "tanh", default="arctan", doc="φ"),
        start=Choice("plain", "matched", default="plain", doc="v is the weight, or its inverse"),
        width=Int(16, 512, log=True, default=64, doc="units of the two hidden layers"),
        activation=Choice("relu", "tanh", "silu", default="relu", doc="hidden activation"),
    ).own(lr="sampler")

    def network(self) -> nn.Module:
        """A perceptron with two hidden layers."""
        task, c = cast(Classification, self.setting.task), self.setting.constants
        return MLP(task.input_shape, task.n_classes, width=c["width"], activation=c["activation"])

    def attach(self, model: nn.Module) -> None:
        """Compand all weight matrices."""
        c = self.setting.constants
        compand(model, WeightCompander(shape=c["shape"], start=c["start"]))

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """One amplitude and one slope for each layer."""
        count = len(companders(model))
        return {"amplitude": (count,), "gamma": (count,)}

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the logits with the tuned amplitudes and slopes."""
        a, b = self._values(model, hparams)
        with bound(model, a, b):
            return cast(Tensor, model(batch["x"]))

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ λ ‖v‖², biases included."""
        return half_squares(hparams["weight_decay"], model.parameters())

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Bake the weights."""
        a, b = self._values(model, hparams)
        with bound(model, a, b):
            return bake(model)

    def _values(self, model: nn.Module, hparams: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        count = len(companders(model))
        like = next(model.parameters())
        a = torch.as_tensor(hparams["amplitude"]).to(like).expand(count)
        return a, a / torch.as_tensor(hparams["gamma"]).to(like)
