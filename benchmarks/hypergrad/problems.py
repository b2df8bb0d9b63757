"""The problems, as pure definitions: data, a module, two losses; torch and scikit-learn only.

A problem is a `Training` (differentiate through T optimizer steps) or a `Stationary` (differentiate
at a minimum by K iterations of conjugate gradients).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = [
    "NAMES",
    "RIDGE_P1",
    "RIDGE_P3",
    "Batch",
    "Rule",
    "Setting",
    "Stationary",
    "Training",
    "make",
]

Named = Mapping[str, Tensor]


class Batch(NamedTuple):
    """Rows of a data set."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Setting:
    """What every problem has.

    Attributes:
        name: such as "P2-sgd".
        title: one line for the table.
        module: the model where training starts (`Training`) or at the minimum (`Stationary`).
        hparams: hyperparameters by name.
        criterion: error of the outputs in the inner loss, ``(outputs, hparams, batch)``.
        penalty: ``(named parameters, hparams)``; the inner loss is criterion + penalty.
        outer_criterion: error of the outputs on `outer_batch`.
        outer_batch: validation rows.
    """

    name: str
    title: str
    module: nn.Module
    hparams: dict[str, Tensor]
    criterion: Callable[[Tensor, Named, Batch], Tensor]
    penalty: Callable[[Named, Named], Tensor]
    outer_criterion: Callable[[Tensor, Tensor], Tensor]
    outer_batch: Batch

    def inner_loss(
        self, forward: Callable[[Tensor], Tensor], named: Named, hparams: Named, batch: Batch
    ) -> Tensor:
        """f, for a library that calls a module and names its parameters."""
        return self.criterion(forward(batch.x), hparams, batch) + self.penalty(named, hparams)

    def outer_loss(self, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """F."""
        return self.outer_criterion(forward(self.outer_batch.x), self.outer_batch.y)

    def forward(self, named: Named) -> Callable[[Tensor], Tensor]:
        """Return the module as a function at other parameters."""
        return lambda x: torch.func.functional_call(self.module, dict(named), (x,))

    def leaves(self) -> dict[str, Tensor]:
        """Return fresh hyperparameters that require grad."""
        return {k: v.clone().requires_grad_() for k, v in self.hparams.items()}

    def params(self) -> dict[str, Tensor]:
        """Return fresh copies of the module's parameters that require grad."""
        named = self.module.named_parameters()
        return {k: p.detach().clone().requires_grad_() for k, p in named}


@dataclass(frozen=True)
class Rule:
    """An update rule of `torch.optim`.

    Attributes:
        kind: SGD with momentum, or Adam with torch's betas and eps.
        lr: learning rate.
        momentum: of SGD.
    """

    kind: Literal["sgd", "adam"]
    lr: float
    momentum: float = 0.9

    def torch(self, module: nn.Module) -> torch.optim.Optimizer:
        """Return it as a `torch.optim` optimizer."""
        if self.kind == "sgd":
            return torch.optim.SGD(module.parameters(), lr=self.lr, momentum=self.momentum)
        return torch.optim.Adam(module.parameters(), lr=self.lr)


@dataclass(frozen=True)
class Training(Setting):
    """Differentiate the outer loss after T = len(batches) steps of `rule`.

    The hyperparameters are one weight decay λ for each weight, under the weights' names, and the
    penalty is ½ Σ λ w²; a library may put it in the optimizer instead.
    """

    rule: Rule
    batches: list[Batch]


@dataclass(frozen=True)
class Stationary(Setting):
    """Differentiate the outer loss at w*(h) by `iterations` steps of conjugate gradients."""

    batch: Batch
    iterations: int


def make(
    name: str,
    dtype: torch.dtype,
    steps: int | None = None,
    params: Named | None = None,
) -> Training | Stationary:
    """Return a problem.

    Args:
        name: one of `NAMES`.
        dtype: of everything.
        steps: replaces its number of optimizer or CG steps.
        params: where the module stands; a `Stationary` needs its minimum (see reference.py).
    """
    problem = _MAKERS[name]()
    if params is not None:
        problem.module.load_state_dict(dict(params))
    if steps is not None and isinstance(problem, Training):
        problem = replace(problem, batches=problem.batches[:steps])
    elif steps is not None and isinstance(problem, Stationary):
        problem = replace(problem, iterations=steps)
    return _cast(problem, dtype)


def _cast(problem: Training | Stationary, dtype: torch.dtype) -> Training | Stationary:
    # Everything is made in float64, so that both precisions see the same numbers.
    def batch(b: Batch) -> Batch:
        return Batch(b.x.to(dtype), b.y.to(dtype) if b.y.is_floating_point() else b.y)

    common = {
        "module": problem.module.to(dtype),
        "hparams": {k: v.to(dtype) for k, v in problem.hparams.items()},
        "outer_batch": batch(problem.outer_batch),
    }
    if isinstance(problem, Training):
        return replace(problem, **common, batches=[batch(b) for b in problem.batches])
    return replace(problem, **common, batch=batch(problem.batch))


# Data: standardized features, in a fixed random order.


def _split(bunch: object, rows: int) -> tuple[Batch, Batch]:
    """Return the first `rows` shuffled rows and the others."""
    x = torch.as_tensor(bunch.data, dtype=torch.float64)  # type: ignore[attr-defined]
    y = torch.as_tensor(bunch.target)  # type: ignore[attr-defined]
    x = (x - x.mean(0)) / x.std(0).clamp_min(1e-3)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return Batch(x[:rows], y[:rows]), Batch(x[rows:], y[rows:])


def _batches(train: Batch, size: int, number: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randint(len(train.x), (size,), generator=generator) for _ in range(number))
    return [Batch(train.x[rows], train.y[rows]) for rows in drawn]


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().double()


# Unrolled problems: a weight decay for each weight.


def _cross_entropy(outputs: Tensor, hparams: Named, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch.y)


def _decay(named: Named, hparams: Named) -> Tensor:
    terms = [(hparams[k] * p * p).sum() for k, p in named.items()]
    return 0.5 * torch.stack(terms).sum()


def _training(
    name: str, title: str, module: nn.Module, rule: Rule, steps: int, size: int, decay: float = 1e-3
) -> Training:
    train, val = _split(load_digits(), 1200)
    return Training(
        name=name,
        title=title,
        module=module,
        hparams={k: torch.full_like(p, decay) for k, p in module.named_parameters()},
        criterion=_cross_entropy,
        penalty=_decay,
        outer_criterion=F.cross_entropy,
        outer_batch=val,
        rule=rule,
        batches=_batches(train, size, steps),
    )


def _mlp(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return _seeded(lambda: nn.Sequential(*layers[:-1]).apply(_reset))


def _reset(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        layer.reset_parameters()


def _cnn() -> nn.Module:
    return _seeded(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            *(nn.Conv2d(1, 16, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2)),
            *(nn.Flatten(), nn.Linear(128, 10)),
        )
    )


def _p2(kind: Literal["sgd", "adam"]) -> Training:
    rule = Rule("sgd", 0.1) if kind == "sgd" else Rule("adam", 3e-3)
    title = f"MLP 64-100-10, 7,510 weight decays, {_LABEL[kind]}, T=100, batch 128"
    return _training(f"P2-{kind}", title, _mlp(64, 100, 10), rule, 100, 128)


def _p4(kind: Literal["sgd", "adam"]) -> Training:
    rule = Rule("sgd", 0.05) if kind == "sgd" else Rule("adam", 3e-3)
    title = f"CNN with 2 convolutions, 6,090 weight decays, {_LABEL[kind]}, T=50, batch 128"
    return _training(f"P4-{kind}", title, _cnn(), rule, 50, 128)


def _large() -> Training:
    title = "MLP 64-512-512-10, 300,000 weight decays, SGD with momentum, T=30, batch 512"
    return _training("MLP300k", title, _mlp(64, 512, 512, 10), Rule("sgd", 0.1), 30, 512)


_LABEL = {"sgd": "SGD with momentum", "adam": "Adam"}


# Implicit problems: at the minimum of a regularized loss.

RIDGE_P1 = 1e-3


def _feature_penalty(named: Named, hparams: Named) -> Tensor:
    """A penalty for each feature, exp(h); a small fixed one keeps the biases unique."""
    weight, bias = named["0.weight"], named["0.bias"]
    return 0.5 * ((hparams["log_penalty"].exp() * weight * weight).sum() + RIDGE_P1 * (bias @ bias))


def _p1a() -> Stationary:
    bunch = load_breast_cancer()
    train, val = _split(bunch, 284)
    module = _seeded(lambda: nn.Sequential(nn.Linear(30, 1), nn.Flatten(0)))
    return Stationary(
        name="P1a",
        title="logistic regression on breast cancer, 30 feature penalties, CG-20",
        module=module,
        hparams={"log_penalty": torch.full((30,), -3.0, dtype=torch.float64)},
        criterion=lambda z, hparams, batch: F.binary_cross_entropy_with_logits(z, batch.y),
        penalty=_feature_penalty,
        outer_criterion=F.binary_cross_entropy_with_logits,
        outer_batch=Batch(val.x, val.y.double()),
        batch=Batch(train.x, train.y.double()),
        iterations=20,
    )


def _p1() -> Stationary:
    train, val = _split(load_digits(), 898)
    return Stationary(
        name="P1",
        title="softmax regression on digits, 650 weights, 64 feature penalties, CG-20",
        module=_seeded(lambda: nn.Sequential(nn.Linear(64, 10))),
        hparams={"log_penalty": torch.full((64,), -4.0, dtype=torch.float64)},
        criterion=_cross_entropy,
        penalty=_feature_penalty,
        outer_criterion=F.cross_entropy,
        outer_batch=val,
        batch=train,
        iterations=20,
    )


def _weighted(outputs: Tensor, hparams: Named, batch: Batch) -> Tensor:
    losses = F.cross_entropy(outputs, batch.y, reduction="none")
    return (hparams["weight"].sigmoid() * losses).mean()


def _ridge(named: Named, hparams: Named) -> Tensor:
    return 0.5 * RIDGE_P3 * torch.stack([p.square().sum() for p in named.values()]).sum()


RIDGE_P3 = 2e-2
"""The inner loss has a positive definite Hessian at its minimum, and CG-20 is near the solution."""


def _p3() -> Stationary:
    train, val = _split(load_digits(), 1000)
    generator = torch.Generator().manual_seed(2)
    wrong = torch.rand(1000, generator=generator) < 0.4
    labels = torch.where(wrong, torch.randint(10, (1000,), generator=generator), train.y)
    return Stationary(
        name="P3",
        title="data cleaning, MLP 64-64-10, 1,000 sample weights, 40 % random labels, CG-20",
        module=_mlp(64, 64, 10),
        hparams={"weight": torch.zeros(1000, dtype=torch.float64)},
        criterion=_weighted,
        penalty=_ridge,
        outer_criterion=F.cross_entropy,
        outer_batch=val,
        batch=Batch(train.x, labels),
        iterations=20,
    )


_MAKERS: dict[str, Callable[[], Training | Stationary]] = {
    "P1a": _p1a,
    "P1": _p1,
    "P3": _p3,
    "P2-sgd": lambda: _p2("sgd"),
    "P2-adam": lambda: _p2("adam"),
    "P4-sgd": lambda: _p4("sgd"),
    "P4-adam": lambda: _p4("adam"),
    "MLP300k": _large,
}
NAMES = list(_MAKERS)
