"""Successive halving: brute force on small brackets, and whole studies with pause and resume."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters import tasks
from benchmarks.studies.ridge import Closed, regression, ridge
from bilevel import Budget, Choice, Descent, Float, Grad, Int, Space
from studies import MismatchError, Study
from studies.events import Event, Paused, Started
from studies.runner.schedulers import Fifo, Halving, Member, Verdict
from studies.sampling.spaces import combinations, distance, points, sampled_space
from tests.studies.test_study import SMALL, numbers, study
from tests.studies.trials import Trivial

optuna.logging.set_verbosity(optuna.logging.WARNING)
TASK = tasks.get("digits", n_train=100)


def test_a_ladder_has_equal_rungs_and_levels_in_powers_of_eta() -> None:
    ladder = Halving(eta=3).ladder(trials=100, rungs=10)
    assert ladder.width == 9
    assert [ladder.rungs[level - 1] for level in ladder.levels] == [1 / 9, 1 / 3]
    assert set(ladder.rungs) >= {(i + 1) / 10 for i in range(10)}
    assert list(ladder.rungs) == sorted(ladder.rungs)
    assert Halving().ladder(2, 4).levels == ()
    assert Fifo().ladder(5, 4).rungs == (0.25, 0.5, 0.75, 1.0)


@given(
    losses=st.lists(st.floats(-5, 5), min_size=3, max_size=12, unique=True),
    failed=st.sets(st.integers(0, 11)),
)
def test_the_best_share_goes_on(losses: list[float], failed: set[int]) -> None:
    members = [
        Member(i, "failed" if i in failed else "running", "gradient", None,
               {} if i in failed else {2: loss})
        for i, loss in enumerate(losses)
    ]  # fmt: skip
    alive = sorted((loss, i) for i, loss in enumerate(losses) if i not in failed)
    kept = {i for _, i in alive[: max(1, math.ceil(len(losses) / 3))]}
    for _, number in alive:
        verdict = Halving().verdict(number, members, True, [2, 5])
        assert verdict is (Verdict.GO if number in kept else Verdict.PRUNE)
        assert Halving().verdict(number, members, False, [2, 5]) is Verdict.WAIT


def test_nobody_is_judged_before_the_last_has_come() -> None:
    members = [
        Member(i, "running", "gradient", None, {2: float(i)} if i else {1: 9.0}) for i in range(3)
    ]
    assert Halving().verdict(1, members, True, [2]) is Verdict.WAIT
    assert Halving().verdict(0, members, True, [2]) is Verdict.GO  # it has not come to the level


def test_the_kind_that_wins_gets_the_next_bracket() -> None:
    def bracket(gradient: float, sampler: float, settled: bool = False) -> list[Member]:
        return [
            Member(0, "complete", "gradient", gradient, {}, settled=settled),
            Member(1, "complete", "sampler", sampler, {}),
        ]

    rule = Halving()
    mixed = ["gradient"] * 3 + ["both", "sampler"]
    assert rule.kinds(5, []) == mixed
    assert rule.kinds(5, [bracket(1.0, 2.0)]) == mixed
    assert rule.kinds(9, [], 1) == ["gradient"] * 5 + ["both"] * 3 + ["sampler"]
    assert rule.kinds(9, [], 7) == ["gradient"] * 7 + ["both", "sampler"]
    assert rule.kinds(9, [], 9) == ["gradient"] * 8 + ["sampler"]
    assert rule.kinds(3, []) == ["gradient"] * 3
    assert rule.kinds(5, [bracket(2.0, 1.0)]) == ["gradient"] + ["sampler"] * 4
    assert rule.kinds(5, [bracket(1.0, 2.0, settled=True)]) == ["sampler"] * 5
    assert Halving(mix=False).kinds(5, [bracket(2.0, 1.0)]) == ["gradient"] * 5


@pytest.mark.parametrize("options", [{"eta": 1}, {"most": 0}])
def test_bad_halving(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Halving(**options)


def test_small_spaces_are_enumerated() -> None:
    space = Space(a=Choice("x", "y"), n=Int(1, 5, step=2), g=Grad(0.1, low=0.01, high=1.0))
    assert combinations(space) == 6
    every = points(space, seed=0)
    assert len({tuple(sorted(p.items())) for p in every}) == 6
    assert every != points(space, seed=1)
    assert combinations(Space(x=Float(0.0, 1.0))) is None


def test_a_tensor_is_sampled_element_by_element_or_shared() -> None:
    space = Space(
        few=Grad(0.1, low=0.01, high=1.0, shape=(3,)),
        many=Grad(0.1, low=0.01, high=1.0, shape=(1000,)),
    )
    assert sorted(sampled_space(space).to_optuna()) == ["few[0]", "few[1]", "few[2]", "many"]


def test_distance_counts_shares_of_the_range() -> None:
    space = Space(a=Choice("x", "y"), lr=Float(1e-4, 1.0, log=True))
    assert distance(space, {"a": "x", "lr": 1e-4}, {"a": "x", "lr": 1.0}) == pytest.approx(0.5)
    assert distance(space, {"a": "x", "lr": 0.1}, {"a": "y", "lr": 0.1}) == pytest.approx(0.5)


def test_a_study_pauses_resumes_and_prunes(tmp_path: Path) -> None:
    events: list[Event] = []
    found = study(tmp_path).run(7, 40, on_event=events.append)
    paused = {e.number for e in events if isinstance(e, Paused)}
    resumed = {e.number for e in events if isinstance(e, Started) and e.resumed}
    assert paused
    assert resumed <= paused
    assert {r.state for r in found.trials} == {"complete", "pruned"}
    assert len({(r.params["activation"], r.params["optimizer"]) for r in found.trials}) == 6
    assert [r.by for r in found.trials] == ["gradient"] * 6 + ["sampler"]
    assert found.trained().evaluate("val")["loss"] == pytest.approx(found.best.value)


def test_a_paused_trial_ends_as_one_that_never_paused(tmp_path: Path) -> None:
    halved = study(tmp_path / "a").run(7, 40)
    straight = study(tmp_path / "b")
    for record in halved.trials[:6]:
        straight.enqueue(record.params)
    straight.run(6, 40, scheduler="fifo", warm=False)
    complete = [r for r in halved.trials[:6] if r.state == "complete"]
    assert complete
    for record in complete:
        other = straight.trials[record.number]
        assert record.params == other.params
        assert record.value == other.value
        assert record.hparams == other.hparams


def test_more_trials_go_on_where_fewer_ended(tmp_path: Path) -> None:
    parts = study(tmp_path / "a")
    parts.run(7, 40)
    parts.run(9, 40)
    assert len(study(tmp_path / "a").run(9, 40).trials) == 9
    with pytest.raises(MismatchError, match="scheduler"):
        study(tmp_path / "a").run(10, 40, scheduler="fifo")
    assert numbers(parts)[:7] == numbers(study(tmp_path / "b").run(7, 40))


def test_a_later_trial_starts_from_the_nearest(tmp_path: Path) -> None:
    found = study(tmp_path, sampler="random").run(4, 30, scheduler="fifo")
    first, second = found.trials[:2]
    assert second.start == first.number
    schedule = found.schedule(1)
    assert schedule is not None
    assert schedule["lr"][0] == pytest.approx(first.hparams["lr"])
    cold = study(tmp_path / "c", sampler="random").run(2, 30, scheduler="fifo", warm=False)
    assert cold.trials[1].start is None


def test_wrong_hypergradients_are_given_up(tmp_path: Path) -> None:
    kind, data = ridge(3), regression(21, 0)
    found = Study("m", kind, data, tmp_path / "m.db", algorithm=Descent(Closed(-1.0), lr=0.5))
    found.run(40, Budget(equivalent_steps=60), total=Budget(equivalent_steps=60))
    assert [r.by for r in found.trials][:2] == ["gradient", "sampler"]
    assert found.trials[0].status == "early_stopped"
    assert found.best.by == "sampler"
    assert sum(r.cost.equivalent_steps for r in found.trials) <= 62


def test_total_ends_a_study(tmp_path: Path) -> None:
    found = Study("t", Trivial, TASK, tmp_path / "t.db", sampler="random")
    found.run(50, 1, total=Budget(steps=7))
    assert len(found.trials) == 7
    assert len(found.run(50, 1, total=Budget(steps=9)).trials) == 9


def test_two_objectives(tmp_path: Path) -> None:
    found = Study("o", Trivial, TASK, tmp_path / "o.db", sampler="random",
                  metric=("loss", "size"), direction=("minimize", "maximize"))  # fmt: skip
    found.run(12, 1)
    values = [r.values for r in found.trials]
    front = {r.values for r in found.front}
    for one in values:
        dominated = any(o[0] <= one[0] and o[1] >= one[1] and o != one for o in values)
        assert (one in front) == (not dominated)
    with pytest.raises(ValueError, match="use `front`"):
        _ = found.best
    with pytest.raises(ValueError, match="halving ranks by one metric"):
        found.run(13, 1, scheduler="halving")
    with pytest.raises(ValueError, match="2 metrics"):
        Study("p", Trivial, TASK, tmp_path / "p.db", metric=("loss", "size"),
              direction=["minimize"])  # fmt: skip


def test_constraints_decide_who_can_be_best(tmp_path: Path) -> None:
    options: dict[str, Any] = {"sampler": "random", "direction": "maximize"}
    found = Study("c", Trivial, TASK, tmp_path / "c.db", constraints={"size": 0.5}, **options)
    found.run(15, 1)
    assert found.best.feasible
    assert found.best.value == max(r.value or 0.0 for r in found.trials if r.feasible)
    assert any(not r.feasible for r in found.trials)
    none = Study("n", Trivial, TASK, tmp_path / "n.db", constraints={"size": -1.0}, **options)
    with pytest.raises(ValueError, match="no complete trial within the constraints"):
        _ = none.run(2, 1).best
    with pytest.raises(ValueError, match="constraints must be one of"):
        Study("w", Trivial, TASK, tmp_path / "w.db", constraints={"weight": 1.0}).run(1, 1)


def test_what_is_known_from_elsewhere_is_learned(tmp_path: Path) -> None:
    earlier = Study("e", Trivial, TASK, tmp_path / "e.db", sampler="random").run(5, 1)
    found = Study("l", Trivial, TASK, tmp_path / "l.db", sampler="tpe")
    assert found.learn(earlier) == 5
    assert found.learn(earlier) == 0
    assert found.learn([{"x": 0.25, "loss": 0.0625}], "table") == 1
    found.run(3, 1)
    own = [r for r in found.trials if not r.imported]
    assert len(own) == 3
    assert found.best.number in {r.number for r in own}
    table = tmp_path / "t.csv"
    table.write_text("x,loss\n0.5,0.25\n-0.5,0.25\n")
    assert found.learn(table) == 2
    with pytest.raises(ValueError, match=r"row 0: unknown column 'y'"):
        found.learn([{"y": 1.0, "loss": 1.0}], "bad")
    with pytest.raises(ValueError, match=r"bad, row 0: .*x"):
        found.learn([{"x": 5.0, "loss": 1.0}], "bad")
    with pytest.raises(ValueError, match="finite"):
        found.learn([{"x": 0.5, "loss": math.nan}], "bad")


def test_gradients_start_from_sampled_values(tmp_path: Path) -> None:
    """Where the points are not given: a third of a bracket, so that other minima are found."""
    space = SMALL.own(momentum="sampler")
    found = study(tmp_path, space=space).run(6, 40, rungs=4)
    assert [r.by for r in found.trials] == ["gradient"] * 3 + ["both"] * 2 + ["sampler"]
    init = study(tmp_path / "one", space=space).run(1, 40).schedule(0)
    assert init is not None
    for record in found.trials[3:5]:
        start = sampled_space(space).values_from_params(record.params)
        schedule = found.schedule(record.number)
        assert schedule is not None
        for name in space.grad:
            first = schedule.summary(name)[0, 2]  # of a tensor the median
            assert first == pytest.approx(np.median(np.asarray(start[name])), rel=1e-4, abs=1e-5)
            assert first != pytest.approx(init.summary(name)[0, 2], rel=1e-4)
            assert found.owner(record, name) == "grad"
        assert record.start is None
        assert record.cost.hvps > 0
    again = study(tmp_path, space=space)
    assert again.trained().evaluate("val")["loss"] == pytest.approx(again.best.value)


def test_ownership_of_the_sampled_kind_reaches_the_learner(tmp_path: Path) -> None:
    found = study(tmp_path).run(7, 20)
    sampled = found.trials[6]
    assert sampled.by == "sampler"
    assert set(SMALL.grad) <= {name.partition("[")[0] for name in sampled.params}
    assert sampled.cost.hvps == 0
