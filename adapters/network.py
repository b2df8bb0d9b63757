"""The plain learner: a multilayer perceptron with every usual regularizer in its space.

    min_w  CE(net(augment(x); dropout), smooth(y)) + ½ Σ_l λ_l ‖W_l‖² + ½ Σ_i μ_i w_i²

by stochastic gradients with momentum, or Adam.  All weights are trained, nothing is frozen.
Everything but the architecture and the kind of optimizer is smooth, so that it can be tuned by
hypergradients.

Sources: Srivastava et al., JMLR 2014, section 10 (multiplicative Gaussian dropout); Szegedy et
al., CVPR 2016, section 7 (label smoothing).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters.method import Batch, Method
from adapters.networks import MLP
from adapters.tasks import Classification
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import SGD, Adam, Optimizer, Value

__all__ = ["Network"]


class Network(Method):
    """Perceptron with decay per layer and per weight, dropout, label smoothing, augmentation."""

    name = "network"
    space = Space(
        lr=Grad(0.05, low=1e-3, high=0.5, scale="log", doc="learning rate; smooth"),
        momentum=Grad(0.9, low=0.0, high=0.99, doc="of SGD, or beta1 of Adam; smooth"),
        layer_decay=Grad(
            1e-4, low=1e-6, high=1e-2, scale="log", doc="L2 penalty λ, one per layer; smooth"
        ),
        weight_decay=Grad(
            1e-5, low=1e-7, high=3e-2, scale="log", doc="L2 penalty μ, one per weight; smooth"
        ),
        input_dropout=Grad(0.02, low=0.0, high=0.5, doc="dropout rate of the input; smooth"),
        dropout=Grad(0.05, low=0.0, high=0.5, doc="dropout rate, one per hidden layer; smooth"),
        label_smoothing=Grad(
            0.02, low=0.0, high=0.5, doc="share of a label spread over all classes; smooth"
        ),
        noise=Grad(
            0.02, low=0.0, high=0.3, doc="augmentation: std of Gaussian input noise; smooth"
        ),
        shift=Grad(
            0.05,
            low=0.0,
            high=1.0,
            doc="augmentation: largest shift of an image in pixels; smooth almost everywhere",
        ),
        width=Int(16, 256, log=True, default=64, doc="units of a hidden layer"),
        depth=Int(1, 3, default=2, doc="hidden layers"),
        activation=Choice("relu", "tanh", "silu", default="relu", doc="hidden activation"),
        optimizer=Choice("sgd", "adam", default="sgd", doc="SGD with momentum, or Adam"),
    )

    def network(self) -> nn.Module:
        """Build the perceptron of the chosen width, depth and activation."""
        task = cast(Classification, self.setting.task)
        constants = self.setting.constants
        return MLP(
            task.input_shape,
            task.n_classes,
            width=constants["width"],
            depth=constants["depth"],
            activation=constants["activation"],
        )

    def unused(self) -> tuple[str, ...]:
        """Only images can be shifted."""
        return () if self.setting.task.is_image else ("shift",)

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """One value per layer, hidden layer and weight."""
        layers = _layers(model)
        return {
            "layer_decay": (len(layers),),
            "dropout": (len(layers) - 1,),
            "weight_decay": (sum(layer.weight.numel() for layer in layers),),
        }

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """SGD or Adam with tuned learning rate and momentum."""
        if self.setting.constants["optimizer"] == "adam":
            # eps well above the usual 1e-8: the hypergradient in float32 needs it.
            return Adam(lr=hyper("lr"), betas=(hyper("momentum"), 0.999), eps=1e-5)
        return SGD(lr=hyper("lr"), momentum=hyper("momentum"))

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Cross entropy with smoothed labels on an augmented batch, with dropout."""
        x = self._augment(batch["x"], hparams)
        rates = torch.as_tensor(hparams["dropout"], dtype=x.dtype, device=x.device)
        rates = rates.expand(len(_layers(model)) - 1)

        def drop(i: int, h: Tensor) -> Tensor:
            return _gaussian_dropout(h, rates[i - 1] if i else hparams["input_dropout"])

        log_p = F.log_softmax(model(x, drop), dim=1)
        hit = -log_p.gather(1, batch["y"][:, None]).mean()
        share = hparams["label_smoothing"]
        loss: Tensor = (1 - share) * hit - share * log_p.mean()
        return loss

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ Σ_l λ_l ‖W_l‖² + ½ Σ_i μ_i w_i² over the weight matrices; biases are free."""
        layers = _layers(model)
        squares = [layer.weight.square().flatten() for layer in layers]
        all_squares = torch.cat(squares)
        decay = torch.as_tensor(hparams["layer_decay"]).to(all_squares).expand(len(layers))
        per_layer = torch.dot(decay, torch.stack([s.sum() for s in squares]))
        fine = torch.as_tensor(hparams["weight_decay"]).to(all_squares)
        return 0.5 * (per_layer + torch.dot(fine.expand_as(all_squares), all_squares))

    def _augment(self, x: Tensor, hparams: Mapping[str, Any]) -> Tensor:
        if self.setting.task.is_image:
            for axis in (2, 3):
                x = _shifted(x, hparams["shift"], axis)
        noisy: Tensor = x + hparams["noise"] * torch.randn_like(x)
        return noisy


def _layers(model: nn.Module) -> list[nn.Linear]:
    return list(cast(MLP, model).layers)  # type: ignore[arg-type]


def _gaussian_dropout(h: Tensor, rate: float | Tensor) -> Tensor:
    """h ⊙ (1 + √(p/(1−p)) ε): mean and variance of dropout at rate p, and smooth in p."""
    ratio = torch.as_tensor(rate, dtype=h.dtype, device=h.device)
    ratio = ratio / (1 - ratio)
    # The derivative of the root at p = 0 is infinite; a rate of 1e-12 is none.
    return h * (1 + (ratio + 1e-12).sqrt() * torch.randn_like(h))


def _shifted(x: Tensor, strength: float | Tensor, axis: int) -> Tensor:
    """Shift each image by a ∈ [−strength, strength] pixels, linear between neighbors.

    (1 − |a|) x + |a| roll(x, sign a), a = strength · u, u uniform in [−1, 1].
    """
    shape = (len(x), *(1,) * (x.dim() - 1))
    u = 2 * torch.rand(shape, dtype=x.dtype, device=x.device) - 1
    amount = u.abs() * strength
    neighbor = torch.where(u > 0, x.roll(1, axis), x.roll(-1, axis))
    return (1 - amount) * x + amount * neighbor
