"""What a running study shows: a line for everything that happens, and a bar on a terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from studies import Study
from studies.commands.screen import progress
from studies.events import Event, Finished, Paused, Retried, Rung, Stalled, Started
from studies.executors.config import Processes
from tests.studies.trials import Behaving, Trivial

TASK = "breast_cancer"


def study_of(folder: Path) -> Study:
    return Study("shown", Trivial, TASK, folder / "study.db")


def shown(study: Study, events: list[Event], capsys: pytest.CaptureFixture[str]) -> str:
    """What the events put on standard error; nothing else is written."""
    capsys.readouterr()
    with progress(study, 4, quiet=False) as show:
        for event in events:
            show(event)
    written = capsys.readouterr()
    assert written.out == ""
    return written.err


def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Rich take standard error for a terminal of 80 columns."""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("TTY_INTERACTIVE", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")


WAITING = [Started(2, 4, {}, False), Rung(2, 3, 10, 0.5), Paused(2, 3)]


def test_a_pause_is_a_line_with_the_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[Event] = [*WAITING, Started(2, 4, {}, True), Paused(1, 0)]
    assert shown(study_of(tmp_path), events, capsys).splitlines() == [
        "trial 2  paused    at rung 3  val loss 0.5000",
        "trial 2  goes on   from rung 3",
        "trial 1  paused    before its first rung",
    ]


def test_a_full_disk_is_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(study_of(tmp_path), [Stalled("no space left in 'x'")], capsys)
    assert text == "waiting: no space left in 'x'\n"


def test_the_bar_shows_a_pause_and_counts_its_rungs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(monkeypatch)
    text = shown(study_of(tmp_path), WAITING, capsys)
    assert "trial 2 paused at rung 3  val loss 0.5000" in text
    assert "0.3/4 trials" in text


def test_a_full_disk_stays_on_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal(monkeypatch)
    text = shown(study_of(tmp_path), [Stalled("no space left in 'x'")], capsys)
    assert "waiting: no space left in 'x'" in text


def test_a_terminal_has_a_line_of_its_width_for_each_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = Study("wide", "network", TASK, tmp_path / "study.db", space=_sampled())
    found: list[Event] = []
    study.run(1, 2, on_event=found.append)
    finished = [event for event in found if isinstance(event, Finished)]
    (whole,) = shown(study, list(finished), capsys).splitlines()
    assert len(whole) > 80
    assert whole.startswith("trial 0  COMPLETE  val loss ")
    assert "best so far  2 steps" in whole
    terminal(monkeypatch)
    assert f"{whole[:79]}…" in shown(study, list(finished), capsys)


def _sampled():  # type: ignore[no-untyped-def]
    from adapters import registry

    space = registry.get("network").space
    return space.own(**dict.fromkeys(space.grad, "sampler"))


def test_retries_of_a_real_worker_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BEHAVING_FOLDER", str(tmp_path))
    space = Behaving.space.fix(how="die once", pace=0.0, mark="none")
    study = Study("dies", Behaving, TASK, tmp_path / "study.db", space=space)
    found: list[Event] = []
    study.run(1, 10, executor=Processes(1), on_event=found.append)
    assert any(isinstance(event, Retried) for event in found)
    lines = shown(study, found, capsys).splitlines()
    assert lines[0].startswith("trial 0  retried   died: ")
    assert lines[0].endswith("; goes on from its checkpoint")
    assert lines[1] == "trial 0  goes on   from its checkpoint"
    assert lines[2].startswith("trial 0  COMPLETE  val loss ")


def test_pauses_of_a_real_bracket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from studies.runner.schedulers import Halving

    study = study_of(tmp_path)
    found: list[Event] = []
    walker = Study(
        "walks", Behaving, TASK, tmp_path / "study.db",
        space=Behaving.space.fix(how="fine", pace=0.0, mark="none"),
    )  # fmt: skip
    walker.run(3, 9, scheduler=Halving(), on_event=found.append)
    paused = [event for event in found if isinstance(event, Paused)]
    assert paused
    text = shown(study, list(paused), capsys)
    assert len(text.splitlines()) == len(paused)
    assert text.startswith("trial 0  paused    at rung ")
