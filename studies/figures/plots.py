"""The figures of a study by name: for its page, its PNGs and its dashboard."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from studies.figures.across import front, importances, value_by_cost
from studies.figures.charts import Chart
from studies.figures.inside import certified_error, norms, paths, schedule_map
from studies.views.readable import Readable

__all__ = ["FIGURES", "figures"]

FIGURES: Mapping[str, Callable[[Readable], Chart | None]] = {
    "values": value_by_cost,
    "front": front,
    "importance": importances,
    "hypergradient_norms": norms,
    "certified_error": certified_error,
    "paths": paths,
    "schedule": schedule_map,
}
"""Figures by a short name: an identifier for the dashboard, a file name for PNGs."""


def figures(study: Readable) -> dict[str, Chart]:
    """Return all figures that the study has something for, by a short name."""
    made = ((name, draw(study)) for name, draw in FIGURES.items())
    return {name: chart for name, chart in made if chart is not None}
