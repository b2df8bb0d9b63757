"""Figures of a study: what they show, and the page and the PNGs that a report makes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import one_hot

from adapters import Method, registry, tasks
from adapters.tasks import Classification
from bilevel import MAID, Budget, Descent, Float, Grad, Space
from bilevel.inexact import Smoothness
from hypergrad import Unrolled
from studies import Study
from studies.figures.across import importance
from studies.figures.charts import LONGEST_NAME, Bars, Chart, Curves, HeatMap, Instant, short, thin
from studies.figures.interactive import interactive
from studies.figures.pictures import write_picture
from studies.figures.plots import FIGURES, figures
from studies.views.stored import StoredStudy
from tests.studies.console import console, five_trials
from tests.studies.trials import Behaving, Trivial

EVERYWHERE = ["values", "importance", "hypergradient_norms", "paths", "schedule"]


class Ridge(Method):
    """Least squares with penalties: all smoothness constants are known."""

    name: ClassVar[str] = "least_squares"
    space = Space(
        lr=Float(1e-2, 0.1, log=True, default=0.05),
        penalty_of_each_feature_before_the_bias=Grad(
            0.3, low=0.1, high=1.0, scale="log", shape=(30,)
        ),
    )

    def network(self) -> nn.Module:
        model = nn.Linear(30, 2)
        nn.init.zeros_(model.weight)
        nn.init.zeros_(model.bias)
        return model

    def batch_size(self, hparams: Mapping[str, Any]) -> int:
        return 100

    def measure(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        error = model(batch["x"]) - one_hot(batch["y"].long(), 2)
        return {"loss": 0.5 * error.square().sum(1)}

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> torch.Tensor:
        weights, bias = model.weight, model.bias
        decay = (hparams["penalty_of_each_feature_before_the_bias"] * weights.square()).sum()
        return 0.5 * decay + 0.15 * bias.square().sum()


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Two trials of MAID on a lower level that is strongly convex."""
    known = Smoothness(mu=0.1, L=16.0, L_g=16.0, L_J=2.0, L_H=0.0, g_convex=True)
    study = Study(
        "certified",
        registry.as_learner(Ridge),
        tasks.get("breast_cancer", n_train=100),
        tmp_path_factory.mktemp("certified") / "study.db",
        algorithm=MAID(smoothness=known, eps=0.1),
    )
    return study.run(2, Budget(outer_steps=3), scheduler="fifo")


