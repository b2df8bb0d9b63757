"""Studies: owners, storage, failures, and exact resume."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
from torch import Tensor, nn

from adapters import Method, Trainer, registry, tasks
from bilevel import Choice, Descent, Float, Grad, Int, Space
from hypergrad import Unrolled
from studies import Finished, MismatchError, Study
from tests.signals import interruptible

ROOT = Path(__file__).parents[2]
NETWORK = registry.get("network")
ALGORITHM = Descent(Unrolled(steps=5), lr=0.1)
TASK = tasks.get("digits", noise=0.2, n_train=100)
SMALL = NETWORK.space.own(lr="grad", momentum="grad").fix(width=16, depth=1)

optuna.logging.set_verbosity(optuna.logging.WARNING)


def study(folder: Path, name: str = "s", **options: Any) -> Study:
    options = {"space": SMALL, "algorithm": ALGORITHM, "seed": 5, **options}
    folder.mkdir(exist_ok=True)
    return Study(name, NETWORK, TASK, folder / "x.db", **options)


def numbers(found: Study) -> Any:
    return [
        (r.number, r.state, r.value, r.params, r.hparams, r.metrics, r.rungs, r.seed)
        for r in found.trials
    ]


def test_both_owners_in_one_study(tmp_path: Path) -> None:
    found = study(tmp_path).run(3, 40, scheduler="fifo")
    assert [r.state for r in found.trials] == ["complete"] * 3
    assert set(found.trials[0].params) == {"activation", "optimizer"}
    for record in found.trials:
        assert record.hparams["lr"] != SMALL["lr"].default_value  # moved by its hypergradient
        assert record.hparams["weight_decay"]["shape"] == [16 * 64 + 160]
        assert record.cost.steps == 40
        assert len(record.rungs) == 8  # one for each outer step
        assert record.value == min(record.rungs.values())
        assert {"test/loss", "val/accuracy", "g/norm_first", "g/norm_last"} <= set(record.metrics)
    schedule = found.schedule()
    assert schedule is not None
    assert schedule["lr"].shape == (9,)
    assert found.best.value == min(r.value for r in found.trials)


def test_a_study_keeps_its_folder_and_may_move_with_it(tmp_path: Path) -> None:
    study(tmp_path / "a").run(1, 20)
    with pytest.raises(MismatchError, match=r"folder: 'x-files' before, '\.\./other' now"):
        Study("s", NETWORK, TASK, tmp_path / "a" / "x.db", space=SMALL, algorithm=ALGORITHM,
              seed=5, folder=tmp_path / "other")  # fmt: skip
    (tmp_path / "a").rename(tmp_path / "b")
    assert len(study(tmp_path / "b").run(2, 20).trials) == 2


def test_stock_optuna_reads_it(tmp_path: Path) -> None:
    found = study(tmp_path).run(2, 20)
    plain = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path / 'x.db'}")
    assert plain.best_value == found.best.value
    trial = plain.best_trial
    assert trial.user_attrs["cost"]["steps"] == 20
    names = {
        a.filename for a in optuna.artifacts.get_all_artifact_meta(trial, storage=plain._storage)
    }
    assert {"schedule.json", "trace.json"} <= names
    assert json.loads(found.artifact("trace.json") or "")[0]["outer_step"] == 1


def test_plain_training_where_the_gradient_owns_nothing(tmp_path: Path) -> None:
    space = SMALL.own(**dict.fromkeys(SMALL.grad, "sampler"))
    found = study(tmp_path, space=space, algorithm=None, sampler="random").run(4, 30)
    assert all(r.cost.gradients == 30 for r in found.trials)
    assert len({r.params["lr"] for r in found.trials}) == 4
    assert found.schedule() is None


def test_pruned_at_a_rung(tmp_path: Path) -> None:
    class Strict(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number == 1 and len(trial.intermediate_values) == 3

    found = study(tmp_path, pruner=Strict()).run(2, 50)
    assert [r.state for r in found.trials] == ["complete", "pruned"]
    assert found.trials[1].cost.steps == 15


def test_trials_is_a_total_and_continuing_repeats_no_point(tmp_path: Path) -> None:
    space = SMALL.own(**dict.fromkeys(SMALL.grad, "sampler"))
    options: dict[str, Any] = {"space": space, "algorithm": None, "sampler": "random"}
    study(tmp_path, "parts", **options).run(2, 10)
    parts = study(tmp_path, "parts", **options).run(4, 10)
    whole = study(tmp_path, "whole", **options).run(4, 10)
    assert numbers(parts) == numbers(whole)
    assert len({r.params["lr"] for r in parts.trials}) == 4
    assert numbers(parts.run(3, 10)) == numbers(whole)


class Failing(Method):
    """Fails in the way that its hyperparameter says."""

    name = "failing"
    space = Space(how=Choice("nan", "raise", "fine"), lr=Float(0.01, 1.0, default=0.1))

    def loss(self, model: nn.Module, hparams: Mapping[str, Any], batch: Any) -> Tensor:
        if hparams["how"] == "raise":
            raise RuntimeError("out of luck")
        factor = math.nan if hparams["how"] == "nan" else 1.0
        return super().loss(model, hparams, batch) * factor


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_failed_trial_has_its_reason_and_the_study_goes_on(tmp_path: Path) -> None:
    found = Study("f", Trainer.of(Failing), TASK, tmp_path / "x.db", sampler="bruteforce",
                  space=Failing.space.fix(lr=0.1))  # fmt: skip
    found.run(3, 5)
    by_how = {r.params["how"]: r for r in found.trials}
    assert by_how["fine"].state == "complete"
    assert str(by_how["nan"].failure).startswith("diverged: the training loss is not finite")
    assert str(by_how["raise"].failure) == "exception: RuntimeError: out of luck"


def test_another_space_or_seed_is_refused_with_a_diff(tmp_path: Path) -> None:
    study(tmp_path).run(1, 10)
    with pytest.raises(MismatchError, match=r"width: .*16.*32"):
        study(tmp_path, space=SMALL.fix(width=32))
    with pytest.raises(MismatchError, match="seed: 5 before, 6 now"):
        study(tmp_path, seed=6)
    with pytest.raises(MismatchError, match="budget"):
        study(tmp_path).run(2, 20)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learner": "netwrok"}, "unknown learner 'netwrok'"),
        ({"task": "digit"}, "unknown task 'digit'"),
        ({"algorithm": None}, "algorithm: the gradient owns"),
        ({"sampler": "best"}, "sampler must be one of"),
        ({"pruner": "best"}, "pruner must be one of"),
        ({"sampler": "bruteforce"}, r"brute force goes through all values, but \['lr'"),
        ({"direction": "up"}, "direction must be"),
        ({"name": " "}, "name must be a text"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"name": "s", "learner": "network", "task": TASK, "algorithm": ALGORITHM, **options}
    with pytest.raises(ValueError, match=message):
        Study(storage=tmp_path / "x.db", **given)


SCRIPT = """
import sys, time
from pathlib import Path
from tests.studies.test_study import study, SMALL
from studies.events import Rung
def slow(event):
    if isinstance(event, Rung):
        print(event.number, event.rung, flush=True)
        time.sleep(0.05)
