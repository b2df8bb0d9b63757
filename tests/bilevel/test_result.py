"""Results: schedule, files and figures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import Budget, Descent, ProblemInner, Result, Schedule, tune
from bilevel.curves import panels
from hypergrad import CG, SGD, Implicit
from tests.bilevel.problems import RIDGE, ridge_options

RULE = SGD(lr=0.05, momentum=0.9)
ALGORITHM = Descent(Implicit(CG(max_iter=10)), inner_steps=3)


def run(shape: tuple[int, ...] = (), **options: Any) -> Result:
    return tune(RIDGE, ALGORITHM, Budget(outer_steps=12), optimizer=RULE, evaluate_every=3,
                **ridge_options(shape), **options)  # fmt: skip


def test_schedule_is_the_history_of_every_hyperparameter() -> None:
    found = run((8,))
    assert found.schedule["step"].tolist() == [3.0 * i for i in range(13)]
    assert found.schedule["penalty"].shape == (13, 8)
    assert np.all(found.schedule["penalty"][0] == 1.0)
    # The result holds the values that its weights were trained with: those before the last move.
    assert np.allclose(found.schedule["penalty"][-2], found.hparams["penalty"].numpy())


def test_replaying_a_schedule_gives_the_same_weights() -> None:
    found = run()
    options = ridge_options()
    inner = ProblemInner(RIDGE, options.pop("params"), optimizer=RULE, **options)
    for _ in found.schedule.replay(inner, found.cost.steps):
        pass
    assert torch.equal(inner.params["w"], found.params["w"])


def test_large_tensors_are_kept_as_quantiles() -> None:
    found = run((8,), history=4)
    table = found.schedule.summary("penalty")
    whole = run((8,)).schedule["penalty"]
    assert np.allclose(table[:, 0], whole.min(1))
    assert np.allclose(table[:, 2], np.median(whole, axis=1))
    assert np.allclose(table[:, 5], whole.mean(1))
    with pytest.raises(KeyError, match="history=N"):
        found.schedule["penalty"]
    with pytest.raises(ValueError, match="quantiles only"):
        found.schedule.at(0)


def test_schedule_files_read_back_equal(tmp_path: Path) -> None:
    schedule = run((8,)).schedule
    assert Schedule.from_json(schedule.to_json()).columns() == schedule.columns()
    schedule.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["penalty[3]"]) for row in rows] == schedule["penalty"][:, 3].tolist()


def test_saved_result_reads_back(tmp_path: Path) -> None:
    found = run()
    back = Result.load(found.save(tmp_path / "out"))
    assert torch.equal(back.params["w"], found.params["w"])
    assert back.params["w"].requires_grad
    assert (back.trace, back.test, back.cost) == (found.trace, found.test, found.cost)
    assert back.space == found.space
    assert str(back) == str(found)
    assert len(json.loads((tmp_path / "out" / "trace.json").read_text())) == 12


def test_figures(tmp_path: Path) -> None:
    found = run((8,))
    found.plot(tmp_path / "a.png")
    found.plot(tmp_path / "a.html")
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    page = (tmp_path / "a.html").read_text()
    assert "hypergradient norm" in page
    assert '<script src="http' not in page  # self-contained
    with pytest.raises(ValueError, match=r"must end in one of \['.png', '.html'\]"):
        found.plot(tmp_path / "a.pdf")
    with pytest.raises(OSError, match="cannot write"):
        found.plot("/proc/none/a.png")


def test_panels_hold_the_numbers_of_the_run() -> None:
    found = run((8,))
    loss, norm, penalty = panels(found.trace, found.schedule, found.space)
    assert [c.label for c in loss.curves] == ["outer loss", "validation loss", "inner loss"]
    assert loss.curves[0].y.tolist() == [row["outer_loss"] for row in found.trace]
    assert norm.log
    assert penalty.log
    assert penalty.title == "penalty (8 values)"
    band = penalty.curves[0].band
    assert band is not None
    assert np.allclose(band[1], found.schedule["penalty"].max(1))


def test_text_says_what_happened() -> None:
    text = str(run())
    assert "max_iter: the budget of 12 outer steps is spent" in text
    assert "12 outer steps, 36 training steps" in text
    assert "penalty" in text