class Passing(Method):
    """One weight that runs from 0 to 1, where the training data is."""

    name: ClassVar[str] = "passing"
    space = Space(
        lr=Float(1e-2, 0.1, log=True, default=0.05),
        pull=Grad(1e-3, low=1e-4, high=1e-2, scale="log"),
    ).fix(lr=0.05)

    def network(self) -> nn.Module:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        return model

    def measure(
        self, model: nn.Module, hparams: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        return {"loss": 0.5 * (model(torch.ones_like(batch["x"])) - batch["x"]).square().sum(1)}

    def penalty(self, model: nn.Module, hparams: Mapping[str, Any]) -> torch.Tensor:
        return 0.5 * hparams["pull"] * model.weight.square().sum()


def passing(place: float, folder: Path, steps: int = 60) -> Study:
    """A study of one trial whose validation loss is lowest where the weight is at a place."""
    rows = {
        name: {"x": torch.full((4, 1), x), "y": torch.zeros(4).long()}
        for name, x in (("train", 1.0), ("val", place), ("test", place))
    }
    task = Classification("line", rows, n_classes=2, corrupted=torch.zeros(4).bool())
    algorithm = Descent(Unrolled(steps=5), lr=0.01)
    study = Study(
        "passing", registry.as_learner(Passing), task, folder / "study.db", algorithm=algorithm
    )
    return study.run(1, steps, scheduler="fifo")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> StoredStudy:
    """A study of five trials."""
    return StoredStudy(five_trials(tmp_path_factory.mktemp("study")))


def curves(chart: Chart) -> Curves:
    assert isinstance(chart, Curves)
    return chart


def drawn(chart: Chart, path: Path) -> int:
    """Draw a chart both ways; return how many colors its PNG has."""
    assert interactive(chart).layout.title.text == chart.title
    write_picture(chart, path)
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with Image.open(path) as picture:
        assert min(picture.size) > 150
        return len(picture.convert("RGB").getcolors(1 << 24) or [])


def test_figures_hold_the_numbers_of_the_study(made: StoredStudy) -> None:
    found = figures(made)
    assert list(found) == EVERYWHERE
    assert set(FIGURES) == {*EVERYWHERE, "front", "certified_error"}
    trace = json.loads(made.artifact("trace.json") or "")
    (plane,) = curves(found["hypergradient_norms"]).planes
    assert list(plane.lines[0].y) == [row["grad_norm"] for row in trace]
    assert plane.lines[0].label == f"trial {made.best.number} (best)"
    assert (plane.x_label, plane.y_label, plane.log) == ("outer step", "‖dF/dz‖", True)
    shares = importance(made)
    assert {"robustness", "lr"} <= set(shares)
    assert sum(shares.values()) == pytest.approx(1.0)
    bars = found["importance"]
    assert isinstance(bars, Bars)
    groups = {bar.name: bar.group for bar in bars.bars}
    assert groups["robustness"] == "gradient-owned, as it came out"
    assert groups["lr"] == "sampler-owned"


def test_a_schedule_is_scaled_row_by_row(made: StoredStudy) -> None:
    chart = figures(made)["schedule"]
    assert isinstance(chart, HeatMap)
    assert chart.title == f"Schedule of the best trial ({made.best.number})"
    for row in chart.shares:
        assert (min(row), max(row)) in {(0.0, 1.0), (0.5, 0.5)}
    assert len(chart.edges) == len(chart.x) + 1
    assert chart.edges[-1] > chart.x[-1]


def test_the_best_rung_is_marked_where_it_was_before_the_end(tmp_path: Path) -> None:
    study = passing(0.5, tmp_path)
    best, found = study.best, figures(study)
    assert best.at is not None
    assert 0 < best.at < best.cost.steps
    heat = found["schedule"]
    assert isinstance(heat, HeatMap)
    assert heat.instant == Instant(best.at, "best rung")
    label = f"best rung of trial {best.number}"
    (path,) = curves(found["paths"]).planes
    assert path.instant == Instant(best.at, label)
    trace = json.loads(study.artifact("trace.json") or "")
    (step,) = [row["outer_step"] for row in trace if row["steps"] == best.at]
    (norm,) = curves(found["hypergradient_norms"]).planes
    assert norm.instant == Instant(step, label)
    for name in ("paths", "hypergradient_norms", "schedule"):
        (shape,) = interactive(found[name]).layout.shapes
        assert (shape.x0, shape.x1) == (
            (step, step) if name.startswith("hyper") else (best.at,) * 2
        )
        with_it, without = tmp_path / "with.png", tmp_path / "without.png"
        drawn(found[name], with_it)
        drawn(unmarked(found[name]), without)
        assert with_it.read_bytes() != without.read_bytes()
    names = [shape.name for shape in interactive(found["paths"]).layout.shapes if shape.showlegend]
    assert names == [label]
    assert [note.text for note in interactive(heat).layout.annotations] == ["best rung"]


def unmarked(chart: Chart) -> Chart:
    """A chart without its mark."""
    if isinstance(chart, HeatMap):
        return replace(chart, instant=None)
    planes = [replace(plane, instant=None) for plane in curves(chart).planes]
    return replace(curves(chart), planes=planes)


def test_a_trial_that_was_best_at_its_end_has_no_mark(tmp_path: Path) -> None:
    study = passing(1.0, tmp_path, steps=10)
    assert study.best.at is None
    found = figures(study)
    for name in ("paths", "hypergradient_norms", "schedule"):
        assert unmarked(found[name]) == found[name]


def test_figures_end_with_the_training(tmp_path: Path) -> None:
    study = passing(0.5, tmp_path)
    schedule, steps = study.schedule(), study.best.cost.steps
    assert schedule is not None
    assert schedule["step"][-1] == steps  # the value that would have come next
    found = figures(study)
    heat = found["schedule"]
    assert isinstance(heat, HeatMap)
    assert heat.edges == [*schedule["step"][:-1], steps]
    (plane,) = curves(found["paths"]).planes
    assert list(plane.lines[0].x) == [*schedule["step"][:-1], steps]
    assert plane.lines[0].y[-1] == schedule["pull"][-2]
    assert heat.rows == [f"pull  {schedule['pull'][0]:.2g} → {study.best.hparams['pull']:.2g}"]


def test_certified_errors_of_maid(certified: Study, tmp_path: Path) -> None:
    chart = curves(figures(certified)["certified_error"])
    (plane,) = chart.planes
    trace = json.loads(certified.artifact("trace.json") or "")
    assert list(plane.lines[0].y) == [row["error_bound"] for row in trace]
    assert all(row["certified"] == 1.0 for row in trace)
    assert plane.log
    assert drawn(chart, tmp_path / "x.png") > 20


def test_a_report_has_a_png_for_each_figure(made: StoredStudy, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    done = console("study", "report", made.folder, "--to", folder, cwd=tmp_path)
    page, *pictures = map(Path, done.out.split())
    assert page == folder / "report.html"
    assert [path.name for path in pictures] == [
        *(f"{name}.png" for name in EVERYWHERE),
        "best_trial.png",
    ]
    assert {path.name for path in folder.iterdir()} == {p.name for p in (page, *pictures)}
    for path in pictures:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 20  # not blank
    text = page.read_text(encoding="utf-8")
    assert all(chart.title in text for chart in figures(made).values())
    assert '<script src="http' not in text
    assert text.count("plotly.js v") == 1
    again = console("study", "report", made.folder, "--to", folder, "--json", cwd=tmp_path).json
    assert again == {"report": str(page), "figures": [str(path) for path in pictures]}


def test_the_library_writes_the_same_report(certified: Study, tmp_path: Path) -> None:
    page = certified.report(tmp_path / "report")
    names = {path.name for path in page.parent.iterdir()}
    assert {"report.html", "certified_error.png", "values.png", "best_trial.png"} <= names


def test_nothing_complete_is_no_report(tmp_path: Path) -> None:
    study = Study("none", Trivial, "digits", tmp_path / "study.db")
    with pytest.raises(ValueError, match="'none' has no complete trial"):
        study.report(tmp_path / "report")


def test_failed_trials_have_no_point_but_count_in_the_cost(tmp_path: Path) -> None:
    space = Behaving.space.fix(how="fine", pace=0.0, mark="none")
    study = Study(
        "fails", Behaving, "digits", tmp_path / "study.db", space=space.own(how="sampler")
    )
    for how in ("nan", "fine", "raise", "fine"):
        study.enqueue({"how": how})
    study.run(4, 10, max_failed=1.0)
    assert [r.state for r in study.trials] == ["failed", "complete", "failed", "complete"]
    found = figures(study)
    assert list(found) == ["values"]  # nothing owned by the gradient, and two trials only
    (plane,) = curves(found["values"]).planes
    points = next(line for line in plane.lines if line.label == "sampler")
    total = [sum(r.cost.equivalent_steps for r in study.trials[: n + 1]) for n in range(4)]
    assert list(points.x) == [total[1], total[3]]


@pytest.mark.parametrize("trials", [1, pytest.param(100, marks=pytest.mark.slow)])
def test_one_trial_and_a_hundred(trials: int, tmp_path: Path) -> None:
    study = Study("many", Trivial, "digits", tmp_path / "study.db").run(trials, 3)
    (plane,) = curves(figures(study)["values"]).planes
    assert len(plane.lines[0].x) == trials
    assert drawn(figures(study)["values"], tmp_path / "x.png") > 20


def test_long_names_and_long_curves_are_shortened(certified: Study, tmp_path: Path) -> None:
    name = "penalty_of_each_feature_before_the_bias"
    found = figures(certified)
    (plane,) = curves(found["paths"]).planes
    assert plane.title == f"{short(name)} (30)"
    assert len(short(name)) <= LONGEST_NAME
    assert short("lr") == "lr"
    for chart in found.values():
        assert drawn(chart, tmp_path / "x.png") > 20
    assert thin(0) == []
    assert thin(3) == [0, 1, 2]
    kept = thin(1001)
    assert (kept[0], kept[-1], len(kept) <= 202) == (0, 1000, True)
