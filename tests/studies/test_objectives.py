"""Maximized and several objectives: which trial is best, and which ones are on the front."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from studies.arguments import directions
from studies.figures.plots import figures
from studies.views.objectives import leading, ranked
from studies.views.stored import StoredStudy
from studies.views.tables import trials_table
from tests.studies.console import STUDY, console, study_file

MAXIMIZED = STUDY.replace("seed = 5", 'seed = 5\nmetric = "accuracy"\ndirection = "maximize"')
TWO = STUDY.replace(
    "seed = 5",
    'seed = 5\nmetric = ["loss", "accuracy"]\ndirection = ["minimize", "maximize"]',
).replace("trials = 3", "trials = 5")


def made(folder: Path, text: str) -> StoredStudy:
    study_file(folder, text)
    done = console("study", "run", "small.toml", "--out", "out", "--quiet", cwd=folder)
    assert done.code == 0, done.err
    return StoredStudy(folder / "out")


@pytest.fixture(scope="module")
def maximized(tmp_path_factory: pytest.TempPathFactory) -> StoredStudy:
    return made(tmp_path_factory.mktemp("maximized"), MAXIMIZED)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> StoredStudy:
    return made(tmp_path_factory.mktemp("two"), TWO)


def dominated(values: tuple[float, ...], others: list[tuple[float, ...]]) -> bool:
    """Whether some other pair has a loss and an accuracy that are as good, and one better."""
    loss, accuracy = values
    return any(o[0] <= loss and o[1] >= accuracy and o != values for o in others)


def test_an_accuracy_is_not_minimized_by_mistake(tmp_path: Path) -> None:
    for metric in ('"accuracy"', '["loss", "worst_accuracy"]'):
        study_file(tmp_path, STUDY.replace("seed = 5", f"seed = 5\nmetric = {metric}"))
        done = console("study", "run", "small.toml", "--out", "out", "--quiet", cwd=tmp_path)
        assert done.code == 2
        assert "direction must be given" in done.err
        assert not (tmp_path / "out").exists()
    assert directions(None, ["loss", "size"]) == ["minimize"] * 2
    assert directions("minimize", ["accuracy"]) == ["minimize"]


def test_the_best_has_the_highest_value(maximized: StoredStudy) -> None:
    values = [record.value or 0.0 for record in maximized.trials]
    best = values.index(max(values))
    assert [record.number for record in leading(maximized)] == [best]
    in_order = [record.value or 0.0 for record in ranked(maximized)]
    assert in_order == sorted(values, reverse=True)
    found = console("study", "best", "out", "--json", cwd=maximized.folder.parent).json
    assert (found["number"], found["value"]) == (best, max(values))


def test_a_maximized_table_names_its_metric_and_marks_the_best(maximized: StoredStudy) -> None:
    text = console("study", "show", "out", cwd=maximized.folder.parent).out
    assert "val accuracy" in text
    assert "val loss" not in text
    marked = [line.split() for line in text.splitlines() if " best " in line]
    assert [line[0] for line in marked] == [str(maximized.best.number)]
    status = console("study", "status", "out", cwd=maximized.folder.parent).out
    assert f"best {maximized.best.value:.4f} (trial {maximized.best.number})" in status


def test_the_curve_of_a_maximized_value_only_rises(maximized: StoredStudy) -> None:
    (plane,) = figures(maximized)["values"].planes  # type: ignore[union-attr]
    assert plane.y_label == "val accuracy (higher is better)"
    curve = next(line for line in plane.lines if line.label == "best so far")
    assert list(curve.y) == sorted(curve.y)
    assert curve.y[-1] == maximized.best.value


def test_the_front_is_what_nothing_dominates(two: StoredStudy) -> None:
    values = {record.number: record.values for record in two.trials}
    front = [n for n, v in values.items() if not dominated(v, list(values.values()))]
    assert 0 < len(front) < len(values)
    assert [record.number for record in leading(two)] == front
    cwd = two.folder.parent
    text = console("study", "show", "out", cwd=cwd).out
    marked = [int(line.split()[0]) for line in text.splitlines() if " front " in line]
    assert marked == front
    only = console("study", "show", "out", "--front", "--json", cwd=cwd).json
    assert [row["number"] for row in only] == front
    status = console("study", "status", "out", "--json", cwd=cwd).json
    assert (status["best"], status["front"]) == (None, front)
    assert "no complete trial" not in console("study", "status", "out", cwd=cwd).out
    done = console("study", "best", "out", cwd=cwd)
    assert done.code == 2
    assert "show DIR --front" in done.err


def test_a_report_of_two_objectives_draws_the_front(two: StoredStudy, tmp_path: Path) -> None:
    cwd = two.folder.parent
    done = console("study", "report", "out", "--to", tmp_path / "r", "--json", cwd=cwd)
    assert done.code == 0, done.err
    names = [Path(path).name for path in done.json["figures"]]
    assert names[:2] == ["values.png", "front.png"]
    (plane,) = figures(two)["front"].planes  # type: ignore[union-attr]
    line = next(line for line in plane.lines if line.label == "front")
    assert set(zip(line.x, line.y, strict=True)) == {record.values for record in two.front}
    page = Path(done.json["report"]).read_text(encoding="utf-8")
    assert page.count("<tr class=best>") == len(two.front)


def test_compare_marks_no_winner_among_different_aims(
    maximized: StoredStudy, two: StoredStudy
) -> None:
    folders = (maximized.folder, two.folder)
    found = console("study", "compare", *folders, "--json", cwd=two.folder.parent).json
    first, second = found["studies"]
    assert first["best"]["number"] == maximized.best.number
    assert first["directions"] == ["maximize"]
    assert [row["number"] for row in second["front"]] == [r.number for r in two.front]
    text = console("study", "compare", *folders, cwd=two.folder.parent).out
    assert "val accuracy is maximized" in text
    assert "val loss is minimized, val accuracy is maximized" in text
    for record in two.front:
        assert " / ".join(f"{value:.4f}" for value in record.values) in text


def test_tables_fit_into_eighty_columns(two: StoredStudy) -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(trials_table(two))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
