"""Small methods that use the trainer's hooks, one idea each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

from adapters import Classification, Method, Task, Trainer, artifacts, every, tasks
from adapters.method import State
from adapters.networks import MLP
from adapters.tasks import Split
from bilevel import Choice, Float, Grad, Int, Space
from hypergrad.optimizers import SGD, Adam, Optimizer, Value

TASK = tasks.get("digits", noise=0.2, n_train=200)


def trainer(method: type[Method], task: Any = TASK, seed: int = 0, **hparams: Any) -> Trainer:
    """Return a learner that runs a method, set up."""
    learner = Trainer.of(method)()
    learner.setup(task, hparams, seed=seed)
    return learner


LR = Float(1e-3, 1.0, log=True, default=0.1)


def sizes(method: Method) -> tuple[int, int]:
    task = cast(Classification, method.setting.task)
    return int(task.split("train")["x"][0].numel()), task.n_classes


class Focal(Method):
    """Focal loss: easy samples weigh less (Lin et al., ICCV 2017, equation 4)."""

    name = "focal"
    space = Space(lr=LR, gamma=Grad(1.0, low=0.0, high=5.0, doc="focusing exponent"))

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Any) -> Tensor:
        log_p = -F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        weight = (1 - log_p.exp()) ** hparams["gamma"]
        loss: Tensor = -(weight * log_p).mean()
        return loss


class Linear(Method):
    """Softmax regression with an L2 penalty, whose gradient is known in closed form."""

    name = "linear"
    space = Space(
        lr=LR,
        momentum=Grad(0.5, low=0.0, high=0.99),
        decay=Grad(0.01, low=1e-6, high=1.0, scale="log"),
        batch=Int(1, 1000, default=64),
        rule=Choice("sgd", "adam"),
    ).own(momentum="sampler")

    def network(self) -> nn.Module:
        task = cast(Classification, self.setting.task)
        return MLP(task.input_shape, task.n_classes, depth=0)

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        return cast(int, hparams["batch"])

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        if hyper("rule") == "adam":
            return Adam(lr=hyper("lr"), betas=(hyper("momentum"), 0.999))
        return SGD(lr=hyper("lr"), momentum=hyper("momentum"))

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        total: Tensor = sum(p.square().sum() for p in model.parameters())  # type: ignore[assignment]
        return 0.5 * hparams["decay"] * total


class Normalized(Method):
    """A frozen first layer, BatchNorm, dropout, an average of the weights, and periodic hooks."""

    name = "normalized"
    space = Space(lr=LR, smoothing=Grad(0.1, low=0.0, high=0.9), interval=Int(1, 9, default=3))

    def network(self) -> nn.Module:
        features, classes = sizes(self)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(features, 12),
            nn.BatchNorm1d(12),
            nn.Tanh(),
            nn.Dropout(0.3),
            nn.Linear(12, classes),
        )

    def attach(self, model: nn.Module) -> None:
        cast(nn.Sequential, model)[1].requires_grad_(False)
        self.memory |= {"average": {}, "calls": [], "steps": 0}

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]), batch["y"]) * (1 + hparams["smoothing"])

    def after_step(self, state: State) -> None:
        self.memory["steps"] += 1
        average = self.memory["average"]
        for name, value in state.params.items():
            average[name] = 0.9 * average.get(name, value) + 0.1 * value

    @every("interval")
    def shrink(self, state: State) -> None:
        self.memory["calls"].append(state.step)
        for value in state.params.values():
            value.mul_(0.99)
        state.optimizer["momentum_buffer"] = None


class Smooth(Method):
    """Without kinks, for comparisons with central differences over many steps."""

    def network(self) -> nn.Module:
        task = cast(Classification, self.setting.task)
        return MLP(task.input_shape, task.n_classes, width=16, activation="tanh")


class Confident(Smooth):
    """Cross entropy weighted by the detached confidence p_y^ω (the form of ASFT)."""

    name = "confident"
    space = Space(lr=LR, omega=Grad(0.7, low=0.0, high=3.0))

    def detached(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Any
    ) -> dict[str, Tensor]:
        p = model(batch["x"]).softmax(dim=1).gather(1, batch["y"][:, None])[:, 0]
        return {"weight": p ** hparams["omega"]}

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        loss: Tensor = (batch["weight"] * losses).mean()
        return loss


class Scaled(Smooth):
    """Gradients of biases are not used, those of weights are scaled by the weight's norm."""

    name = "scaled"
    space = Space(lr=LR, decay=Grad(0.01, low=1e-6, high=1.0, scale="log"))

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        total: Tensor = sum(p.square().sum() for p in model.parameters())  # type: ignore[assignment]
        return hparams["decay"] * total

    def after_backward(
        self, grads: dict[str, Tensor], params: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return {
            name: grad * params[name].norm() if name.endswith("weight") else torch.zeros_like(grad)
            for name, grad in grads.items()
        }


class LowRank(nn.Module):
    """W + B A."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns, dtype=weight.dtype) / columns**0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank, dtype=weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


@artifacts.register("base_net")
def base_net(task: Task, seed: int) -> MLP:
    """An untrained network."""
    data = cast(Classification, task)
    return MLP(data.input_shape, data.n_classes, width=10, depth=1, activation="tanh")


class Adapter(Method):
    """Frozen layers with low-rank updates as parametrizations, merged at the end."""

    name = "adapter"
    space = Space(lr=LR, decay=Grad(0.01, low=1e-6, high=1.0, scale="log"), rank=Int(1, 4))
    needs = ("base_net",)

    def network(self) -> nn.Module:
        return cast(nn.Module, self.setting.artifacts["base_net"])

    def attach(self, model: nn.Module) -> None:
        for layer in cast(MLP, model).layers:
            weight = cast(Tensor, layer.weight)
            reparam = LowRank(weight, self.setting.constants["rank"])
            parametrize.register_parametrization(layer, "weight", reparam)

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        factors = [p for p in model.parameters() if p.requires_grad]
        total: Tensor = sum(p.square().sum() for p in factors)  # type: ignore[assignment]
        return hparams["decay"] * total

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        for layer in cast(MLP, model).layers:
            parametrize.remove_parametrizations(layer, "weight")
        return model


class TwoPhases(Method):
    """Trains everything for some steps, then only the last layer without the hardest samples."""

    name = "two_phases"
    space = Space(
        lr=LR,
        first=Int(2, 20, default=5),
        head_decay=Grad(0.005, low=1e-4, high=1.0, scale="log"),
    )
    phases = ("body", "head")
    scopes = {"head_decay": "head"}  # noqa: RUF012

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Any) -> Tensor:
        loss = super().loss(model, hparams, batch)
        if batch["phase"] == "head":
            last = cast(MLP, model).layers[-1].weight
            loss = loss + hparams["head_decay"] * cast(Tensor, last).square().sum()
        return loss

    def done(self, state: State) -> bool:
        return state.step >= state.hparams["first"]

    def begin(self, phase: str, state: State) -> None:
        layers = cast(MLP, state.model).layers
        layers[:-1].requires_grad_(False)
        if "kept" not in self.memory:
            data = self.setting.task.split("train")
            with torch.no_grad():
                losses = F.cross_entropy(state.model(data["x"]), data["y"], reduction="none")
                self.memory["kept"] = losses <= losses.quantile(0.9)

    def pool(self, phase: str) -> Split:
        data = self.setting.task.split("train")
        if phase == "body":
            return data
        return {name: value[self.memory["kept"]] for name, value in data.items()}
