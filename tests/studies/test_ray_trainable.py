"""The trainable of Ray Tune: exact checkpoints, exploits, resets and failures; no Ray runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import registry, tasks
from bilevel import Choice, Descent, Float, Int, Space
from bilevel.checkpoint import load
from hypergrad import Unrolled

ray = pytest.importorskip("ray")

from studies.ray import Within, as_trainable, bounds, mutations, policy_schedules  # noqa: E402

pytestmark = [pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("default")]
NETWORK = registry.get("network")
TASK = tasks.get("digits", noise=0.2, n_train=100)
TUNED = NETWORK.space.own(lr="sampler", momentum="grad").fix(
    width=16, depth=1, activation="relu", optimizer="sgd"
)
CONFIG = {"lr": 0.05}


@pytest.fixture(autouse=True)
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    where = "ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH"
    monkeypatch.setattr(where, str(tmp_path / "results"))


def make(**options: Any) -> Any:
    options = {"budget": 40, "steps_per_report": 2, "seed": 3, **options}
    return as_trainable(NETWORK, TASK, TUNED, Descent(Unrolled(steps=5), lr=0.1), **options)


def losses(trial: Any, count: int) -> list[float]:
    return [trial.train()["loss"] for _ in range(count)]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        keys = set(one) - {"seconds"}
        return keys == set(other) - {"seconds"} and all(same(one[k], other[k]) for k in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_break_changes_nothing(tmp_path: Path) -> None:
    kind = make()
    whole = losses(kind(dict(CONFIG)), 3)
    first = kind(dict(CONFIG))
    head = losses(first, 2)
    (tmp_path / "c").mkdir()
    first.save_checkpoint(str(tmp_path / "c"))
    second = kind(dict(CONFIG))
    second.load_checkpoint(str(tmp_path / "c"))
    assert head + losses(second, 1) == whole
    assert (tmp_path / "c" / "schedule.json").exists()


def test_exploit_copies_everything_but_what_the_sampler_owns(tmp_path: Path) -> None:
    kind = make()
    donor, other = kind({**CONFIG, "trial_number": 0}), kind({"lr": 0.2, "trial_number": 1})
    losses(donor, 2), losses(other, 1)
    (tmp_path / "c").mkdir()
    donor.save_checkpoint(str(tmp_path / "c"))
    other.load_checkpoint(str(tmp_path / "c"))
    before, after = load(tmp_path / "c" / "state.pt"), other._stored()
    constants = [s["progress"]["run"]["inner"]["run"].pop("constants") for s in (before, after)]
    assert constants[0] != constants[1]
    assert same(before, after)
    assert other._values["lr"] == pytest.approx(0.2)
    assert other.progress._inner.method.setting.constants["lr"] == pytest.approx(0.2)


def test_a_reset_leaves_nothing_behind() -> None:
    kind = make()
    fresh = losses(kind({"lr": 0.1, "trial_number": 7}), 2)
    used = kind(dict(CONFIG))
    losses(used, 2)
    assert used.reset({"lr": 0.1, "trial_number": 7})
    assert losses(used, 2) == fresh


def test_last_report_says_that_it_is_the_last() -> None:
    trial = make()(dict(CONFIG))
    reports = [trial.train() for _ in range(4)]
    assert [r["done"] for r in reports] == [r["finished"] for r in reports]
    assert [r["done"] for r in reports] == [False, False, False, True]
    assert "test/loss" in reports[-1]
    assert reports[-1]["steps"] == 40


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="steps_per_report must be at least 1"):
        make(steps_per_report=0)
    with pytest.raises(ValueError, match="algorithm: the gradient owns"):
        as_trainable(NETWORK, TASK, TUNED, budget=40)
    with pytest.raises(ValueError, match="metric must be one of"):
        make(metric="f1")


SPACE = Space(beta=Float(0.1, 0.9), n=Int(2, 8, step=2), kind=Choice("a", "b"))


def test_pbt_explores_inside_the_space() -> None:
    assert set(mutations(SPACE)) == {"beta"}
    assert mutations(SPACE, "kind")["kind"] == ["a", "b"]
    assert bounds(SPACE, "beta", "n") == {"beta": [0.1, 0.9], "n": [2, 8]}
    assert Within(SPACE)({"beta": 1.1, "n": 5, "other": 3}) == {"beta": 0.9, "n": 6, "other": 3}
    with pytest.raises(ValueError, match="not owned by the sampler"):
        mutations(SPACE, "gamma")


def test_policies_become_schedules(tmp_path: Path) -> None:
    rows = [["a", "b", 2, 2, {"x": 0.5}, {"x": 0.6}], ["a", "c", 4, 4, {"x": 0.6}, {"x": 0.48}]]
    text = "\n".join(json.dumps(row) for row in rows)
    (tmp_path / "pbt_policy_t0.txt").write_text(text)
    schedule = policy_schedules(tmp_path, steps_per_report=10)["t0"]
    assert schedule["step"].tolist() == [0, 20, 40]
    assert schedule["x"].tolist() == [0.5, 0.6, 0.48]
    assert (tmp_path / "schedule_t0.json").exists()
    (tmp_path / "pbt_policy_t1.txt").write_text("nonsense")
    with pytest.raises(ValueError, match="line 1 is no policy"):
        policy_schedules(tmp_path)
