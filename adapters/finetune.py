"""Fine-tuning: methods that start from a network trained on a source."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import artifacts
from adapters.losses import half_squares
from adapters.method import Method
from adapters.networks import MLP
from adapters.tasks import Split, Task, Transfer
from bilevel.domains import Grad
from bilevel.space import Space
from hypergrad import seeded
from hypergrad.optimizers import Adam, Optimizer, Value

__all__ = [
    "ADAM_OWNERS",
    "DECAY",
    "EPS",
    "FineTune",
    "FullFineTune",
    "adam",
    "betas",
    "head_of",
    "learning_rate",
]

DECAY = Grad(1e-5, low=1e-8, high=0.1, scale="log", doc="L2 penalty of all trained; smooth")


EPS = Grad(1e-6, low=1e-12, high=1e-2, scale="log", doc="ε of Adam; smooth")


ADAM_OWNERS = dict.fromkeys(("beta1", "beta2", "eps"), "sampler")
"""Who owns the domains of `betas` and `EPS` by default."""


def betas(second: float = 0.999) -> dict[str, Grad]:
    """Return the domains "beta1" and "beta2" of Adam's averages."""
    return {
        "beta1": Grad(0.9, low=0.0, high=0.999, doc="decay β₁ of the mean; smooth"),
        "beta2": Grad(second, low=0.5, high=0.9999, doc="decay β₂ of the squares; smooth"),
    }


def adam(hyper: Callable[[str], Value]) -> Adam:
    """Return Adam with all of its hyperparameters from the space: "lr", `betas` and "eps"."""
    return Adam(hyper("lr"), (hyper("beta1"), hyper("beta2")), hyper("eps"))


def learning_rate(default: float = 3e-3) -> Grad:
    """Return the domain of Adam's learning rate; each method has a default of its own."""
    return Grad(default, low=1e-6, high=0.3, scale="log", doc="learning rate of Adam; smooth")


class FineTune(Method):
    """Training of a pretrained network by Adam; the base of adapters and sparse methods.

    The network is the artifact "target_net": trained on the source, with the last layer made
    anew and trained for 60 steps on the frozen features where the classes differ.  Subclasses
    freeze and reparametrize in `attach`; the last layer is always trained.  Their space must
    hold "lr" and "weight_decay", λ of the penalty ½ λ ‖θ‖² on everything trained: a penalty and not
    a decoupled decay, so that implicit hypergradients see it.
    """

    task_type: ClassVar[type[Task]] = Transfer
    needs = ("target_net",)

    def network(self) -> nn.Module:
        """Return the pretrained network; everything requires grad."""
        return cast(nn.Module, self.setting.artifacts["target_net"]).requires_grad_(True)

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        """32: the target is small."""
        return 32

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        """Adam with the space's "lr"."""
        # eps above the usual 1e-8: the hypergradient in float32 needs it.
        return Adam(lr=hyper("lr"), eps=1e-6)

    def undecayed(self, model: nn.Module) -> Collection[str]:
        """Return the names of the parameters on which the weight decay does not act."""
        return ()

    def calibrate(self, model: nn.Module) -> Tensor:
        """Return the cross entropy on all training samples, of which adapters take statistics."""
        data = self.setting.task.split("train")
        return F.cross_entropy(model(data["x"]), data["y"])

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor | None:
        """½ λ ‖θ‖² over everything trained but `undecayed`."""
        decayed = self.trained - set(self.undecayed(model))
        trained = [p for n, p in model.named_parameters() if n in decayed]
        return half_squares(hparams["weight_decay"], trained)


class FullFineTune(FineTune):
    """Full fine-tuning of a pretrained network, the baseline of every adapter."""

    name = "finetune"
    space = Space(lr=learning_rate(), weight_decay=DECAY).own(lr="sampler")


def head_of(model: nn.Module) -> str:
    """Return the name of the last linear layer, which maps features to outputs."""
    names: list[str] = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer to be its head.")
    return names[-1]


@artifacts.register("source_net")
def source_net(task: Task, seed: int) -> nn.Module:
    """A perceptron trained on the source: AdamW at 3e-3 for 400 steps of 64 samples."""
    data = _transfer(task)
    with seeded(seed):
        model = MLP(
            data.input_shape, data.source_classes, width=data.hidden, activation=data.activation
        )
    model = model.to(task.device, task.dtype)
    return _train(model, list(model.parameters()), data.split("source"), seed, 3e-3, 400)


@artifacts.register("target_net")
def target_net(task: Task, seed: int) -> nn.Module:
    """The source network with a last layer for the target's classes."""
    data = _transfer(task)
    model = cast(MLP, artifacts.resolve(["source_net"], task, seed)["source_net"])
    if not data.new_head:
        return model
    last = cast(nn.Linear, model.layers[-1])
    with seeded(seed):
        head = nn.Linear(last.in_features, data.n_classes)
    head = head.to(task.device, task.dtype)
    model.layers[-1] = head
    return _train(model, list(head.parameters()), data.split("train"), seed, 1e-2, 60)


def _transfer(task: Task) -> Transfer:
    if not isinstance(task, Transfer):
        raise ValueError(
            f"a pretrained network needs a task of type Transfer, but {task.name!r} is a "
            f"{type(task).__name__}."
        )
    return task


def _train(
    model: nn.Module, trained: list[nn.Parameter], data: Split, seed: int, lr: float, steps: int
) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(trained, lr=lr, foreach=False)
    for _ in range(steps):
        rows = torch.randint(len(data["y"]), (64,), generator=generator).to(data["y"].device)
        with torch.enable_grad():
            loss = F.cross_entropy(model(data["x"][rows]), data["y"][rows])
            grads = torch.autograd.grad(loss, trained)
        for parameter, grad in zip(trained, grads, strict=True):
            parameter.grad = grad
        optimizer.step()
    optimizer.zero_grad()
    return model
