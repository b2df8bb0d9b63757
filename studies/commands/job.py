"""The job behind `bilevel tune`: checks, progress, the table, the report."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from adapters import registry, tasks
from studies.compare import METRICS, Comparison, Way, compare, ways
from studies.events import Event, Finished, Rung, Stalled
from studies.figures.report import comparison_report
from studies.storage.database import StorageError, check_folder, masked, parse_storage

__all__ = ["comparison_table", "run_comparison"]

WIDE, NARROW = 108, 80
"""Characters that the whole table needs, and the one with fewer columns."""


class OnEvent(Protocol):
    """Receives what happens in a comparison."""

    def __call__(self, name: str, seed: int, event: Event) -> None: ...


def run_comparison(
    task: str,
    learner: str,
    *,
    options: dict[str, Any],
    seeds: Sequence[int],
    trials: int,
    budget: int,
    out: Path,
    storage: str | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
) -> Comparison:
    """Compare ways to tune a learner, print the table and write the report.

    Raises:
        ValueError: an unknown task or learner, or an option out of its range.
        StorageError: the folder or the storage cannot be used; raised before any training.
        MismatchError: the storage holds a comparison with other settings.
        KeyboardInterrupt: everything up to the last checkpoint is stored.
    """
    import optuna
    import torch

    began = time.perf_counter()
    kind = registry.get(learner)
    tasks.get(task, seed=seeds[0], **options)
    plan = ways(kind.space, budget, trials)
    url = parse_storage(storage or out / f"{task}.db")
    if resume and url.database and url.drivername == "sqlite" and not Path(url.database).exists():
        raise StorageError(f"--resume: there is nothing stored in {masked(url)} yet.")
    check_folder(out, "--out")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    threads = torch.get_num_threads()
    # Small networks: a second thread costs more than it brings.
    torch.set_num_threads(1)
    try:
        with _progress(quiet, seeds, plan) as on_event:
            found = compare(
                task,
                kind,
                storage or out / f"{task}.db",
                seeds=seeds,
                budget=budget,
                trials=trials,
                options=options,
                on_event=on_event,
            )
    finally:
        torch.set_num_threads(threads)
    page, pictures = comparison_report(found, out)
    seconds = time.perf_counter() - began
    if as_json:
        files = {"storage": masked(url), "report": str(page), "figures": list(map(str, pictures))}
        print(json.dumps({**found.as_json(), "seconds_total": seconds, "files": files}, indent=1))
        return found
    console = Console()
    console = Console(width=max(console.width, NARROW) if console.is_terminal else 118)
    console.print(comparison_table(found, console.width))
    console.print(_conclusion(found), soft_wrap=True, highlight=False)
    console.print(f"\nDone in {seconds:.0f} s.", highlight=False)
    _print_files(console, masked(url), page, pictures)
    return found


def comparison_table(found: Comparison, width: int = WIDE) -> Table:
    """The table, the best mean of each column in bold; a narrow screen gets fewer columns."""
    wide = width >= WIDE
    metrics = [metric for metric in METRICS if wide or metric != "val/accuracy"]
    options = ", ".join(f"{k} {v:g}" for k, v in found.options.items())
    table = Table(
        title=f"{found.learner} on {found.task} ({options}), {_seeds(found)}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.add_column("", no_wrap=True)
    for metric in metrics:
        heading = metric.replace("/", " ").replace("accuracy", "acc.")
        table.add_column(heading, justify="right", no_wrap=True)
    if wide:
        table.add_column("trials", justify="right")
    table.add_column("cost", justify="right")
    table.add_column("s", justify="right")
    for row in found.rows:
        cells = []
        for metric in metrics:
            sign = 1 if metric.endswith("loss") else -1
            best = min(sign * other.mean(metric) for other in found.rows)
            text = row.text(metric)
            cells.append(f"[bold]{text}[/]" if sign * row.mean(metric) == best else text)
        table.add_row(
            row.way.title,
            *cells,
            *([str(row.way.trials)] if wide else []),
            f"{sum(row.costs) / len(row.costs):.0f}",
            f"{sum(row.seconds) / len(row.seconds):.1f}",
        )
    table.caption = found.explain()
    table.caption_justify = "left"
    return table


def _conclusion(found: Comparison) -> str:
    """What the table says about gradients against the better search, seed by seed."""
    by_name = {row.way.name: row for row in found.rows}
    search = min((by_name["random"], by_name["tpe"]), key=lambda row: row.mean("test/loss"))
    lines = []
    for name in ("random", "tpe"):
        row = by_name[name]
        at_default = sum(record.number == 0 for record in row.best)
        if at_default:
            lines.append(
                f"{row.way.title}: the best trial is the first one, at the defaults, "
                f"on {at_default} of {len(row.best)} seeds."
            )
    for name in [name for name in ("gradient", "hybrid") if name in by_name]:
        pairs = zip(by_name[name].best, search.best, strict=True)
        differences = [a.metrics["test/loss"] - b.metrics["test/loss"] for a, b in pairs]
        wins = sum(d < 0 for d in differences)
        mean = sum(differences) / len(differences)
        lines.append(
            f"{by_name[name].way.title}: test loss {mean:+.3f} against {search.way.title}, "
            f"lower on {wins} of {len(differences)} seeds."
        )
    return "\n".join(lines)


def _print_files(console: Console, storage: str, page: Path, pictures: Sequence[Path]) -> None:
    path = storage.removeprefix("sqlite:///")
    for what, where in [
        ("report", page),
        *(("figure", picture) for picture in pictures),
        ("studies", path),
    ]:
        console.print(f"  {what:<8} {where}", soft_wrap=True, highlight=False)
    print(f"\nNext: open the report; `bilevel show {path}` lists the studies;")
    print("`bilevel list` shows which other tasks, learners and algorithms there are.")


def _seeds(found: Comparison) -> str:
    return f"{len(found.seeds)} seed{'s' if len(found.seeds) > 1 else ''}"


@contextmanager
def _progress(quiet: bool, seeds: Sequence[int], plan: Sequence[Way]) -> Iterator[OnEvent]:
    """Show trials as they happen: a bar on a terminal, a line for each trial elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield lambda name, seed, event: None
        return
    if not console.is_terminal:
        yield _print_line
        return
    names = [way.name for way in plan]
    whole = sum(way.cost for way in plan)
    spent: dict[tuple[str, int], dict[int, float]] = {}  # by way and seed, of each trial
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    with bar:
        job = bar.add_task("starting", total=len(seeds) * whole)

        def show(name: str, seed: int, event: Event) -> None:
            """Place an event by what comes before it, so that a resumed job starts where it was."""
            way = plan[names.index(name)]
            before = seeds.index(seed) * whole + sum(w.cost for w in plan[: names.index(name)])
            if isinstance(event, Stalled):
                bar.update(job, description=event.reason)
                return
            each = way.budget.equivalent_steps or 0
            costs, value = spent.setdefault((name, seed), {}), None
            if isinstance(event, Finished):
                number, value = event.record.number, event.record.value
                costs[number] = event.record.cost.equivalent_steps
            else:
                number = event.number
                if isinstance(event, Rung):
                    costs[number], value = each * event.rung / event.of, event.value
            if not way.halved:
                for earlier in range(number):
                    costs.setdefault(earlier, each)
            text = f"seed {seed}  {way.title}  trial {number + 1}/{way.trials}"
            text += "" if value is None else f"  val {value:.3f}"
            done = before + min(way.cost, sum(costs.values()))
            bar.update(job, completed=done, description=text)

        yield show


def _print_line(name: str, seed: int, event: Event) -> None:
    if isinstance(event, Finished):
        record = event.record
        outcome = str(record.failure) if record.failure else f"val {record.value:.4f}"
        print(
            f"seed {seed}  {name:<13} trial {record.number}  {record.state}  {outcome}  "
            f"{record.cost.seconds:.1f} s",
            file=sys.stderr,
        )
