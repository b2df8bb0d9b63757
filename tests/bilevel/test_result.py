"""Results: the schedule, files that read back, and what they say."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from bilevel import Budget, Descent, ProblemInner, Result, Schedule, tune
from hypergrad import CG, Implicit, Problem
from tests.bilevel.problems import RIDGE, ridge_options

ALGORITHM = Descent(Implicit(CG(max_iter=10)), inner_steps=3)


def run(shape: tuple[int, ...] = (), **options: Any) -> Result:
    options = {**ridge_options(shape), **options}
    return tune(RIDGE, ALGORITHM, Budget(outer_steps=12), evaluate_every=3, **options)


def test_schedule_is_the_history_of_every_hyperparameter() -> None:
    found = run((8,))
    assert found.schedule["step"].tolist() == [3.0 * i for i in range(13)]
    assert found.schedule["penalty"].shape == (13, 8)
    assert np.allclose(found.schedule["penalty"][0], 1.0)
    # The result holds the values that its weights were trained with: those before the last move.
    assert found.schedule["penalty"][-2].tolist() == found.hparams["penalty"].tolist()


def test_values_in_force_at_a_step() -> None:
    schedule = Schedule()
    for step, value in ((0, 1.0), (3, 2.0), (7, 3.0)):
        schedule.record(step, {"a": torch.tensor(value)})
    values = [schedule.at(step)["a"].item() for step in range(9)]
    assert values == [1, 1, 1, 2, 2, 2, 2, 3, 3]


def test_replaying_a_schedule_gives_the_same_weights() -> None:
    found, options = run(), ridge_options()
    inner = ProblemInner(RIDGE, options.pop("params"), **options)
    losses = [metrics["loss"] for metrics in found.schedule.replay(inner, found.cost.steps)]
    assert torch.equal(inner.params["w"], found.params["w"])
    assert losses[2::3] == [record["inner_loss"] for record in found.trace]


def test_large_tensors_are_kept_as_quantiles() -> None:
    found = run((8,), history=4)
    table = found.schedule.summary("penalty")
    whole = run((8,)).schedule["penalty"]
    assert np.allclose(table[:, 0], whole.min(1))
    assert np.allclose(table[:, 1:4], np.quantile(whole, [0.25, 0.5, 0.75], axis=1).T)
    assert np.allclose(table[:, 4:], np.stack([whole.max(1), whole.mean(1)], axis=1))
    assert list(found.schedule) == ["step"]
    assert found.schedule.names == ("penalty",)
    with pytest.raises(KeyError, match="history=N"):
        found.schedule["penalty"]
    with pytest.raises(ValueError, match="quantiles only"):
        found.schedule.at(0)


@pytest.mark.parametrize("history", [4, 64])
def test_schedule_files_read_back_equal(history: int, tmp_path: Path) -> None:
    schedule = run((8,), history=history).schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    schedule.to_csv(tmp_path / "s.csv")
    with (tmp_path / "s.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    read = {name: [float(row[name]) for row in rows] for name in rows[0]}
    assert read == schedule.columns()


def test_saved_result_reads_back(tmp_path: Path) -> None:
    found = run()
    back = Result.load(found.save(tmp_path / "new" / "out"))
    assert torch.equal(back.params["w"], found.params["w"])
    assert back.params["w"].requires_grad
    assert torch.equal(back.hparams["penalty"], found.hparams["penalty"])
    assert (back.trace, back.val, back.test) == (found.trace, found.val, found.test)
    assert (back.cost, back.best, back.status) == (found.cost, found.best, found.status)
    assert (back.space, back.schedule) == (found.space, found.schedule)
    assert (str(back), repr(back)) == (str(found), repr(found))
    assert json.loads((tmp_path / "new" / "out" / "trace.json").read_text()) == found.trace


def test_no_result_and_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing.result\.pt"):
        Result.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run().save(tmp_path / "file")


class Layer(NamedTuple):
    weight: Tensor
    scale: Tensor


def test_other_nodes_of_a_tree_become_names(tmp_path: Path) -> None:
    """A checkpoint runs no code when it is read, so it holds no classes."""

    def flat(params: Any, hparams: Any, batch: Any) -> Tensor:
        return RIDGE.inner_loss({"w": params.weight * params.scale}, hparams, batch)

    layer = Layer(torch.zeros(8, dtype=torch.float64, requires_grad=True), torch.tensor(2.0))
    problem, options = Problem(flat, flat), ridge_options(params=layer)
    found = tune(problem, ALGORITHM, 9, **options)
    assert isinstance(found.params, Layer)
    back = Result.load(found.save(tmp_path))
    assert list(back.params) == ["params.weight", "params.scale"]
    assert torch.equal(back.params["params.weight"], found.params.weight)
    assert [t.requires_grad for t in back.params.values()] == [True, False]
    assert len(back.resume(18, problem, algorithm=ALGORITHM, **options).trace) == 6


def test_text_says_what_happened() -> None:
    found = run()
    text = str(found)
    assert text.startswith("max_iter: the budget of 12 outer steps is spent\n")
    assert "12 outer steps, 36 training steps, " in text
    assert f"test        loss {found.test['loss']:.4f}" in text  # type: ignore[index]
    assert f"penalty           {float(found.hparams['penalty']):.4g}" in text
    assert repr(found).startswith("Result(max_iter, 12 outer steps, 36 steps, val loss ")
