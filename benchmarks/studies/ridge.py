"""Ridge regression with one penalty per group of features, solved exactly: a step is a solve.

    w*(λ) = (Xᵀ X / n + diag(λ))⁻¹ Xᵀ y / n,   F(λ) = mean (y_val − X_val w*)²

The hypergradient is exact, by differentiating the solve, and counts as one more solve.  So plain
trials cost 1, an outer step 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.learner import Learner
from adapters.tasks import Task
from bilevel import Choice, Grad, Space
from bilevel.metrics import Cost, Metrics, RunStatus
from hypergrad import SGD, Estimator, Hypergradient, Problem
from hypergrad.status import Status

__all__ = ["Closed", "Regression", "Ridge", "regression", "ridge", "sparse"]


@dataclass(frozen=True, eq=False)
class Regression(Task):
    """Rows x, numbers y."""

    def measure(self, outputs: Tensor, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Squared errors."""
        return {"loss": (outputs - batch["y"]).square()}


def regression(dim: int, seed: int, *, rows: int = 60, useful: float = 0.2) -> Regression:
    """Correlated features of which a fifth count, some through a nonlinear map, and noise."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=draw, dtype=torch.float64) / dim**0.5
    weights = torch.randn(dim, generator=draw, dtype=torch.float64)
    weights *= (
        torch.rand(dim, generator=draw, dtype=torch.float64) < max(useful, 1 / dim)
    ).double()
    splits = {}
    for name, count in (("train", rows), ("val", rows), ("test", 2000)):
        x = torch.randn(count, dim, generator=draw, dtype=torch.float64) @ (torch.eye(dim) + mix)
        noise = torch.randn(count, generator=draw, dtype=torch.float64)
        splits[name] = {"x": x, "y": torch.tanh(x) @ weights * 1.5 + noise}
    return Regression("ridge", splits, {"dim": dim, "seed": seed})


def sparse(groups: int, seed: int, *, each: int = 5, rows: int = 100) -> Regression:
    """Groups of independent features of which four count, through tanh, and noise of variance 1."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.zeros(groups, each, dtype=torch.float64)
    useful = torch.randperm(groups, generator=draw)[:4]
    weights[useful] = torch.randn(4, each, generator=draw, dtype=torch.float64)
    weights = 2 * (weights / weights.norm()).flatten()
    splits = {}
    for name, count in (("train", rows), ("val", rows), ("test", 2000)):
        x = torch.randn(count, groups * each, generator=draw, dtype=torch.float64)
        noise = torch.randn(count, generator=draw, dtype=torch.float64)
        splits[name] = {"x": x, "y": torch.tanh(x) @ weights + noise}
    return Regression("ridge", splits, {"groups": groups, "seed": seed})


@dataclass(frozen=True)
class Closed(Estimator[dict[str, Any]]):
    """dF/dλ by differentiating the solve; times −1 where `sign` says so, a wrong one."""

    sign: float = 1.0

    def init(self, problem: Problem, params: Any, hparams: Any) -> dict[str, Any]:
        """No state."""
        return {}

    def __call__(
        self, problem: Problem, params: Any, hparams: Any, inner_batch: Any, outer_batch: Any,
        state: dict[str, Any],
    ) -> tuple[Hypergradient, dict[str, Any]]:  # fmt: skip
        """One more solve."""
        names = list(hparams)
        weights = {"w": solve(hparams["penalty"], *inner_batch)}
        value = problem.outer_loss(weights, hparams, outer_batch)
        grads = torch.autograd.grad(value, [hparams[n] for n in names], allow_unused=True)
        found = {
            n: torch.zeros_like(hparams[n]) if g is None else self.sign * g
            for n, g in zip(names, grads, strict=True)
        }
        done = {"w": weights["w"].detach()}
        return Hypergradient(value.detach(), found, done, 0.0, None, 0, 1, Status.EXACT), state


