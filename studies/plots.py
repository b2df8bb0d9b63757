"""Figures of a study: plain functions from a study to Plotly figures, for page and dashboard.

Each returns None where a study has nothing to show in it.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from bilevel.curves import COLORS
from bilevel.domains import Grad
from bilevel.run import Record
from bilevel.schedule import Schedule
from studies.ledger import signs
from studies.messages import TRACE
from studies.readable import Readable
from studies.record import TrialRecord
from studies.summary import middle

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

__all__ = ["FIGURES", "figures"]

MOST_TRIALS = 12
"""Trials whose curves are drawn: the best ones."""

MOST_POINTS = 200
"""Points of a drawn curve."""

MOST_NAMES = 16
"""Hyperparameters that get a panel or a bar."""


def figures(study: Readable) -> dict[str, Figure]:
    """Return all figures that the study has something for, by a short name."""
    made = ((name, draw(study)) for name, draw in FIGURES.items())
    return {name: figure for name, figure in made if figure is not None}


def hypergradient_norms(study: Readable) -> Figure | None:
    """Norm of the hypergradient at each outer step, a line for each of the best trials."""
    lines = []
    for record, trace in _traces(study):
        points = [(r["outer_step"], r["grad_norm"]) for r in trace if r.get("grad_norm")]
        lines.append((record, _thin(points)))
    return _by_trial(study, lines, "Hypergradient norm per outer step", "‖dF/dz‖")


def certified_error(study: Readable) -> Figure | None:
    """Certified bound of the hypergradient's error at each outer step, where a method has one."""
    lines = []
    for record, trace in _traces(study):
        points = [(r["outer_step"], r["error_bound"]) for r in trace if r.get("error_bound")]
        lines.append((record, _thin(points)))
    return _by_trial(study, lines, "Certified error of the hypergradient", "error bound")


