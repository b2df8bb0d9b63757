"""What is stored of a trial: attributes on Optuna's own record, and the view that reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from bilevel.domains.base import as_scalar
from bilevel.metrics import Cost

__all__ = ["Failure", "TrialRecord", "as_metrics", "as_numbers"]

State = Literal["waiting", "running", "complete", "pruned", "failed"]

Kind = Literal["gradient", "both", "sampler"]
"""Who chooses the gradient-owned values of a trial: see `TrialRecord.by`."""

_STATES: dict[TrialState, State] = {
    TrialState.WAITING: "waiting",
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}

MAX_LISTED = 16
"""Tensors up to this size are stored element by element, larger ones as quantiles."""


@dataclass(frozen=True)
class Failure:
    """Why a trial failed.

    Attributes:
        kind: "not finite", "diverged", "exception", "out of memory", "timeout" or "died".
        message: in words, with the step where that is known.
    """

    kind: Literal["not finite", "diverged", "exception", "out of memory", "timeout", "died"]
    message: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.message}"


@dataclass(frozen=True)
class TrialRecord:
    """One trial.

    Attributes:
        number: from 0.
        state: "complete", "pruned", "failed", "running" (also: interrupted) or "waiting".
        values: what the study optimizes, at the end of the trial; empty until then.
        params: what the sampler chose, by Optuna's names.
        hparams: all values at the end, gradient-owned ones included; numbers, options, lists, and
            {"shape", "min", "median", "max"} for large tensors.
        metrics: "val/loss", "test/loss", "test/accuracy", "g/norm_first", ...
        cost: work done.
        seed: of the learner.
        status: of the run when it ended, in words.
        at: training steps after which it was best, where that is not the end: values, metrics
            and hyperparameters are those of then.
        failure: why it failed, where it did.
        rungs: intermediate values by rung.
        constraints: metric -> by how much it exceeds its limit; feasible where none is positive.
        by: who chose the gradient-owned values: "gradient"; "both", where it started from sampled
            ones; or "sampler" in a trial at sampled values, in which nothing moved them.
        bracket: number of the bracket of successive halving; None without.
        start: number of the trial whose final gradient-owned values this one started from.
        imported: whether it comes from another study or a table.
    """

    number: int
    state: State
    values: tuple[float, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    hparams: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    seed: int | None = None
    status: str = ""
    at: int | None = None
    failure: Failure | None = None
    rungs: Mapping[int, float] = field(default_factory=dict)
    constraints: Mapping[str, float] = field(default_factory=dict)
    by: Kind = "gradient"
    bracket: int | None = None
    start: int | None = None
    imported: bool = False

    @property
    def value(self) -> float | None:
        """The first of `values`; None until the trial is over."""
        return self.values[0] if self.values else None

    @property
    def feasible(self) -> bool:
        """Whether no constraint is violated."""
        return all(excess <= 0 for excess in self.constraints.values())

    @classmethod
    def of(cls, trial: FrozenTrial) -> TrialRecord:
        """Read a trial of Optuna; one that another program made has params and value only."""
        attrs = trial.user_attrs
        failure = attrs.get("failure")
        cost = attrs.get("cost")
        return cls(
            number=trial.number,
            state=_STATES[trial.state],
            values=tuple(trial.values or ()),
            params=trial.params,
            hparams=attrs.get("hparams", {}),
            metrics={k: v for k, v in attrs.items() if "/" in k and isinstance(v, int | float)},
            cost=Cost(**cost) if cost else Cost(),
            seed=attrs.get("run", {}).get("seed"),
            status=attrs.get("run", {}).get("status", ""),
            at=attrs.get("run", {}).get("at"),
            failure=Failure(**failure) if failure and trial.state is TrialState.FAIL else None,
            rungs=dict(trial.intermediate_values),
            constraints=dict(trial.constraints),
            by=attrs.get("by", "gradient"),
            bracket=attrs.get("bracket", {}).get("index"),
            start=attrs.get("start"),
            imported="imported" in attrs,
        )

    def attributes(self) -> dict[str, Any]:
        """Return the user attributes that `of` reads back."""
        attributes: dict[str, Any] = {
            "hparams": dict(self.hparams),
            "cost": asdict(self.cost),
            "run": {"status": self.status, "seed": self.seed, "at": self.at},
            "cost/equivalent_steps": self.cost.equivalent_steps,
            **self.metrics,
        }
        if self.failure is not None:
            attributes["failure"] = asdict(self.failure)
        return attributes


def as_numbers(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return hyperparameters as what JSON can hold, large tensors as quantiles."""
    return {name: _as_number(value) for name, value in hparams.items()}


def as_metrics(found: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics as plain numbers; a scalar of torch or NumPy becomes one.

    Raises:
        TypeError: one is no number; names it.
    """
    return {name: _metric(name, as_scalar(value)) for name, value in found.items()}


def _metric(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        kind = type(value).__name__
        raise TypeError(f"metric {name!r} must be a number, but got {value!r} ({kind}).")
    return value


def _as_number(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    flat = value.detach().to("cpu", torch.float64).flatten()
    if flat.numel() <= MAX_LISTED:
        return value.detach().to("cpu", torch.float64).tolist()
    return {
        "shape": list(value.shape),
        "min": float(flat.min()),
        "median": float(flat.median()),
        "max": float(flat.max()),
    }
