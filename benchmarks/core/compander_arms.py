"""The arms of the compander's study: one network, one order of batches, one schedule for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adapters import Trainer, tasks
from adapters.method import Batch
from adapters.objectives.compander import CompandedNetwork
from adapters.tasks import Classification
from bilevel import Descent, Grad, Space, tune
from bilevel.callbacks import Callback
from bilevel.compander_report import distribution
from bilevel.run import Run
from hypergrad import SGD, Estimator, Explicit, Identity, Implicit, Neumann, Unrolled
from hypergrad.optimizers import Optimizer, Value

BATCH, LR, KNOTS, INNER, OUTER_LR = 50, 0.02, 17, 5, 0.05
COSINE = [max(0.5 * LR * (1 + math.cos(math.pi * k / (KNOTS - 1))), 1e-6) for k in range(KNOTS)]
OFF = 1.01e-7
"""A weight decay that does nothing."""

ESTIMATORS: dict[str, Estimator[Any]] = {
    "first order": Explicit(),
    "one step": Implicit(Identity(scale=LR)),
    "unrolled": Unrolled(steps=INNER),
    "implicit": Implicit(Neumann(terms=10)),
}


class Companded(CompandedNetwork):
    """The learner, with He's initialization, batches of 50 and a cosine schedule."""

    name = "compander_study"
    space = Space(
        {
            **CompandedNetwork.space,
            "lr": Grad(COSINE, low=0.0, high=0.5, schedule=KNOTS, doc="learning rate"),
        }
    ).own(lr="fixed")

    def network(self) -> nn.Module:
        model = super().network()
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        return model

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        return BATCH

    def optimizer(self, hyper: Callable[[str], Value]) -> Optimizer:
        return SGD(lr=hyper("lr"), momentum=0.9)


class Plain(Companded):
    """The same without companders; amplitude and slope do nothing."""

    name = "plain_study"

    def attach(self, model: nn.Module) -> None:
        return None

    def predict(self, model: nn.Module, hparams: Mapping[str, Any], batch: Batch) -> Tensor:
        found: Tensor = model(batch["x"])
        return found

    def shapes(self, model: nn.Module) -> Mapping[str, tuple[int, ...]]:
        return {}

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> Tensor:
        squares = [p.square().sum() for p in model.parameters() if p.dim() > 1]
        return 0.5 * hparams["weight_decay"] * torch.stack(squares).sum()

    def finish(self, model: nn.Module, hparams: Mapping[str, Any]) -> nn.Module:
        return model


@dataclass(frozen=True)
class Data:
    """One draw of the data.

    Attributes:
        part: trains on the training part, validates on the rest.
        whole: trains on both; its validation split is part of the training data.
    """

    part: Classification
    whole: Classification


def draw(kind: str, noise: float, clean: bool, seed: int, sizes: tuple[int, int]) -> Data:
    """Return the data of a seed.

    Args:
        kind: name of the task.
        noise: share of wrong labels.
        clean: whether the validation labels are right.
        seed: of the split and the wrong labels.
        sizes: of the training part and of the validation part.
    """
    train, val = sizes
    if clean:
        task = tasks.get(kind, noise=noise, seed=seed, n_train=train, n_val=val)
        parts = {name: task.split(name) for name in ("train", "val", "test")}
    else:
        task = tasks.get(kind, noise=noise, seed=seed, n_train=train + val, n_val=val)
        data = task.split("train")
        parts = {
            "train": {k: v[:train] for k, v in data.items()},
            "val": {k: v[train:] for k, v in data.items()},
            "test": task.split("test"),
        }
    both = {k: torch.cat([parts["train"][k], parts["val"][k]]) for k in parts["train"]}

    def made(name: str, splits: dict[str, Any]) -> Classification:
        unknown = torch.zeros(len(splits["train"]["y"]), dtype=torch.bool)
        options = {"noise": noise, "clean": clean, "seed": seed, "part": name}
        return Classification(
            f"{kind}_study", splits, options, n_classes=task.n_classes, corrupted=unknown
        )

    return Data(made("part", parts), made("whole", {**parts, "train": both}))


