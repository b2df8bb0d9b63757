"""A study that ends at a bad moment, and again: the numbers of one that did not end there."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import optuna
import pytest

from bilevel import Budget
from bilevel.metrics import Metrics
from studies import Study
from studies.events import Event, Paused, Rung, Started
from studies.runner.schedulers import Halving
from tests.studies.trials import Walker, nothing

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Gone(Exception):  # noqa: N818  (nothing is stored any more: as if the process was killed)
    """The end of a coordinator."""


class Pressed(Walker):
    """Presses Ctrl-C after a step."""

    after: ClassVar[int | None] = None

    def step(self) -> Metrics:
        """Walk."""
        found = super().step()
        if self.steps == self.after:
            os.kill(os.getpid(), signal.SIGINT)
        return found


def study(folder: Path, seed: int = 1, learner: type[Walker] = Walker, **options: Any) -> Study:
    space = Walker.space.fix(pace=0.0)
    return Study("w", learner, nothing(), folder / "w.db", space=space, sampler="random",
                 seed=seed, **options)  # fmt: skip


def gone_at(number: int, rung: int) -> Callable[[Event], None]:
    def on_event(event: Event) -> None:
        if isinstance(event, Rung) and (event.number, event.rung) == (number, rung):
            raise Gone

    return on_event


def numbers(found: Study) -> list[Any]:
    return [
        (r.number, r.state, r.status, r.value, r.at, r.cost.steps, dict(r.metrics), dict(r.rungs))
        for r in found.trials
    ]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    return tmp_path / "whole", tmp_path / "broken"


@pytest.mark.parametrize("seed", range(5))
def test_ctrl_c_between_two_rungs(
    seed: int, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(folders[0], seed).run(1, 20, rungs=2)
    monkeypatch.setattr(Pressed, "name", Walker.name)
    monkeypatch.setattr(Pressed, "after", 14)
    with pytest.raises(KeyboardInterrupt):
        study(folders[1], seed, Pressed).run(1, 20, rungs=2)
    monkeypatch.setattr(Pressed, "after", None)
    assert numbers(study(folders[1], seed, Pressed).run(1, 20, rungs=2)) == numbers(whole)


def test_a_checkpoint_older_than_the_level_of_a_bracket(folders: tuple[Path, Path]) -> None:
    options: dict[str, Any] = {"rungs": 9, "scheduler": Halving(most=3), "checkpoint_seconds": 1e9}
    whole = study(folders[0]).run(3, 90, **options)
    for number in range(3):
        folder = folders[1] / str(number)
        folder.mkdir()
        with pytest.raises(Gone):
            study(folder).run(3, 90, on_event=gone_at(number, 3), **options)
        assert numbers(study(folder).run(3, 90, **options)) == numbers(whole)


def test_a_checkpoint_older_than_the_rung_at_which_a_pruner_objected(
    folders: tuple[Path, Path],
) -> None:
    def pruned(folder: Path) -> Study:
        return study(folder, pruner=optuna.pruners.MedianPruner(n_startup_trials=1))

    options: dict[str, Any] = {"rungs": 9, "checkpoint_seconds": 1e9}
    whole = pruned(folders[0]).run(4, 90, **options)
    record = next(r for r in whole.trials if r.state == "pruned")
    with pytest.raises(Gone):
        pruned(folders[1]).run(4, 90, on_event=gone_at(record.number, max(record.rungs)), **options)
    assert numbers(pruned(folders[1]).run(4, 90, **options)) == numbers(whole)


def test_a_new_database_does_not_go_on_from_checkpoints_of_an_old_one(
    folders: tuple[Path, Path],
) -> None:
    whole = study(folders[0], seed=2).run(3, 20)
    study(folders[1], seed=1).run(3, 20)
    for file in folders[1].glob("w.db*"):
        file.unlink()
    assert numbers(study(folders[1], seed=2).run(3, 20)) == numbers(whole)


def test_a_total_counts_what_a_paused_trial_has_cost_before_it_reports_again(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"rungs": 1, "scheduler": Halving(most=9)}
    paused = []

    def gone_when_three_wait(event: Event) -> None:
        if isinstance(event, Paused):
            paused.append(event)
            if len(paused) == 3:
                raise Gone

    with pytest.raises(Gone):
        study(tmp_path).run(27, 90, on_event=gone_when_three_wait, **options)
    found = study(tmp_path)
    assert sum(record.cost.steps for record in found.trials) == 30
    started: list[Started] = []

    def note(event: Event) -> None:
        if isinstance(event, Started):
            started.append(event)

    found.run(27, 90, total=Budget(steps=30), on_event=note, workers=2, **options)
    assert all(event.resumed for event in started)
    assert len(found.trials) == 3


def test_several_workers_share_a_total(tmp_path: Path) -> None:
    space = Walker.space.fix(pace=0.02)
    found = Study("w", Walker, nothing(), tmp_path / "w.db", space=space, sampler="random")
    found.run(20, 20, rungs=4, workers=3, total=Budget(steps=30))
    assert sum(record.cost.steps for record in found.trials) <= 30
