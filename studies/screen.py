"""What a running study shows on standard error: a line for each trial, a bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from studies.events import Event, Finished, Rung, Started
from studies.readable import Readable
from studies.summary import trial_line

__all__ = ["progress"]


@contextmanager
def progress(
    study: Readable, metric: str, trials: int, quiet: bool
) -> Iterator[Callable[[Event], None]]:
    """Yield what `Study.run` is to call with each event."""
    console = Console(stderr=True)
    if quiet:
        yield lambda event: None
    elif console.is_terminal:
        with _bar(console) as bar:
            yield _OnTerminal(study, metric, trials, bar)
    else:
        yield _OnPipe(study, metric, console)


class _OnPipe:
    """A line for each finished trial."""

    def __init__(self, study: Readable, metric: str, console: Console) -> None:
        self._study, self._metric, self._console = study, metric, console

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started) and event.resumed:
            self._print(f"trial {event.number}  goes on from its checkpoint")
        elif isinstance(event, Finished):
            record = event.record
            moved = record.state in ("complete", "pruned") and self._study.space.grad
            schedule = self._study.schedule(record.number) if moved else None
            best = "  best so far" if event.best else ""
            self._print(trial_line(record, self._metric, schedule) + best)

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True, highlight=False, markup=False)


class _OnTerminal(_OnPipe):
    """The same above a bar that counts trials and the rungs of running ones."""

    def __init__(self, study: Readable, metric: str, trials: int, bar: Progress) -> None:
        super().__init__(study, metric, bar.console)
        self._bar = bar
        self._done = sum(r.state in ("complete", "pruned", "failed") for r in study.trials)
        self._shares: dict[int, float] = {}
        self._task = bar.add_task("starting", total=trials, completed=self._done)

    def __call__(self, event: Event) -> None:
        super().__call__(event)
        if isinstance(event, Started):
            self._shares.setdefault(event.number, 0.0)
            text = f"trial {event.number}"
        elif isinstance(event, Rung):
            self._shares[event.number] = event.rung / event.of
            text = f"trial {event.number}  rung {event.rung}/{event.of}  val {event.value:.4f}"
        elif isinstance(event, Finished):
            self._shares.pop(event.record.number, None)
            self._done += 1
            text = f"trial {event.record.number} {event.record.state}"
        else:
            return
        completed = self._done + sum(self._shares.values())
        self._bar.update(self._task, completed=completed, description=text)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.1f}/{task.total:.0f} trials"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
