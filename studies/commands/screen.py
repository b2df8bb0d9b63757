"""What a running study shows on standard error: lines about trials, and a bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from studies.events import Event, Finished, Paused, Retried, Rung, Stalled, Started
from studies.views.objectives import objectives
from studies.views.readable import Readable
from studies.views.summary import action_line, trial_line

__all__ = ["progress"]


@contextmanager
def progress(study: Readable, trials: int, quiet: bool) -> Iterator[Callable[[Event], None]]:
    """Yield what `Study.run` is to call with each event."""
    console = Console(stderr=True)
    if quiet:
        yield lambda event: None
    elif console.is_terminal:
        with _bar(console) as bar:
            yield _OnTerminal(study, trials, bar)
    else:
        yield _OnPipe(study, console)


class _OnPipe:
    """A line for each trial that ends, waits, goes on or is tried again, and for a full disk."""

    def __init__(self, study: Readable, console: Console) -> None:
        self._study, self._console = study, console
        self._metric = objectives(study.optuna)[0]
        self._values: dict[int, float] = {}  # at the last rung, by trial
        self._paused: dict[int, int] = {}  # rung where a trial waits

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started) and event.resumed:
            self._resumed(event)
        elif isinstance(event, Rung):
            self._values[event.number] = event.value
        elif isinstance(event, Paused):
            self._wait(event)
        elif isinstance(event, Retried):
            lost = f"{event.failure}; goes on from its checkpoint"
            self._print(action_line(event.number, "retried", lost))
        elif isinstance(event, Stalled):
            self._print(f"waiting: {event.reason}")
        elif isinstance(event, Finished):
            self._finished(event)

    def _resumed(self, event: Started) -> None:
        rung = self._paused.pop(event.number, 0)
        place = f"from rung {rung}" if rung else "from its checkpoint"
        self._print(action_line(event.number, "goes on", place))

    def _wait(self, event: Paused) -> None:
        self._paused[event.number] = event.rung
        self._print(action_line(event.number, "paused", self._place(event)))

    def _place(self, event: Paused) -> str:
        """Where a trial waits, with its value there."""
        if not event.rung:
            return "before its first rung"
        value = self._values.get(event.number)
        at = f"at rung {event.rung}"
        return at if value is None else f"{at}  {self._metric} {value:.4f}"

    def _finished(self, event: Finished) -> None:
        record = event.record
        moved = record.state in ("complete", "pruned") and self._study.space.grad
        schedule = self._study.schedule(record.number) if moved else None
        names = objectives(self._study.optuna)
        note = "best so far" if event.best else ""
        if len(names) > 1:
            front = {other.number for other in self._study.front}
            note = "on the front so far" if record.number in front else ""
        self._print(trial_line(record, names, schedule, note), whole=record.failure is not None)

    def _print(self, line: str, *, whole: bool = True) -> None:
        """Print a line; a terminal without room for it wraps it if it is to be whole."""
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


class _OnTerminal(_OnPipe):
    """The same above a bar that counts trials and the rungs of unfinished ones.

    Pauses come and go with every bracket: the bar alone shows them.
    """

    def __init__(self, study: Readable, trials: int, bar: Progress) -> None:
        super().__init__(study, bar.console)
        self._bar = bar
        records = [record for record in study.trials if not record.imported]
        self._done = sum(r.state in ("complete", "pruned", "failed") for r in records)
        rungs = len(study.optuna.user_attrs.get("run", {}).get("rungs", ())) or 1
        self._shares = {
            r.number: max(r.rungs, default=0) / rungs for r in records if r.state == "running"
        }
        self._task = bar.add_task("starting", total=trials)
        bar.update(self._task, completed=self._completed())

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, Started):
            self._shares.setdefault(event.number, 0.0)
            text = f"trial {event.number}"
        elif isinstance(event, Rung):
            self._shares[event.number] = event.rung / event.of
            value = f"{self._metric} {event.value:.4f}"
            text = f"trial {event.number}  rung {event.rung}/{event.of}  {value}"
        elif isinstance(event, Paused):
            text = f"trial {event.number} paused {self._place(event)}"
        elif isinstance(event, Retried):
            text = f"trial {event.number} retried"
        elif isinstance(event, Stalled):
            text = "waiting"
        else:
            self._shares.pop(event.record.number, None)
            self._done += 1
            text = f"trial {event.record.number} {event.record.state}"
        self._bar.update(self._task, completed=self._completed(), description=text)

    def _resumed(self, event: Started) -> None:
        if event.number not in self._paused:
            super()._resumed(event)

    def _wait(self, event: Paused) -> None:
        self._paused[event.number] = event.rung

    def _print(self, line: str, *, whole: bool = True) -> None:
        overflow: Literal["fold", "ellipsis"] = "fold" if whole else "ellipsis"
        self._console.print(
            line, no_wrap=not whole, overflow=overflow, highlight=False, markup=False
        )

    def _completed(self) -> float:
        return self._done + sum(self._shares.values())


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total:.0f} trials"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