@dataclass(frozen=True)
class Outcome:
    """One training run.

    Attributes:
        accuracy: on the test split, at the end.
        loss: test cross entropy at the end.
        val: validation loss at the end.
        stopped: test accuracy and loss where the validation loss was lowest.
        hparams: α, γ and weight decay at the end.
        path: for each look: step, γ of each layer, test loss.
        weights: distribution of each layer's weights.
        second: weights of the second layer.
    """

    accuracy: float
    loss: float
    val: float
    stopped: tuple[float, float]
    hparams: dict[str, list[float]]
    path: list[tuple[int, list[float], float]]
    weights: list[dict[str, float]]
    second: Tensor = field(repr=False)


class _Looks(Callback):
    """Evaluates at regular steps."""

    def __init__(self, learner: Trainer, every: int) -> None:
        self.learner, self.every = learner, every
        self.seen: list[tuple[float, float, float]] = []
        self.path: list[tuple[int, list[float], float]] = []

    def on_outer_step(self, run: Run) -> None:
        steps = run.cost.steps
        if steps // self.every > len(self.seen):
            self.look(steps)

    def look(self, steps: int) -> None:
        val, test = (self.learner.evaluate(split) for split in ("val", "test"))
        self.seen.append((val["loss"], test["accuracy"], test["loss"]))
        self.path.append((steps, settings(self.learner)["gamma"], test["loss"]))


def settings(learner: Trainer) -> dict[str, list[float]]:
    """Return α, γ and the weight decay of now."""
    logs = {n: p.detach() for n, p in learner.params.items() if n.endswith((".log_a", ".log_b"))}
    values = {**learner.method.setting.constants, **learner.hparams}
    found = {n: torch.as_tensor(values[n]).detach().flatten() for n in ("amplitude", "gamma")}
    if logs:
        a = torch.stack([p for n, p in logs.items() if n.endswith("a")])
        b = torch.stack([p for n, p in logs.items() if n.endswith("b")])
        found = {"amplitude": a.exp(), "gamma": (a - b).exp()}
    found["weight_decay"] = torch.as_tensor(values["weight_decay"]).detach().flatten()
    return {n: [float(x) for x in v] for n, v in found.items()}


def run(
    task: Classification,
    seed: int,
    steps: int,
    *,
    companded: bool = True,
    width: int = 256,
    estimator: str | None = None,
    owned: tuple[str, ...] = ("amplitude", "gamma"),
    fixed: Mapping[str, Tensor] | None = None,
    **hparams: Any,
) -> Outcome:
    """Train, and tune what `owned` names where there is an estimator.

    Args:
        task: the data.
        seed: of weights and batches.
        steps: training steps.
        companded: False for the plain network.
        width: of the hidden layers.
        estimator: of the hypergradient; None where nothing is tuned.
        owned: what the gradient owns.
        fixed: values of each layer that stay.
        **hparams: other values.
    """
    kind: type[Companded] = Companded if companded else Plain
    names = ("amplitude", "gamma", "weight_decay")
    moving = owned if estimator else tuple(fixed or ())
    space = kind.space.own(**{n: "grad" if n in moving else "sampler" for n in names})
    learner = Trainer.of(kind)(space, horizon=steps)
    learner.setup(
        task, {"weight_decay": OFF, "width": width, **hparams, **(fixed or {})}, seed=seed
    )
    looks = _Looks(learner, steps // 20)
    if estimator:
        chosen = ESTIMATORS[estimator]
        each = None if chosen.steps else INNER
        tune(
            learner,
            Descent(chosen, lr=OUTER_LR, inner_steps=each, warmup=steps // 10),
            steps,
            callbacks=[looks],
        )
    else:
        for step in range(1, steps + 1):
            learner.step()
            if step % looks.every == 0:
                looks.look(step)
    last, best = looks.seen[-1], min(looks.seen)
    layers = [m for m in learner.module().modules() if isinstance(m, nn.Linear)]
    weights = [vars(distribution(layer.weight)) for layer in layers]
    return Outcome(
        last[1], last[2], last[0], best[1:], settings(learner), looks.path, weights,
        layers[1].weight.detach(),
    )  # fmt: skip
