"""Figures of what happens inside trials: hypergradients and gradient-owned values over training.

They show all of a trial, and mark its best rung where that was before the end: the trial's value,
weights and hyperparameters are of then.
Each returns None where a study has nothing to show in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bilevel.curves import COLORS
from bilevel.domains import Grad
from bilevel.run import Record
from bilevel.schedule import Schedule
from studies.figures.charts import Curves, HeatMap, Instant, Line, Plane, short, thin
from studies.messages import TRACE
from studies.record import TrialRecord
from studies.views.objectives import leading, ranked
from studies.views.readable import Readable
from studies.views.tables import base_name

__all__ = ["MOST_NAMES", "certified_error", "is_log", "norms", "paths", "schedule_map"]

MOST_TRIALS = 12
"""Trials whose curves are drawn: the best ones."""

MOST_NAMES = 16
"""Hyperparameters that get a panel or a bar."""


def norms(study: Readable) -> Curves | None:
    """Norm of the hypergradient at each outer step, a line for each of the best trials."""
    return _over_steps(study, "grad_norm", "Hypergradient norm per outer step", "‖dF/dz‖")


def certified_error(study: Readable) -> Curves | None:
    """Certified bound of the hypergradient's error at each outer step, where a method has one."""
    title = "Certified error of the hypergradient"
    return _over_steps(study, "error_bound", title, "bound on the error of dF/dz")


def paths(study: Readable) -> Curves | None:
    """Each gradient-owned hyperparameter over training, a line for each of the best trials.

    Of a tensor the median of its elements.
    """
    found = list(_schedules(study))
    names = list(dict.fromkeys(n for _, schedule in found for n in schedule.names))
    if not names:
        return None
    sizes = {n: s.size(n) for _, s in found for n in s.names}
    looks = _looks(study, [record for record, _ in found])
    planes = []
    mark = _best_rung(study, found[0][0])
    for name in names[:MOST_NAMES]:
        lines = []
        for (record, schedule), look in zip(found, looks, strict=True):
            if name not in schedule.names:
                continue
            rows = schedule.rows(record.cost.steps)
            x, y = schedule["step"][:rows].tolist(), schedule.summary(name)[:rows, 2].tolist()
            x, y = [*x, record.cost.steps], [*y, y[-1]]
            keep = thin(len(x))
            lines.append(Line(x=[x[i] for i in keep], y=[y[i] for i in keep], step=True, **look))
        domain = study.space.get(name, None)
        log = isinstance(domain, Grad) and domain.scale == "log"
        title = short(name) if sizes[name] == 1 else f"{short(name)} ({sizes[name]})"
        planes.append(Plane(lines, "training steps", "", title, log, mark))
    left = len(names) - len(planes)
    notes = [f"{len(planes)} of {len(names)}"] if left else []
    notes += ["tensors: median"] if max(sizes.values()) > 1 else []
    notes += ["dashed: best rung"] if mark is not None else []
    note = f" ({', '.join(notes)})" if notes else ""
    return Curves(f"Paths of gradient-owned values{note}", planes)


def schedule_map(study: Readable) -> HeatMap | None:
    """The best trial's schedule as a heat map: each row a hyperparameter, scaled to its range.

    Tensors of a few elements get a row each; of larger ones quartiles and extremes.  A label says
    where a value began and with what the trial came out.
    """
    best = next(_schedules(study), None)
    if best is None:
        return None
    record, schedule = best
    columns = schedule.columns()
    steps = columns.pop("step")
    columns = {n: c for n, c in columns.items() if not n.endswith(".mean")}
    keep = thin(schedule.rows(record.cost.steps))
    result = schedule.rows(record.at or record.cost.steps) - 1
    shares, texts, labels = [], [], []
    for name, column in list(columns.items())[: 4 * MOST_NAMES]:
        values = np.asarray(column, dtype=np.float64)[keep]
        scaled = np.log(values) if is_log(study, name) and values.min() > 0 else values
        spread = scaled.max() - scaled.min()
        shares.append(((scaled - scaled.min()) / spread if spread else 0 * scaled + 0.5).tolist())
        texts.append([f"{v:.3g}" for v in values])
        labels.append(f"{short(name)}  {values[0]:.2g} → {column[result]:.2g}")
    lead = [r.number for r in leading(study)]
    kind = "the best" if lead == [record.number] else "a"
    if len(lead) > 1 and record.number in lead:
        kind = "a leading"
    title = f"Schedule of {kind} trial ({record.number})"
    x = [steps[i] for i in keep]
    mark = None if record.at is None else Instant(record.at, "best rung")
    end = float(record.cost.steps)
    return HeatMap(title, x, end, labels, shares, texts, "training steps", mark)


def is_log(study: Readable, label: str) -> bool:
    """Whether the hyperparameter of a column has a logarithmic range."""
    domain = study.space.get(base_name(label), None)
    return getattr(domain, "log", False) or getattr(domain, "scale", "") == "log"


def _over_steps(study: Readable, key: str, title: str, axis: str) -> Curves | None:
    """A column of the best trials' traces, as far as a logarithmic axis has a place for it."""
    found: list[tuple[TrialRecord, list[tuple[float, float]]]] = []
    mark = None
    for record, trace in _traces(study):
        points = [(float(r["outer_step"] or 0), float(r[key] or 0)) for r in trace if r.get(key)]
        if points:
            if not found:
                mark = _best_rung(study, record, trace)
            found.append((record, [points[i] for i in thin(len(points))]))
    if not found:
        return None
    looks = _looks(study, [record for record, _ in found])
    lines = [
        Line(
            x=[x for x, _ in points],
            y=[y for _, y in points],
            mark="dot" if len(points) == 1 else "",
            **look,
        )
        for (_, points), look in zip(found, looks, strict=True)
    ]
    return Curves(title, [Plane(lines, "outer step", axis, log=True, instant=mark)])


def _best_rung(
    study: Readable, record: TrialRecord, trace: Sequence[Record] = ()
) -> Instant | None:
    """Where the best trial was best; None where that was its end, or for another trial.

    In training steps; with a trace in outer steps, as the number of those that were done by then.
    """
    if record.at is None or record.number not in {other.number for other in leading(study)}:
        return None
    x = record.at
    if trace:
        x = max((int(r["outer_step"] or 0) for r in trace if int(r["steps"] or 0) <= x), default=0)
    return Instant(x, f"best rung of trial {record.number}")


def _looks(study: Readable, records: Sequence[TrialRecord]) -> list[dict[str, Any]]:
    """Label, color and width of each trial's lines; pruned ones are dashed."""
    lead = {record.number for record in leading(study)}
    word = "best" if len(lead) == 1 else "front"
    found = []
    for place, record in enumerate(records):
        note = word if record.number in lead else record.state
        note = "" if note == "complete" else f" ({note})"
        found.append(
            {
                "label": f"trial {record.number}{note}",
                "color": COLORS[place % len(COLORS)],
                "width": 2.2 if record.number in lead else 1.2,
                "dashed": record.state != "complete",
            }
        )
    return found


def _traces(study: Readable) -> Iterator[tuple[TrialRecord, list[Record]]]:
    for record in ranked(study)[:MOST_TRIALS]:
        text = study.artifact(TRACE, record.number)
        if text is not None:
            yield record, json.loads(text)


def _schedules(study: Readable) -> Iterator[tuple[TrialRecord, Schedule]]:
    for record in ranked(study)[:MOST_TRIALS]:
        schedule = study.schedule(record.number)
        if schedule is not None:
            yield record, schedule