def paths(study: Readable) -> Figure | None:
    """Each gradient-owned hyperparameter over training, a line for each of the best trials.

    Of a tensor the median of its elements.
    """
    from plotly.graph_objects import Scatter
    from plotly.subplots import make_subplots

    found = list(_schedules(study))
    names = list(dict.fromkeys(n for _, schedule in found for n in schedule.names))[:MOST_NAMES]
    if not names:
        return None
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    sizes = {n: s.size(n) for _, s in found for n in s.names}
    titles = [n if sizes[n] == 1 else f"{n} ({sizes[n]})" for n in names]
    figure = make_subplots(
        rows, columns, subplot_titles=titles, vertical_spacing=0.25 / rows, horizontal_spacing=0.07
    )
    for place, name in enumerate(names):
        where = {"row": place // columns + 1, "col": place % columns + 1}
        for i, (record, schedule) in enumerate(found):
            if name not in schedule.names:
                continue
            values = schedule.summary(name)[:, 2]
            points = _thin(list(zip(schedule["step"].tolist(), values.tolist(), strict=True)))
            figure.add_trace(
                Scatter(
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                    mode="lines",
                    line={"shape": "hv", **_line(study, record, i)},
                    name=f"trial {record.number}",
                    legendgroup=str(record.number),
                    showlegend=place == 0,
                ),
                **where,
            )
        domain = study.space.get(name, None)
        if isinstance(domain, Grad) and domain.scale == "log":
            figure.update_yaxes(type="log", exponentformat="power", **where)
    figure.update_annotations(font_size=11)
    figure.update_xaxes(tickfont_size=9)
    figure.update_yaxes(tickfont_size=9)
    title = "Paths of gradient-owned hyperparameters"
    return _styled(figure, title, 230 * rows + 90).update_layout(showlegend=False)


def schedule_map(study: Readable) -> Figure | None:
    """The best trial's schedule as a heat map: each row a hyperparameter, scaled to its range.

    Tensors of a few elements get a row each; of larger ones quartiles and extremes.
    """
    from plotly.graph_objects import Figure, Heatmap

    best = next((pair for pair in _schedules(study)), None)
    if best is None:
        return None
    record, schedule = best
    columns = schedule.columns()
    steps = columns.pop("step")
    columns = {n: c for n, c in columns.items() if not n.endswith(".mean")}
    keep = _thin(list(enumerate(steps)))
    index = [i for i, _ in keep]
    rows, texts, labels = [], [], []
    for name, column in list(columns.items())[: 4 * MOST_NAMES]:
        values = np.asarray(column)[index]
        scaled = np.log(values) if _is_log(study, name) and values.min() > 0 else values
        spread = scaled.max() - scaled.min()
        rows.append(((scaled - scaled.min()) / spread if spread else 0 * scaled + 0.5).tolist())
        texts.append([f"{v:.3g}" for v in values])
        labels.append(f"{name}  {values[0]:.2g} → {values[-1]:.2g}")
    figure = Figure(
        Heatmap(
            x=[steps[i] for i in index],
            y=labels,
            z=rows,
            text=texts,
            colorscale="Viridis",
            colorbar={"title": "own range", "tickvals": [0, 1], "ticktext": ["lowest", "highest"]},
            hovertemplate="step %{x}<br>%{y}<br>value %{text}<extra></extra>",
        )
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title_text="training steps")
    title = f"Schedule of the best trial ({record.number})"
    return _styled(figure, title, 120 + 22 * len(labels))


def value_by_cost(study: Readable) -> Figure | None:
    """Value of each trial, and the best so far, against the cost of the study up to its end.

    By who moved the gradient-owned hyperparameters.
    """
    from plotly.graph_objects import Figure, Scatter

    done = [r for r in study.trials if r.value is not None and not r.imported]
    if not done:
        return None
    figure = Figure()
    totals = np.cumsum([r.cost.equivalent_steps for r in done]).tolist()
    spent = {r.number: total for r, total in zip(done, totals, strict=True)}
    owners = {r.number: _owner(study, r) for r in done}
    for i, owner in enumerate(dict.fromkeys(owners.values())):
        mine = [r for r in done if owners[r.number] == owner]
        figure.add_trace(
            Scatter(
                x=[spent[r.number] for r in mine],
                y=[r.value for r in mine],
                mode="markers",
                name=owner,
                marker={
                    "color": COLORS[i],
                    "size": 9,
                    "symbol": ["circle" if r.state == "complete" else "x-thin" for r in mine],
                    "line": {"width": 1.5, "color": COLORS[i]},
                },
                text=[f"trial {r.number} ({r.state}), {r.cost.equivalent_steps}" for r in mine],
                hovertemplate="%{text} of %{x}<br>value %{y:.4g}<extra></extra>",
            )
        )
    best, x, y = math.inf, [], []
    sign = signs(study.optuna)[0]
    for record in done:
        if record.state == "complete" and record.value is not None:
            best = min(best, sign * record.value)
        if math.isfinite(best):
            x.append(spent[record.number])
            y.append(sign * best)
    figure.add_trace(
        Scatter(x=x, y=y, mode="lines", line={"shape": "hv", "color": "#4a4e69"},
                name="best so far")
    )  # fmt: skip
    figure.update_xaxes(title_text="equivalent training steps of the study")
    figure.update_yaxes(title_text="value")
    values = [r.value for r in done if r.value is not None]
    if min(values) > 0 and max(values) > 10 * min(values):
        figure.update_yaxes(type="log")
    return _styled(figure, "Value against cost by owner", 420)


def importances(study: Readable) -> Figure | None:
    """Importance for the value (PED-ANOVA), of sampled and of gradient-owned hyperparameters.

    The gradient-owned ones enter with their values at the end of a trial, tensors with the
    median of their elements.
    """
    from plotly.graph_objects import Bar, Figure

    found = importance(study)
    if not found:
        return None
    names = list(found)[:MOST_NAMES][::-1]
    colors = {"grad": COLORS[1], "sampler": COLORS[0], "shared": COLORS[0]}
    owners = [study.space.owner(_name(n)) if _name(n) in study.space else "sampler" for n in names]
    figure = Figure()
    for owner in dict.fromkeys(owners):
        title = "gradient-owned, at the end" if owner == "grad" else "sampler-owned"
        mine = [n for n, o in zip(names, owners, strict=True) if o == owner]
        figure.add_trace(
            Bar(
                x=[found[n] for n in mine],
                y=mine,
                orientation="h",
                name=title,
                marker={"color": colors.get(owner, COLORS[9])},
            )
        )
    figure.update_yaxes(categoryorder="array", categoryarray=names, automargin=True)
    figure.update_xaxes(title_text="importance (PED-ANOVA)")
    return _styled(figure, "Importance of both owners", 140 + 24 * len(names))


def importance(study: Readable) -> dict[str, float]:
    """Return the importance of every hyperparameter that varied, largest first.

    Empty with fewer than four complete trials, or where nothing varied.
    """
    done = [r for r in study.trials if r.state == "complete" and len(r.values) == 1]
    table = [{**r.params, **_smooth(study, r)} for r in done]
    names = list(dict.fromkeys(n for row in table for n in row))
    columns = {n: [row[n] for row in table if n in row] for n in names}
    spaces = {n: d for n, c in columns.items() if (d := _distribution(study, n, c)) is not None}
    if len(done) < 4 or not spaces:
        return {}
    direction = study.optuna.directions[0]
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # the study is of no interest to anybody
    both = optuna.create_study(direction=direction)
    optuna.logging.set_verbosity(before)
    both.add_trials(
        create_trial(
            state=TrialState.COMPLETE,
            value=record.value,
            params={n: v for n, v in row.items() if n in spaces},
            distributions={n: d for n, d in spaces.items() if n in row},
        )
        for record, row in zip(done, table, strict=True)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of experimental parts; they are pinned by our tests
        found = optuna.importance.get_param_importances(both)
    return {name: float(value) for name, value in found.items()}


FIGURES: Mapping[str, Callable[[Readable], Figure | None]] = {
    "value-by-cost": value_by_cost,
    "importance": importances,
    "hypergradient-norms": hypergradient_norms,
    "certified-error": certified_error,
    "paths": paths,
    "schedule": schedule_map,
}
"""Figures by a short name: an identifier for the dashboard, a file name for PNGs."""


# Data.


def _drawn(study: Readable) -> list[TrialRecord]:
    """The best finished trials, best first."""
    ended = [r for r in study.trials if r.value is not None and r.state in ("complete", "pruned")]
    sign = signs(study.optuna)[0]
    # A complete trial before all pruned ones: the values of those are of fewer steps.
    key = lambda r: (r.state != "complete", sign * float(r.value or 0.0))  # noqa: E731
    return sorted(ended, key=key)[:MOST_TRIALS]


def _traces(study: Readable) -> Iterator[tuple[TrialRecord, list[Record]]]:
    for record in _drawn(study):
        text = study.artifact(TRACE, record.number)
        if text is not None:
            yield record, json.loads(text)


def _schedules(study: Readable) -> Iterator[tuple[TrialRecord, Schedule]]:
    for record in _drawn(study):
        schedule = study.schedule(record.number)
        if schedule is not None:
            yield record, schedule


def _smooth(study: Readable, record: TrialRecord) -> dict[str, float]:
    """Gradient-owned values at the end of a trial, of tensors the median."""
    found = {}
    for name in study.space.grad:
        if name in record.hparams:
            found[name] = middle(record.hparams[name])
    return found


def _distribution(study: Readable, name: str, column: Sequence[Any]) -> BaseDistribution | None:
    """A distribution over what a hyperparameter took; None where it never varied."""
    if len(set(column)) < 2:
        return None
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in column):
        low, high = float(min(column)), float(max(column))
        return FloatDistribution(low, high, log=_is_log(study, name) and low > 0)
    return CategoricalDistribution(tuple(dict.fromkeys(column)))


def _name(label: str) -> str:
    """The hyperparameter of a column or of a mangled name: ``wd[0]``, ``wd.min``, ``n@a=b``."""
    return label.split("@")[0].split("[")[0].split(".")[0]


def _is_log(study: Readable, label: str) -> bool:
    domain = study.space.get(_name(label), None)
    return getattr(domain, "log", False) or getattr(domain, "scale", "") == "log"


def _owner(study: Readable, record: TrialRecord) -> str:
    if not study.space.grad:
        return "sampler"
    return "gradient" if record.by == "gradient" else "sampler (values not tuned inside)"


def _thin(points: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """At most so many points, the last one included."""
    step = max(1, math.ceil(len(points) / MOST_POINTS))
    kept = list(points[::step])
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


# Looks.


def _line(study: Readable, record: TrialRecord, place: int) -> dict[str, Any]:
    dash = "solid" if record.state == "complete" else "dot"
    return {"color": COLORS[place % len(COLORS)], "width": 2.2 if place == 0 else 1.2, "dash": dash}


def _by_trial(
    study: Readable,
    lines: Sequence[tuple[TrialRecord, list[tuple[Any, Any]]]],
    title: str,
    axis: str,
) -> Figure | None:
    from plotly.graph_objects import Figure, Scatter

    figure = Figure()
    for i, (record, points) in enumerate(lines):
        if points:
            figure.add_trace(
                Scatter(
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                    mode="lines",
                    line=_line(study, record, i),
                    name=f"trial {record.number}" + (" (best)" if i == 0 else ""),
                )
            )
    if not figure.data:
        return None
    figure.update_yaxes(type="log", exponentformat="power", title_text=axis)
    figure.update_xaxes(title_text="outer step")
    return _styled(figure, title, 420)


def _styled(figure: Figure, title: str, height: int) -> Figure:
    figure.update_layout(
        title=title,
        template="plotly_white",
        height=height,
        margin={"t": 70, "b": 50, "l": 60, "r": 20},
        font={"size": 12},
        showlegend=len(figure.data) > 1,
    )
    return figure
