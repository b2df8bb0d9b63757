"""Figures: the numbers that they show, and files that stand alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import Budget, Descent, EarlyStopping, Grad, Result, Schedule, Space, tune
from bilevel.curves import COLORS, Panel, panels
from bilevel.plots import html_figure
from hypergrad import CG, Implicit
from tests.bilevel.problems import RIDGE, ridge_options


@pytest.fixture(scope="module")
def found() -> Result:
    algorithm = Descent(Implicit(CG(max_iter=10)), inner_steps=3)
    options = {**ridge_options((8,)), "evaluate_every": 3, "callbacks": [EarlyStopping(3)]}
    return tune(RIDGE, algorithm, Budget(outer_steps=12), **options)


def drawn(found: Result) -> list[Panel]:
    best = found.best.steps if found.best else None
    return panels(found.trace, found.schedule, found.space, found.cost.steps, best)


def test_panels_hold_the_numbers_of_the_run(found: Result) -> None:
    loss, norm, penalty = drawn(found)
    assert [c.label for c in loss.curves] == [
        "outer loss (batch)",
        "inner loss (batch)",
        "validation loss",
    ]
    assert loss.curves[0].y.tolist() == [row["outer_loss"] for row in found.trace]
    assert loss.curves[2].x.tolist() == [9.0, 18.0, 27.0, 36.0]
    assert norm.curves[0].y.tolist() == [row["grad_norm/penalty"] for row in found.trace]
    assert norm.log
    values = found.schedule["penalty"][:-1]  # what would have come next was never trained on
    assert penalty.curves[0].x.tolist() == [*found.schedule["step"][:-1], found.cost.steps]
    values = np.concatenate([values, values[-1:]])
    assert (penalty.title, penalty.log, penalty.step) == ("penalty (8 values)", True, True)
    (curve,) = penalty.curves
    assert np.allclose(curve.y, np.median(values, axis=1))
    assert [name for name, _, _ in curve.bands] == ["range", "quartiles"]
    assert np.allclose(curve.bands[0][1], values.min(1))
    assert np.allclose(curve.bands[1][2], np.quantile(values, 0.75, axis=1))


def _made(**values: Any) -> tuple[list[Panel], Space]:
    """Panels of two outer steps of hyperparameters that move from their given values."""
    space = Space({n: Grad(0.5, shape=np.shape(v), low=0.0) for n, v in values.items()})
    schedule = Schedule(limit=4)
    trace: list[Any] = []
    for t in range(3):
        schedule.record(t, {n: torch.as_tensor(v) + t for n, v in values.items()})
        norms = {f"grad_norm/{n}": 0.1 * t for n in values}
        trace.append({"steps": t, "outer_loss": 1000.0**-t, "grad_norm": 1.0, **norms})
    return panels(trace, schedule, space, 3), space


def test_small_tensors_are_lines_and_colors_stay_with_their_names() -> None:
    names = [f"a{i}" for i in range(12)]
    (loss, norm, *rest), _ = _made(**dict.fromkeys(names, 1.0), b=[1.0, 2.0])
    assert loss.log  # six decades
    assert [c.label for c in norm.curves] == ["all", *names, "b"]
    assert np.isnan(norm.curves[1].y[0])  # a norm of zero has no place on the axis
    for own, curve in zip(rest, norm.curves[1:], strict=True):
        assert own.curves[0].color == curve.color in COLORS
    assert [c.label for c in rest[-1].curves] == ["b[0]", "b[1]"]
    assert rest[-1].curves[1].y.tolist() == [2.0, 3.0, 4.0, 4.0]  # until the end


def test_quantiles_are_drawn_where_no_more_was_kept() -> None:
    (_, _, large), _ = _made(w=torch.linspace(0, 1, 5))
    assert large.curves[0].y.tolist() == pytest.approx([0.5, 1.5, 2.5, 2.5])


def test_png(found: Result, tmp_path: Path) -> None:
    from matplotlib import image, pyplot

    path = found.plot(tmp_path / "new" / "a.png")
    picture = image.imread(path)
    assert picture.shape[1] > picture.shape[0] > 400
    assert len(np.unique(picture.reshape(-1, picture.shape[2]), axis=0)) > 50
    assert pyplot.get_fignums() == []


def test_html_stands_alone(found: Result, tmp_path: Path) -> None:
    page = found.plot(tmp_path / "a.html", title="Ridge").read_text()
    assert "Ridge" in page
    assert "hypergradient norm" in page
    assert "<script src=" not in page
    assert "<link" not in page
    figure = html_figure(drawn(found), "t")
    lines = {line.name: line for line in figure.data}
    assert list(lines["validation loss"].y) == [r["val_loss"] for r in found.trace[2::3]]
    assert list(lines["median"].x) == found.schedule["step"].tolist()
    assert figure.layout.yaxis2.type == "log"


def test_where_a_run_was_best_is_marked_unless_at_its_end(found: Result) -> None:
    marked = panels(found.trace, found.schedule, found.space, 36, 18)
    figure = html_figure(marked, "t")
    assert [(line.x0, line.x1, line.name) for line in figure.layout.shapes] == [
        (18, 18, "best")
    ] * 3
    assert not html_figure(
        panels(found.trace, found.schedule, found.space, 36, 36), "t"
    ).layout.shapes


def test_bad_paths(found: Result, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in one of \['.png', '.html'\], .*a.pdf"):
        found.plot(tmp_path / "a.pdf")
    with pytest.raises(OSError, match=r"path: cannot write '/proc/none/a\.png'"):
        found.plot("/proc/none/a.png")
