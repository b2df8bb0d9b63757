"""Study files: what they become, and what is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch

from adapters import registry
from bilevel import MAID, Budget, Descent
from hypergrad import CG, Implicit
from studies.commands.plan_file import (
    budget_of_text,
    plan_from_function,
    plan_from_table,
    run_arguments,
)
from studies.executors.config import RayActors
from studies.plan import Plan, PlanError
from studies.runner.schedulers import Halving

BASE = """
learner = "network"
task = "digits"
run = { trials = 3, budget = 40 }
"""


def plan(text: str) -> Plan:
    return plan_from_table(tomllib.loads(text), "name")


def test_tables_with_a_name_become_objects() -> None:
    found = plan(
        BASE.replace("budget = 40", 'budget = 40, scheduler = { name = "Halving", eta = 4 }')
        + """
sampler = { name = "tpe", n_startup_trials = 4 }
constraints = { error = 0.1 }
[algorithm]
name = "Descent"
lr = { lr = 0.1 }
optimizer = { name = "SGD", momentum = 0.9 }
estimator = { name = "Implicit", solver = "CG" }
[space]
lr = { owner = "grad", low = 0.01, high = 0.2, init = 0.1 }
activation = { values = ["relu", "tanh"] }
width = 32
"""
    )
    algorithm: Any = found.algorithm
    assert isinstance(algorithm, Descent)
    assert algorithm.estimator == Implicit(CG())
    assert algorithm.optimizer.func is torch.optim.SGD
    assert found.run["scheduler"] == Halving(4)
    assert found.options == {"constraints": {"error": 0.1}}
    assert found.space is not None
    assert found.space.owner("lr") == "grad"
    assert found.space.constants["width"] == 32
    domain: Any = found.space["activation"]
    assert domain.values == ("relu", "tanh")
    assert type(found.sampler).__name__ == "TPESampler"
    assert isinstance(plan(BASE + 'algorithm = "MAID"').algorithm, MAID)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_pruners_that_need_options() -> None:
    pruner: Any = plan(BASE + "pruner = { name = 'percentile', percentile = 30.0 }").pruner
    assert isinstance(pruner, optuna.pruners.PercentilePruner)
    patient = "pruner = { name = 'patient', patience = 2%s }"
    pruner = plan(BASE + patient % ", wrapped_pruner = 'median'").pruner
    assert isinstance(pruner._wrapped_pruner, optuna.pruners.MedianPruner)
    pruner = plan(BASE + patient % "").pruner
    assert isinstance(pruner._wrapped_pruner, optuna.pruners.NopPruner)


def test_a_plan_from_a_function(tmp_path: Path) -> None:
    (tmp_path / "mine_plan.py").write_text(
        "from studies.plan import Plan\ndef study():\n    return Plan('network', 'digits', 2, 10)\n"
    )
    assert plan_from_function(f"{tmp_path / 'mine_plan.py'}:study").trials == 2


def test_pure_sampling_of_the_same_plan_drops_the_algorithm() -> None:
    found = plan(BASE + 'algorithm = "Descent"').override(own={"*": "sampler", "width": "fixed"})
    assert found.algorithm is None
    assert found.space is not None
    assert not found.space.grad
    assert set(registry.get("network").space.grad) <= set(found.space.sampled)


def test_plain_data_of_the_command_line() -> None:
    assert budget_of_text("30") == 30
    assert budget_of_text("steps=3, seconds=1.5") == Budget(steps=3, seconds=1.5)
    found = run_arguments({"executor": {"name": "RayActors", "address": "auto", "workers": 3}})
    assert found == {"executor": RayActors(3, "auto")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('learner = "network"', "task is missing"),
        (BASE.replace("trials = 3, ", ""), r"\[run\]: trials is missing"),
        (BASE.replace("trials = 3", 'trials = "3"'), "trials must be an integer, but got '3'"),
        (BASE.replace("budget = 40", "budget = { step = 4 }"), "did you mean 'steps'"),
        (BASE.replace("budget = 40", "budget = 40, rung = 4"), "did you mean 'rungs'"),
        (BASE.replace("budget = 40", "budget = 40, total = []"), r"limits, but got \[\]"),
        (BASE.replace("budget = 40", "budget = true"), "limits, but got True"),
        (BASE.replace('"network"', '"tests.studies.trials:Nameless"'), "Nameless must have a name"),
        (BASE + "samplr = 'tpe'", "did you mean 'sampler'"),
        (BASE + "sampler = { name = 'tpe', startup = 1 }", "unknown key 'startup'"),
        (BASE + "sampler = { name = 'tp', seed = 1 }", "did you mean 'tpe'"),
        (BASE + "pruner = { name = 'threshold', uper = 1 }", "did you mean 'upper'"),
        (BASE + "pruner = { name = 'percentile', n_warmup_steps = 1 }", "'percentile'"),
        (
            BASE + "pruner = { name = 'patient', patience = 1, wrapped_pruner = 'x' }",
            "pruner.wrapped_pruner: pruner must be one of",
        ),
        (BASE + "algorithm = 'Decent'", "did you mean 'Descent'"),
        (BASE + "algorithm = { name = 'Descent', rate = 1 }", "unknown key 'rate'"),
        (BASE + "algorithm = { name = 'Descent', lr = -1.0 }", "lr must be finite and >= 0"),
        (BASE + "algorithm = { lr = 0.1 }", "the table needs a name"),
        (BASE + "space = { lrr = 1 }", "did you mean 'lr'"),
        (BASE + "space = { lr = { lo = 1 } }", "did you mean 'low'"),
        (BASE + "space = { lr = { low = 2.0, high = 1.0 } }", "lr"),
        (BASE + "space = { width = { owner = 'grad' } }", "cannot be owned by 'grad'"),
        (BASE.replace('"digits"', '{ name = "digits", nois = 1 }'), "nois"),
        (BASE.replace('"network"', '"studies.plan:Plan"'), "must be a Learner or Method class"),
        (BASE.replace('"network"', "3"), "learner must be a name"),
    ],
)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        plan(text)
    assert "\n" not in str(error.value)
