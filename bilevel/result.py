"""`Result`: what a tuning run found, and everything needed to go on with it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optree
from torch import Tensor

from bilevel.checkpoint import check_plain, check_writable, copy, load, save
from bilevel.curves import panels
from bilevel.metrics import Cost, RunStatus
from bilevel.plots import write_figure
from bilevel.run import Record
from bilevel.schedule import Schedule
from bilevel.space import Space
from hypergrad.tree import Tree, leaf_names

if TYPE_CHECKING:
    from bilevel.budget import Budget

__all__ = ["Best", "Result"]

_FILE = "result.pt"


@dataclass(frozen=True)
class Best:
    """Where the validation loss was lowest.

    Attributes:
        outer_step: outer steps done.
        steps: inner steps done.
        loss: validation loss.
    """

    outer_step: int
    steps: int
    loss: float


@dataclass(frozen=True, repr=False)
class Result:
    """Result of `tune`.

    Attributes:
        params: the weights: the last, or with early stopping those of the lowest validation loss.
        hparams: the gradient-owned values that they were trained with, by name.
        space: the space they come from.
        schedule: history of every hyperparameter.
        trace: a record for each outer step: losses, hypergradient norms, counters.
        status: why the run ended.
        reason: that in words.
        cost: work done.
        best: where the validation loss was lowest; None where it was not evaluated.
        val: metrics of `params` on the validation split; None where there is none.
        test: metrics of `params` on the test split.  No decision of the run looked at them.
        state: the whole run, for `resume`.
    """

    params: Any
    hparams: dict[str, Tensor]
    space: Space
    schedule: Schedule
    trace: list[Record]
    status: RunStatus
    reason: str
    cost: Cost
    best: Best | None
    val: dict[str, float] | None
    test: dict[str, float] | None
    state: dict[str, Any] = field(repr=False)
    _again: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def plot(self, path: str | os.PathLike[str], title: str | None = None) -> Path:
        """Draw losses, hypergradient norms and the schedule of every hyperparameter.

        A dashed line marks the lowest validation loss where that was before the end.

        Args:
            path: a file ending in ``.png`` or ``.html`` (self-contained).
            title: above the figure.

        Raises:
            ValueError: another ending.
            OSError: the file cannot be written.
        """
        title = title or f"{len(self.trace)} outer steps, {self.cost.steps} training steps"
        best = None if self.best is None else self.best.steps
        found = panels(self.trace, self.schedule, self.space, self.cost.steps, best)
        return write_figure(found, path, title)

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the result into a folder, atomically; also ``schedule.csv`` and ``trace.json``.

        Where `params` has other nodes than dicts, lists and tuples, it is stored as, and read
        back as, a dict from names such as ``params.layer`` to tensors.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        check_writable(folder / _FILE, "folder")
        params = _plain(self.params)
        save(
            folder / _FILE,
            {
                "params": copy(params),
                "trained": optree.tree_map(lambda t: t.requires_grad, params),
                "hparams": copy(self.hparams),
                "val": self.val,
                "test": self.test,
                "state": self.state,
            },
        )
        self.schedule.to_csv(folder / "schedule.csv")
        (folder / "trace.json").write_text(json.dumps(self.trace, indent=1))
        return folder

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Result:
        """Read what `save` wrote; nothing in the file is executed.

        Raises:
            FileNotFoundError: the folder holds no result.
            ValueError: the file is damaged.
        """
        data = load(Path(folder) / _FILE)
        run = data["state"]["run"]
        best = run["best"]
        return cls(
            params=optree.tree_map(Tensor.requires_grad_, data["params"], data["trained"]),
            hparams=data["hparams"],
            space=Space.from_json(data["state"]["settings"]["space"]),
            schedule=Schedule.from_state(run["schedule"]),
            trace=run["trace"],
            status=RunStatus(run["status"]),
            reason=run["reason"],
            cost=Cost(**run["cost"]),
            best=None if best is None else Best(best["outer_step"], best["steps"], best["loss"]),
            val=data["val"],
            test=data["test"],
            state=data["state"],
        )

    def resume(self, budget: Budget | int, subject: Any = None, **options: Any) -> Result:
        """Go on from where the run ended: the same numbers as without the break.

        Args:
            budget: the new total; what the run had spent counts.
            subject: as given to `tune`; may be left out in the process that made this result.
            **options: as given to `tune`, where `subject` is given.

        Raises:
            ValueError: no subject for a result from a file, or another space or algorithm.
        """
        from bilevel.tune import tune

        if subject is None:
            if not self._again:
                raise ValueError(
                    "subject: a result read from a file does not hold the losses; pass the subject "
                    "and the options that tune() had."
                )
            options = {**self._again, **options}
        else:
            options = {"subject": subject, **options}
        return tune(budget=budget, resume=self, **options)

    def __repr__(self) -> str:
        parts = [self.status.value, f"{len(self.trace)} outer steps", f"{self.cost.steps} steps"]
        evaluated = (("val", self.val), ("test", self.test))
        parts += [f"{split} loss {m['loss']:.6g}" for split, m in evaluated if m is not None]
        return f"Result({', '.join(parts)})"

    def __str__(self) -> str:
        lines = [f"{self.status.value}: {self.reason}" if self.reason else self.status.value]
        lines.append(
            f"{len(self.trace)} outer steps, {self.cost.steps} training steps, "
            f"{self.cost.gradients} gradients, {self.cost.hvps} Hessian-vector products, "
            f"{self.cost.seconds:.1f} s"
        )
        for split, metrics in (("validation", self.val), ("test", self.test)):
            if metrics is not None:
                numbers = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items())
                lines.append(f"{split:<10}  {numbers}")
        for name, value in self.hparams.items():
            lines.append(f"{name:<16}  {_short(value)}")
        return "\n".join(lines)


def _plain(params: Tree) -> Tree:
    """Return the tree, or a dict of its leaves by name where a checkpoint cannot hold it."""
    try:
        check_plain(copy(params), "params")
    except TypeError:
        return dict(zip(leaf_names(params, "params"), optree.tree_leaves(params), strict=True))
    return params


def _short(value: Tensor) -> str:
    if value.numel() <= 6:
        numbers = ", ".join(f"{v:.4g}" for v in value.flatten().tolist())
        return numbers if value.dim() == 0 else f"[{numbers}]"
    low, middle, high = value.min(), value.median(), value.max()
    return f"{tuple(value.shape)} from {low:.3g} to {high:.3g}, median {middle:.3g}"