def solve(penalty: Tensor, gram: Tensor, moment: Tensor) -> Tensor:
    """w*; penalties are shared by groups of equal size."""
    each = penalty.repeat_interleave(len(moment) // penalty.numel())
    return torch.linalg.solve(gram + torch.diag(each), moment)


MAPS = {
    "linear": lambda x: x,
    "tanh": torch.tanh,
    "square": lambda x: x * x.abs(),
}


class Ridge(Learner):
    """See the file; subclasses set `space`, and the grain of the outer loss where it has one."""

    name = "ridge"
    space: Space
    grain = 0.0
    optimizer = SGD(lr=0.1)
    optimizer_state: Any = None

    def setup(self, task: Task, hparams: Mapping[str, Any], *, seed: int) -> None:
        """Map the features."""
        values = self.space.validate(hparams, dtype=torch.float64)
        apply = MAPS[str(values.get("map", "linear"))]
        scale = float(values.get("scale", "1"))
        self._data = {n: (apply(s["x"] * scale), s["y"]) for n, s in task.splits.items()}
        x, y = self._data["train"]
        self._batch = (x.T @ x / len(y), x.T @ y / len(y))
        self._penalty = torch.as_tensor(values["penalty"], dtype=torch.float64).reshape(-1)
        if self._penalty.numel() != self._size:
            self._penalty = self._penalty.expand(self._size).clone()
        self._w = torch.zeros(len(self._batch[1]), dtype=torch.float64)

    @property
    def _size(self) -> int:
        domain = self.space["penalty"]
        assert isinstance(domain, Grad)
        return int(torch.Size(domain.value_shape or ()).numel())

    # The inner level.

    @property
    def problem(self) -> Problem:
        """Mean squared errors."""
        return Problem(lambda p, h, b: torch.zeros(()), self._outer)

    def _outer(self, params: Any, hparams: Any, batch: Any) -> Tensor:
        loss = (batch[0] @ params["w"] - batch[1]).square().mean()
        if self.grain:
            loss = (
                loss
                + (torch.round(loss / self.grain) * self.grain - loss).detach()
                - (loss - loss.detach())
            )
        return loss

    @property
    def params(self) -> dict[str, Tensor]:
        """The weights."""
        return {"w": self._w.detach().requires_grad_()}

    @property
    def hparams(self) -> dict[str, Tensor]:
        """The penalties."""
        domain = self.space["penalty"]
        assert isinstance(domain, Grad)
        return {"penalty": self._penalty.reshape(domain.value_shape or ())}

    def set_hparams(self, values: Mapping[str, Tensor]) -> None:
        """Replace the penalties."""
        self._penalty = values["penalty"].detach().double().reshape(-1)

    def inner_batches(self, count: int) -> list[Any]:
        """Moments of the training data."""
        return [self._batch] * count

    def outer_batch(self) -> Any:
        """The validation data."""
        return self._data["val"]

    def adopt(self, params: Any, optimizer_state: Any, steps: int) -> None:
        """Take over weights."""
        self._w = params["w"].detach()

    # The learner.

    def step(self) -> Metrics:
        """Solve."""
        self._w = solve(self._penalty, *self._batch)
        loss = float((self._data["train"][0] @ self._w - self._data["train"][1]).square().mean())
        cost = Cost(steps=1, gradients=1)
        return Metrics({"loss": loss}, status=RunStatus.CONVERGED, cost=cost)

    def evaluate(self, split: str) -> Metrics:
        """Mean squared error."""
        with torch.no_grad():
            return Metrics({"loss": float(self._outer(self.params, {}, self._data[split]))})

    def state_dict(self) -> dict[str, Any]:
        """Weights and penalties."""
        return {"w": self._w.clone(), "penalty": self._penalty.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Weights and penalties."""
        self._w, self._penalty = state["w"], state["penalty"]


def ridge(groups: int, *, mixed: bool = False, grain: float = 0.0) -> type[Ridge]:
    """The learner with so many penalties; `mixed` has 3 maps × 3 scales for the sampler."""
    domains: dict[str, Any] = {
        "penalty": Grad(1e-2, low=1e-6, high=1e2, scale="log", shape=(groups,))
    }
    if mixed:
        domains |= {"map": Choice("linear", "tanh", "square"), "scale": Choice("0.5", "1", "2")}
    return type("Ridge", (Ridge,), {"space": Space(domains), "grain": grain})
