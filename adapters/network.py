"""The plain learner: a multilayer perceptron with every usual regularizer in its space.

    min_w  mean_b Σ_k s_bk ℓ_q(p_bk)  +  ½ Σ_l λ_l ‖W_l‖²  +  ½ Σ_i μ_i w_i²

    p = softmax(net(augment(x); dropout)),   s = (1 − ε) onehot(y) + ε/K,   ℓ_q(p) = (1 − p^q)/q

by stochastic gradients with momentum, or Adam.  ℓ_q is cross entropy for q → 0 and absolute error
at q = 1, which wrong labels harm less.  All weights are trained, nothing is frozen.  Everything
but the architecture and the kind of optimizer is smooth, so that it can be tuned by
hypergradients; learning rate and momentum belong to the sampler at first, because they do not
change where training ends up and only unrolled hypergradients see them.

Sources: Srivastava et al., JMLR 2014, section 10 (multiplicative Gaussian dropout); Szegedy et
al., CVPR 2016, section 7 (label smoothing); Zhang and Sabuncu, NeurIPS 2018, equation 6
(generalized cross entropy ℓ_q).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.method import Batch, Method
from adapters.networks import MLP
from adapters.tasks import Classification
from bilevel.domains import Choice, Grad, Int
from bilevel.space import Space
from hypergrad.optimizers import SGD, Adam, Optimizer, Value

__all__ = ["Network"]


class Network(Method):
    """Perceptron with decay per layer and per weight, dropout, augmentation and robust losses."""

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
            0.02, low=0.0, high=0.5, doc="share ε of a label spread over all classes; smooth"
        ),
        robustness=Grad(
            0.05, low=0.0, high=1.0, doc="q of the loss: 0 cross entropy, 1 absolute error; smooth"
        ),
        input_noise=Grad(0.02, low=0.0, high=0.3, doc="standard deviation of input noise; smooth"),
        shift=Grad(0.05, low=0.0, high=1.0, doc="largest shift of an image in pixels; smooth a.e."),
        width=Int(16, 256, log=True, default=64, doc="units of a hidden layer"),
        depth=Int(1, 3, default=2, doc="hidden layers"),
        activation=Choice("relu", "tanh", "silu", default="relu", doc="hidden activation"),
        optimizer=Choice("sgd", "adam", default="sgd", doc="SGD with momentum, or Adam"),
    ).own(lr="sampler", momentum="sampler")

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

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        """One value per layer, hidden layer and weight."""
        layers = _layers(model)
        return {
            "layer_decay": (len(layers),),
            "dropout": (len(layers) - 1,),
            "weight_decay": (sum(layer.weight.numel() for layer in layers),),
        }

    def idle(self) -> Collection[str]:
        """Only images can be shifted."""
        return () if self.setting.task.is_image else ("shift",)

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """SGD or Adam with the space's learning rate and momentum."""
        if self.setting.constants["optimizer"] == "adam":
            # eps well above the usual 1e-8: the hypergradient in float32 needs it.
            return Adam(lr=hyper("lr"), betas=(hyper("momentum"), 0.999), eps=1e-5)
        return SGD(lr=hyper("lr"), momentum=hyper("momentum"))

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        """Generalized cross entropy with smoothed labels on an augmented batch, with dropout."""
        x = batch["x"]
        if self.setting.task.is_image:
            for axis in (2, 3):
                x = _shifted(x, hparams["shift"], axis)
        x = x + hparams["input_noise"] * torch.randn_like(x)
        deviations = _deviations(hparams["input_dropout"], hparams["dropout"], _layers(model), x)
        log_p = model(x, lambda i, h: _gaussian_dropout(h, deviations[i])).log_softmax(dim=1)

        q, share = hparams["robustness"], hparams["label_smoothing"]
        costs = -torch.expm1(q * log_p) / q if _is_tuned_or_positive(q) else -log_p
        hit = costs.gather(1, batch["y"][:, None]).mean()
        loss: Tensor = (1 - share) * hit + share * costs.mean()
        return loss

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        """½ Σ_l λ_l ‖W_l‖² + ½ Σ_i μ_i w_i² over the weight matrices; biases are free."""
        layers = _layers(model)
        squares = [layer.weight.square().flatten() for layer in layers]
        every_square = torch.cat(squares)
        decay = torch.as_tensor(hparams["layer_decay"]).to(every_square).expand(len(layers))
        per_layer = torch.dot(decay, torch.stack([s.sum() for s in squares]))
        fine = torch.as_tensor(hparams["weight_decay"]).to(every_square)
        return 0.5 * (per_layer + torch.dot(fine.expand_as(every_square), every_square))


def _layers(model: nn.Module) -> list[nn.Linear]:
    return list(cast(MLP, model).layers)  # type: ignore[arg-type]


def _is_tuned_or_positive(value: float | Tensor) -> bool:
    """Whether a value may stand in a denominator: a tuned one is strictly positive."""
    return isinstance(value, Tensor) or value > 0


def _deviations(
    first: float | Tensor, hidden: float | Tensor, layers: list[nn.Linear], like: Tensor
) -> tuple[Tensor, ...]:
    """Return √(p/(1 − p)) of the input of each layer."""
    rates = [
        torch.as_tensor(rate, dtype=like.dtype, device=like.device) for rate in (first, hidden)
    ]
    p = torch.cat([rates[0].reshape(1), rates[1].expand(len(layers) - 1)])
    return (p / (1 - p)).sqrt().unbind()


def _gaussian_dropout(h: Tensor, deviation: Tensor) -> Tensor:
    """h ⊙ (1 + √(p/(1 − p)) ε): mean and variance of dropout at rate p, and smooth in p."""
    return torch.addcmul(h, h, deviation * torch.randn_like(h))


def _shifted(x: Tensor, strength: float | Tensor, axis: int) -> Tensor:
    """Shift each image by a ∈ [−strength, strength] pixels, linear between neighbors.

    (1 − |a|) x + |a| roll(x, sign a), a = strength · u, u uniform in [−1, 1].
    """
    shape = (len(x), *(1,) * (x.dim() - 1))
    u = 2 * torch.rand(shape, dtype=x.dtype, device=x.device) - 1
    neighbor = torch.where(u > 0, x.roll(1, axis), x.roll(-1, axis))
    return torch.lerp(x, neighbor, u.abs() * strength)
