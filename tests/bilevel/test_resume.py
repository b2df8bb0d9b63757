"""A resumed run and the uninterrupted one: the same numbers, bit for bit."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bilevel import Callback, Descent, EarlyStopping, Grad, Result, RunStatus, Space, tune
from bilevel.checkpoint import load
from hypergrad import CG, Implicit, Unrolled
from tests.bilevel.problems import RIDGE, RULE, TRAIN, ridge_options
from tests.signals import interruptible

ROOT = Path(__file__).parents[2]


def batch(t: int) -> tuple[Tensor, Tensor]:
    """A random minibatch: resuming must restore the global generator."""
    rows = torch.randint(0, len(TRAIN[0]), (6,))
    return TRAIN[0][rows], TRAIN[1][rows]


def run(budget: int, algorithm: Any = None, **options: Any) -> Result:
    algorithm = algorithm or Descent(Implicit(CG(max_iter=5)), inner_steps=2)
    options = {"seed": 3, "evaluate_every": 2, **options}
    return tune(RIDGE, algorithm, budget, **ridge_options(inner_batch=batch), **options)


def numbers(result: Result) -> Any:
    trace = [{k: v for k, v in row.items() if k != "seconds"} for row in result.trace]
    return trace, result.test, result.val, result.schedule.columns(), result.params["w"].tolist()


class Interrupt(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_outer_step(self, run: Any) -> None:
        if run.outer_steps == self.at:
            raise KeyboardInterrupt


ALGORITHMS = {
    "implicit": Descent(Implicit(CG(max_iter=5)), inner_steps=2),
    "unrolled": Descent(Unrolled(RULE, steps=2)),
    "restart": Descent(Unrolled(RULE, steps=2), restart=True),
}


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize("at", [1, 7])
def test_interrupted_and_resumed(name: str, at: int, tmp_path: Path) -> None:
    algorithm, path = ALGORITHMS[name], tmp_path / "run.pt"
    whole = run(40, algorithm)
    with pytest.raises(KeyboardInterrupt):
        run(40, algorithm, callbacks=[Interrupt(at)], checkpoint=path)
    assert load(path)["run"]["status"] == "interrupted"
    resumed = run(40, algorithm, resume=path)
    assert len(whole.trace) == 20
    assert numbers(resumed) == numbers(whole)


def test_a_longer_budget_goes_on() -> None:
    assert numbers(run(20).resume(40)) == numbers(run(40))


def test_a_saved_result_goes_on(tmp_path: Path) -> None:
    saved = Result.load(run(20).save(tmp_path))
    with pytest.raises(ValueError, match="pass the subject"):
        saved.resume(40)
    assert numbers(run(40, resume=saved)) == numbers(run(40))


@pytest.mark.parametrize("before_the_end", [0, 1, 2])
@pytest.mark.parametrize("first", [True, False])
def test_early_stopping_decides_alike(before_the_end: int, first: bool, tmp_path: Path) -> None:
    """Whether it sees an outer step before or after the callback that is interrupted in it."""
    path, options = tmp_path / "run.pt", {"evaluate_every": 1}
    whole = run(400, callbacks=[EarlyStopping(4)], **options)
    callbacks = [EarlyStopping(4), Interrupt(len(whole.trace) - before_the_end)]
    with pytest.raises(KeyboardInterrupt):
        run(400, callbacks=callbacks[:: 1 if first else -1], checkpoint=path, **options)
    again = run(400, callbacks=[EarlyStopping(4)], resume=path, **options)
    assert whole.status is again.status is RunStatus.EARLY_STOPPED
    assert again.reason == whole.reason
    assert numbers(again) == numbers(whole)
    # A run that has ended stays so.
    assert numbers(whole.resume(800)) == numbers(whole)


class Counter(Callback):
    """Keeps a state of its own."""

    def __init__(self) -> None:
        self.count = 0

    def on_outer_step(self, run: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


def test_the_state_of_a_callback_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        run(40, callbacks=[Interrupt(7), Counter(), Callback()], checkpoint=path)
    counter = Counter()
    run(40, callbacks=[counter], resume=path)
    assert counter.count == 20


class Fail(Callback):
    def on_outer_step(self, run: Any) -> None:
        if run.outer_steps == 7:
            raise RuntimeError("a bug")


def test_an_error_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    with pytest.raises(RuntimeError, match="a bug"):
        run(40, callbacks=[Fail()], checkpoint=path)
    assert len(load(path)["run"]["trace"]) == 7
    assert numbers(run(40, resume=path)) == numbers(run(40))


def test_an_interrupt_inside_a_step_goes_back_to_the_last_whole_one(tmp_path: Path) -> None:
    path, calls = tmp_path / "run.pt", [0]

    def interrupted(t: int) -> tuple[Tensor, Tensor]:
        calls[0] += 1
        if calls[0] == 14:
            raise KeyboardInterrupt
        return batch(t)

    options = ridge_options(inner_batch=interrupted)
    with pytest.raises(KeyboardInterrupt):
        tune(
            RIDGE, ALGORITHMS["implicit"], 40, seed=3, evaluate_every=2, checkpoint=path, **options
        )
    assert len(load(path)["run"]["trace"]) == 4
    assert numbers(run(40, resume=path)) == numbers(run(40))


def test_a_retreat_goes_on_alike(tmp_path: Path) -> None:
    """The step after the interrupt is one that diverges, and is tried again."""

    def fragile(t: int) -> tuple[Tensor, Tensor]:
        if t == 16 and not broken:
            broken.append(t)
            return TRAIN[0], TRAIN[1] * math.nan
        return batch(t)

    def go(**options: Any) -> Result:
        broken.clear()
        options |= ridge_options(inner_batch=fragile)
        return tune(RIDGE, ALGORITHMS["implicit"], 40, seed=3, evaluate_every=2, **options)

    broken: list[int] = []
    whole = go()
    assert whole.trace[5]["retreats"] == 1
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        go(callbacks=[Interrupt(5)], checkpoint=path)
    assert numbers(go(resume=path)) == numbers(whole)


def test_a_learner_goes_on(tmp_path: Path) -> None:
    from adapters import registry, tasks

    def go(budget: int, **options: Any) -> Result:
        learner = registry.get("network")()
        learner.setup(tasks.get("digits", n_train=100), {"width": 16}, seed=1)
        return tune(learner, Descent(Unrolled(steps=3)), budget, **options)  # type: ignore[arg-type]

    path = tmp_path / "run.pt"
    go(12, checkpoint=path)
    whole, resumed = go(30), go(30, resume=path)
    assert [row["outer_loss"] for row in whole.trace] == [r["outer_loss"] for r in resumed.trace]
    assert whole.test == resumed.test


def test_every_outer_step_may_be_stored(tmp_path: Path) -> None:
    class Look(Callback):
        def on_outer_step(self, run: Any) -> None:
            if run.outer_steps > 1:
                stored = load(path)["run"]
                assert len(stored["trace"]) == stored["outer_steps"] == run.outer_steps - 1

    path = tmp_path / "run.pt"
    run(12, callbacks=[Look()], checkpoint=path, checkpoint_every=0)
    assert load(path)["run"]["status"] == "max_iter"


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(10, checkpoint=path)
    other = Descent(Implicit(CG(max_iter=5)), inner_steps=2, lr=0.7)
    with pytest.raises(ValueError, match=r"algorithm\.lr: 0\.05 before, 0\.7 now"):
        run(20, other, resume=path)
    space = Space(penalty=Grad(1.0, low=1e-4, high=5.0, scale="log"))
    with pytest.raises(ValueError, match="penalty: high"):
        tune(RIDGE, ALGORITHMS["implicit"], 20, resume=path, **ridge_options(space=space))
    with pytest.raises(ValueError, match=r"callbacks: \[\] before, \['Counter'\] now"):
        run(20, callbacks=[Counter()], resume=path)


SCRIPT = """
import sys, time
from tests.bilevel.test_resume import run, Callback
class Slow(Callback):
    def on_outer_step(self, run):
        print(run.outer_steps, flush=True)
        time.sleep(0.05)
run(400, callbacks=[Slow()], checkpoint=sys.argv[1], checkpoint_every=0.1)
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_real_signals_leave_a_valid_checkpoint(kill: signal.Signals, tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT,
        preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 8:
            break
    process.send_signal(kill)
    process.stdout.close()
    assert process.wait(timeout=60) != 0
    done = len(load(path)["run"]["trace"])
    assert done >= 3
    assert numbers(run(60, resume=path)) == numbers(run(60))