study(Path(sys.argv[1])).run(3, 100, scheduler="fifo", on_event=slow, checkpoint_seconds=0.0)
"""


@pytest.mark.parametrize("kill", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_study_ends_as_if_it_had_not_been(kill: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "a")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ},
        preexec_fn=interruptible,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.split() >= ["1", "6"]:
            break
    process.send_signal(kill)
    process.communicate(timeout=60)
    assert process.returncode != 0
    again = study(tmp_path / "a")
    assert [r.state for r in again.trials] == ["complete", "running"]
    events: list[Any] = []
    again.run(3, 100, scheduler="fifo", on_event=events.append)
    whole = study(tmp_path / "b").run(3, 100, scheduler="fifo")
    assert numbers(again) == numbers(whole)
    assert [e.record.number for e in events if isinstance(e, Finished)] == [1, 2]


def test_int_and_conditional_spaces_reach_the_learner(tmp_path: Path) -> None:
    class Wide(Method):
        """Checks what it is given."""

        name = "wide"
        space = Space(
            kind=Choice("a", "b"),
            size=Int(1, 4, when={"kind": "b"}),
            lr=Grad(0.1, low=0.01, high=1.0),
        )

        def attach(self, model: nn.Module) -> None:
            constants = self.setting.constants
            assert ("size" in constants) == (constants["kind"] == "b")

    found = Study("w", Trainer.of(Wide), TASK, tmp_path / "x.db", algorithm=ALGORITHM,
                  sampler="random").run(5, 10, scheduler="fifo")  # fmt: skip
    assert {r.state for r in found.trials} == {"complete"}
    assert {r.params["kind"] for r in found.trials} == {"a", "b"}
