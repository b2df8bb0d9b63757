"""A resumed run and the uninterrupted one: the same numbers, bit for bit."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import registry, tasks
from bilevel import Callback, Descent, EarlyStopping, Grad, Result, RunStatus, Space, tune
from bilevel.checkpoint import load, save
from hypergrad import CG, SGD, Hyper, Implicit, Unrolled
from tests.bilevel.problems import RIDGE, TRAIN, ridge_options

ROOT = Path(__file__).parents[2]
RULE = SGD(lr=0.05, momentum=0.9)


def interruptible() -> None:
    """In a child: take SIGINT, which a process started in the background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def batch(t: int) -> tuple[Tensor, Tensor]:
    """A random minibatch: resuming must restore the global generator."""
    rows = torch.randint(0, len(TRAIN[0]), (6,))
    return TRAIN[0][rows], TRAIN[1][rows]


def run(budget: int, algorithm: Any = None, **options: Any) -> Result:
    algorithm = algorithm or Descent(Implicit(CG(max_iter=5)), inner_steps=2)
    options = {"optimizer": RULE, "seed": 3, "evaluate_every": 2, **options}
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
    whole = run(40, algorithm, callbacks=[Callback()])
    with pytest.raises(KeyboardInterrupt):
        run(40, algorithm, callbacks=[Interrupt(at)], checkpoint=path, checkpoint_every=100)
    resumed = run(40, algorithm, callbacks=[Callback()], resume=path)
    assert len(whole.trace) == 20
    assert numbers(resumed) == numbers(whole)


def test_a_longer_budget_goes_on() -> None:
    assert numbers(run(20).resume(40)) == numbers(run(40))


def test_a_saved_result_goes_on(tmp_path: Path) -> None:
    saved = Result.load(run(20).save(tmp_path))
    with pytest.raises(ValueError, match="pass the subject"):
        saved.resume(40)
    assert numbers(run(40, resume=saved)) == numbers(run(40))


def test_early_stopping_decides_alike_after_a_resume(tmp_path: Path) -> None:
    def go(**options: Any) -> Result:
        return run(400, callbacks=[EarlyStopping(4), *options.pop("more", [])], **options)

    whole = go(more=[Callback()])
    path = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        go(more=[Interrupt(len(whole.trace) - 2)], checkpoint=path)
    again = go(more=[Callback()], resume=path)
    assert whole.status is again.status is RunStatus.EARLY_STOPPED
    assert numbers(again) == numbers(whole)


def test_a_learner_goes_on(tmp_path: Path) -> None:
    def go(budget: int, **options: Any) -> Result:
        learner = registry.get("network")()
        learner.setup(tasks.get("digits", n_train=100), {"width": 16}, seed=1)
        return tune(learner, Descent(Unrolled(steps=3)), budget, **options)  # type: ignore[arg-type]

    path = tmp_path / "run.pt"
    go(12, checkpoint=path)
    whole, resumed = go(30), go(30, resume=path)
    assert [row["outer_loss"] for row in whole.trace] == [r["outer_loss"] for r in resumed.trace]
    assert whole.test == resumed.test


def test_other_settings_are_refused_and_listed(tmp_path: Path) -> None:
    path = tmp_path / "run.pt"
    run(10, checkpoint=path)
    other = Descent(Implicit(CG(max_iter=5)), inner_steps=2, lr=0.7)
    with pytest.raises(ValueError, match=r"algorithm\.lr: 0\.05 before, 0\.7 now"):
        run(20, other, resume=path)
    space = Space(penalty=Grad(1.0, low=1e-4, high=5.0, scale="log"))
    with pytest.raises(ValueError, match="penalty: high"):
        tune(RIDGE, ALGORITHMS["implicit"], 20, optimizer=RULE, resume=path,
             **ridge_options(space=space))  # fmt: skip
    with pytest.raises(ValueError, match="0 callbacks, but now there are 1"):
        run(20, callbacks=[Callback()], resume=path)


def test_a_failed_write_keeps_the_earlier_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save(path, {"step": 1})
    with pytest.raises(TypeError, match=r"checkpoint\['step'\] is a builtins.set"):
        save(path, {"step": {1, 2}})
    assert load(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


SCRIPT = """
import sys, time
from tests.bilevel.test_resume import run, Callback
class Slow(Callback):
    def on_outer_step(self, run):
        print(run.outer_steps, flush=True)
        time.sleep(0.05)
run(400, callbacks=[Slow()], checkpoint=sys.argv[1], checkpoint_every=3)
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
    assert done >= 6
    resumed = run(60, callbacks=[Callback()], resume=path)
    assert numbers(resumed) == numbers(run(60, callbacks=[Callback()]))


def test_tuned_optimizer_state_is_kept() -> None:
    """Momentum of the inner optimizer continues across outer steps."""
    algorithm = Descent(Unrolled(SGD(lr=Hyper("rate"), momentum=0.9), steps=3), lr=0.0)
    space = Space(penalty=Grad(1.0, low=1e-4), rate=Grad(0.05, low=1e-4, high=1.0))
    options = ridge_options(space=space)
    tuned = tune(RIDGE, algorithm, 12, **options)
    plain = tune(RIDGE, Descent(Implicit(), inner_steps=12, lr=0.0), 12,
                 optimizer=SGD(lr=0.05, momentum=0.9), **ridge_options())  # fmt: skip
    assert torch.allclose(tuned.params["w"], plain.params["w"], rtol=1e-6)
