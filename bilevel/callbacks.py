"""Callbacks of `tune`: they watch a run, and may stop it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from bilevel.metrics import RunStatus
from bilevel.run import Record, Run

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = ["Callback", "EarlyStopping", "Progress"]


class Callback:
    """Called during a run; override what is needed.

    `run.stop(status, reason)` ends the run after the current outer step.  A callback whose
    decisions depend on what it saw reads that from `run.trace` in `on_start`, or keeps it in
    its state, so that a resumed run decides alike.
    """

    def on_start(self, run: Run) -> None:
        """Before the first outer step of this call; `run.trace` holds those of earlier ones."""

    def on_outer_step(self, run: Run) -> None:
        """After each outer step; `run.trace[-1]` is its record."""

    def on_end(self, run: Run) -> None:
        """After the last outer step, also where the run was interrupted."""

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain data; empty where that is nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""


class EarlyStopping(Callback):
    """Stop when the validation loss no longer improves, and return the weights where it was lowest.

    Where `tune` has no ``evaluate_every``, looks at the outer loss of each step's batch instead;
    then the last weights are returned.

    Args:
        patience: looks in a row without improvement.
        min_delta: least decrease that counts as improvement.

    Raises:
        ValueError: an argument out of its range.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStopping: patience must be at least 1, but got {patience!r}.")
        if not min_delta >= 0:
            raise ValueError(f"EarlyStopping: min_delta must be >= 0, but got {min_delta!r}.")
        self.patience, self.min_delta = patience, min_delta
        self._best, self._since = math.inf, 0

    def on_start(self, run: Run) -> None:
        """See `Callback.on_start`."""
        run.returns_best = run.evaluate_every is not None
        self._best, self._since = math.inf, 0
        for record in run.trace:  # of a resumed run
            self._look(run, record)

    def on_outer_step(self, run: Run) -> None:
        """See `Callback.on_outer_step`."""
        self._look(run, run.trace[-1])

    def _look(self, run: Run, record: Record) -> None:
        what = "outer_loss" if run.evaluate_every is None else "val_loss"
        loss = record[what]
        if loss is None:
            return
        if float(loss) < self._best - self.min_delta:
            self._best, self._since = float(loss), 0
            return
        self._since += 1
        if self._since >= self.patience and run.status is RunStatus.RUNNING:
            reason = f"{what} not below {self._best:.6g} in {self._since} looks"
            run.stop(RunStatus.EARLY_STOPPED, reason)


class Progress(Callback):
    """A progress bar on standard error, where that is a terminal."""

    def __init__(self) -> None:
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None

    def on_start(self, run: Run) -> None:
        """See `Callback.on_start`."""
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=(console := Console(stderr=True)),
            disable=not console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("tuning", total=1.0)
        self._bar.start()

    def on_outer_step(self, run: Run) -> None:
        """See `Callback.on_outer_step`."""
        if self._bar is None or self._task is None:
            return
        record = run.trace[-1]
        self._bar.update(
            self._task,
            completed=run.budget.fraction(run.cost, run.outer_steps),
            description=(
                f"outer step {run.outer_steps}  loss {record['outer_loss']:.4g}  "
                f"|dF/dz| {record['grad_norm']:.2g}"
            ),
        )

    def on_end(self, run: Run) -> None:
        """See `Callback.on_end`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None
