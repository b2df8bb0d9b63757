"""What a person sees of `bilevel tune`: progress, and the sentences under the table."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from adapters import registry
from bilevel import Cost
from studies.commands import job
from studies.commands.listing import show_table
from studies.compare import Comparison, Row, Way, ways
from studies.events import Finished, Rung, Started
from studies.record import Failure, TrialRecord
from studies.runner.schedulers import Halving

PLAN = ways(registry.get("network").space, 3000, 8)


def record(number: int, loss: float, **options: Any) -> TrialRecord:
    metrics = {"val/loss": loss, "val/accuracy": 0.9, "test/loss": loss + 0.1, "test/accuracy": 0.8}
    return TrialRecord(number, "complete", values=(loss,), metrics=metrics, **options)


def comparison(plan: list[Way], losses: dict[str, list[float]]) -> Comparison:
    rows = tuple(
        Row(way, tuple(record(k, loss) for k, loss in enumerate(losses[way.name])), (1, 1), (1, 1))
        for way in plan
    )
    return Comparison("digits", {"noise": 0.3}, "network", (0, 1), 3000, rows, {})


def test_searches_and_gradient_choose_the_same_hyperparameters() -> None:
    by_name = {way.name: way for way in PLAN}
    smooth = set(by_name["gradient"].space.grad)
    assert len(smooth) >= 8
    for name in ("random", "tpe"):
        space = by_name[name].space
        assert set(space.sampled) == smooth
        assert not space.grad
    assert set(by_name["hybrid"].space.sampled).isdisjoint(smooth)
    assert set(by_name["hybrid"].space.grad) == smooth
    assert not {*by_name["default"].space.sampled, *by_name["default"].space.grad}
    for way in PLAN[1:5]:
        assert way.trials * (way.budget.equivalent_steps or 0) == way.cost == 3000


@pytest.mark.parametrize(("trials", "run"), [(2, 3), (7, 3), (8, 9), (20, 18), (26, 27)])
def test_the_hybrid_costs_as_much_as_a_search(trials: int, run: int) -> None:
    hybrid = ways(registry.get("network").space, 9000, trials)[-1]
    assert (hybrid.trials, hybrid.cost, hybrid.halved) == (run, 9000, True)
    ladder = Halving().ladder(run, 10)
    left, before, shares = ladder.width, 0.0, 0.0
    for level in (*(ladder.rungs[number - 1] for number in ladder.levels), 1.0):
        shares += left * (level - before)
        left, before = left // 3, level
    each = hybrid.budget.equivalent_steps or 0
    assert each * shares * run / ladder.width == pytest.approx(9000, rel=0.01)


def test_without_discrete_hyperparameters_there_is_no_hybrid() -> None:
    space = registry.get("network").space
    plan = ways(space.fix(**{n: space[n].default_value for n in space.sampled}), 3000, 8)
    assert [way.name for way in plan][-1] == "gradient"
    found = comparison(plan, {way.name: [1.0, 2.0] for way in plan})
    assert "hybrid" not in found.explain() + job._conclusion(found)


def test_conclusion_counts_seeds() -> None:
    losses = {way.name: [0.5, 0.5] for way in PLAN}
    losses |= {"gradient": [0.3, 0.6], "hybrid": [0.4, 0.2], "tpe": [0.4, 0.4]}
    lines = job._conclusion(comparison(PLAN, losses)).splitlines()
    assert "gradient-tuned: test loss +0.050 against TPE (Optuna), lower on 1 of 2 seeds." in lines
    assert any(line.startswith("hybrid") and "lower on 1 of 2 seeds" in line for line in lines)


@pytest.mark.parametrize("width", [job.NARROW, job.WIDE, 140])
def test_the_table_fits_the_screen(width: int) -> None:
    found = comparison(PLAN, {way.name: [0.25, 0.75] for way in PLAN})
    written = io.StringIO()
    Console(file=written, width=width).print(job.comparison_table(found, width))
    lines = written.getvalue().splitlines()
    for way in PLAN:
        (line,) = [line for line in lines if line.startswith(f" {way.title}  ")]
        assert "0.500 ± 0.354" in line
        assert ("0.900 ± 0.000" in line) == (width >= job.WIDE)
    assert not any("…" in line for line in lines)


def test_studies_are_shown_with_failures_and_without_results() -> None:
    study = {"study": "a / b", "trials": 3, "complete": 0, "failed": 2, "equivalent_steps": 7,
             "best": None, "front": []}  # fmt: skip
    written = io.StringIO()
    Console(file=written, width=80).print(show_table([study]))
    assert "a / b  0/3 (2 failed)     7     -      -          -" in written.getvalue()


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    written = io.StringIO()
    terminal = Console(file=written, force_terminal=True, width=120, legacy_windows=False)
    monkeypatch.setattr(job, "Console", lambda **_: terminal)
    return written


def test_the_bar_stands_where_the_job_is(screen: io.StringIO) -> None:
    with job._progress(False, range(2), PLAN) as show:
        show("tpe", 1, Started(4, 8, {}, True))  # resumed: nothing was said about what came before
        show("tpe", 1, Rung(4, 5, 10, 0.4321))
    last = re.findall(r"seed 1  TPE \(Optuna\)  trial 5/8  val 0\.432.*?(\d+) %", screen.getvalue())
    each = [way.cost for way in PLAN]
    done = sum(each) + sum(each[:3]) + 4.5 * each[3] / 8
    assert int(last[-1]) == round(100 * done / (2 * sum(each)))


def test_the_bar_ends_at_the_end(screen: io.StringIO) -> None:
    with job._progress(False, range(2), PLAN) as show:
        for number in range(9):
            show("hybrid", 1, Rung(number, 1, 11, 0.2))
            show("hybrid", 1, Finished(record(number, 0.2, cost=Cost(gradients=334)), True))
    assert "100 %" in screen.getvalue()


def test_lines_elsewhere_name_failures(capsys: pytest.CaptureFixture[str]) -> None:
    failure = Failure("diverged", "the training loss is not finite at step 3")
    failed = TrialRecord(2, "failed", failure=failure, cost=Cost(seconds=1.5))
    with job._progress(False, range(1), PLAN) as show:
        show("random", 0, Started(2, 8, {}, False))
        show("random", 0, Finished(failed, False))
    written = capsys.readouterr()
    assert written.out == ""
    assert "trial 2  failed  diverged: the training loss is not finite at step 3" in written.err
    with job._progress(True, range(1), PLAN) as quiet:
        quiet("random", 0, Finished(failed, False))
    assert capsys.readouterr().err == ""
