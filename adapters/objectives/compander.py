"""Weight compander: bounded weights whose amplitude and slope are tuned on validation data.

    w = a φ(v/b) for every weight matrix,   a = s α,  b = s α/γ,   s = the layer's first spread

Trained: v and the biases; nothing is frozen.  α and γ, one of each layer or shared by all, are
smooth hyperparameters: tuned on the validation loss by hypergradients.  With
``learned_on="training"`` they are trained with the weights, as published, from the given values,
which undoes the regularization.  The decay acts on v, or on w with ``decay_of="effective"``;
biases never decay.

Source: Cakaj, Mehnert and Yang, arXiv 2306.16993; see `bilevel.compander`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.method import Batch, Method, State
from adapters.networks import MLP
from adapters.tasks import Classification
from bilevel.compander import WeightCompander, bake, bound, compand, companders
from bilevel.compander_training import confine, squared_norm
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space

__all__ = ["CompandedNetwork"]


class CompandedNetwork(Method):
    """Weight compander: bounded weights, their bound and slope tuned (Cakaj et al., 2023)."""

    name = "compander"
    space = Space(
        lr=Grad(0.02, low=1e-4, high=0.5, scale="log", doc="learning rate; smooth"),
        weight_decay=Grad(1e-4, low=1e-7, high=0.1, scale="log", doc="L2 penalty; smooth"),
        amplitude=Grad(2.0, low=0.25, high=8.0, scale="log", doc="α, one per layer; smooth"),
        gamma=Grad(2.0, low=0.25, high=8.0, scale="log", doc="slope γ, one per layer; smooth"),
        shape=Choice("arctan", "softsign", "tanh", default="arctan", doc="φ"),
        start=Choice("plain", "matched", default="plain", doc="v is the weight, or its inverse"),
        sharing=Choice("layer", "shared", default="layer", doc="one α and γ per layer, or for all"),
        learned_on=Choice(
            "validation", "training", default="validation", doc="the loss that moves α and γ"
        ),
        decay_of=Choice(
            "latent", "effective", default="latent", doc="whether v decays, or the weight"
        ),
        width=Int(16, 512, log=True, default=64, doc="units of the two hidden layers"),
        activation=Choice("relu", "tanh", "silu", default="relu", doc="hidden activation"),
    ).own(lr="sampler")

    def network(self) -> nn.Module:
        """A perceptron with two hidden layers."""
        task, c = cast(Classification, self.setting.task), self.setting.constants
        return MLP(task.input_shape, task.n_classes, width=c["width"], activation=c["activation"])

    def attach(self, model: nn.Module) -> None:
        """Compand all weight matrices, at the first α and γ."""
        c = {**self.setting.constants, **self.setting.initial}
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        first = {
            k: torch.as_tensor(c[k], dtype=torch.float64).expand(len(names)).tolist()
            for k in _TUNED
        }
        each = [
            WeightCompander(
                a, g, shape=c["shape"], start=c["start"], learned=self._trained,
                sharing=c["sharing"],
            )
            for a, g in zip(*first.values(), strict=True)
        ]  # fmt: skip
        if c["sharing"] == "shared":
            compand(model, each[0])
        else:
            for name, settings in zip(names, each, strict=True):
                compand(model, settings, name)

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """One amplitude and one slope for each layer, or one for all."""
        if self.setting.constants["sharing"] == "shared":
            return {}
        return dict.fromkeys(_TUNED, (len(companders(model)),))

    def idle(self) -> Collection[str]:
        """α and γ are only where a and b start, if those are trained."""
        return _TUNED if self._trained else ()

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Return the logits with the amplitudes and slopes of now."""
        with self._bound(model, hparams):
            return cast(Tensor, model(batch["x"]))

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ λ Σ v² or ½ λ Σ w² over the weight matrices."""
        with self._bound(model, hparams):
            squares = squared_norm(model, self.setting.constants["decay_of"])
        return cast(Tensor, 0.5 * hparams["weight_decay"] * squares)

    def after_step(self, state: State) -> None:
        """Keep a and b in sane ranges where they are trained."""
        if self._trained:
            logs = [name[:-1] for name in state.params if name.endswith(".log_a")]
            confine([(state.params[f"{log}a"], state.params[f"{log}b"]) for log in logs])

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        """Bake the weights."""
        with self._bound(model, hparams):
            return bake(model)

    @property
    def _trained(self) -> bool:
        """Whether a and b are trained with the weights."""
        return cast(bool, self.setting.constants["learned_on"] == "training")

    def _bound(self, model: nn.Module, hparams: Mapping[str, Any]) -> Any:
        if self._trained:
            return nullcontext()
        count = len(companders(model))
        like = next(model.parameters())
        a = torch.as_tensor(hparams["amplitude"]).to(like).expand(count)
        return bound(model, a, a / torch.as_tensor(hparams["gamma"]).to(like))


_TUNED = ("amplitude", "gamma")
