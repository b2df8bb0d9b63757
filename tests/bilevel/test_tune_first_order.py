"""tune() with the methods that need no Hessian-vector products."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bilevel import Budget, Descent, tune
from hypergrad import BOME, F2SA, PBGD, PZOBO, SAMA, SGD
from tests.bilevel.problems import RIDGE, TRAIN, optimal_penalty, ridge_options, validation_loss

JOINT = {"optimizer": torch.optim.SGD}  # on h: one step size rules w and h in theory
ALGORITHMS = {
    "SAMA": Descent(SAMA(steps=5)),
    "PZOBO": Descent(PZOBO(steps=20, directions=1, orthogonal=True)),
    "F2SA": Descent(F2SA(steps=10, multiplier=5.0, growth=0.2)),
    "BOME": Descent(BOME(steps=10), lr=0.05, **JOINT),
    "PBGD": Descent(PBGD(steps=10), lr=0.01, **JOINT),
}
OUTER_STEPS = {"SAMA": 80, "PZOBO": 40, "F2SA": 80, "BOME": 230, "PBGD": 60}


def run(name: str, budget: Any, algorithm: Descent | None = None, **options: Any) -> Any:
    rule = {"optimizer": SGD(lr=0.02)} if name in ("BOME", "PBGD") else {}
    problem = ridge_options(**rule, inner_batch=options.pop("inner_batch", TRAIN))
    return tune(RIDGE, algorithm or ALGORITHMS[name], budget, **problem, **options)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_ridge_penalty(name: str) -> None:
    found = run(name, Budget(outer_steps=OUTER_STEPS[name]))
    best, start = validation_loss(optimal_penalty()), validation_loss(1.0)
    reached = validation_loss(float(found.hparams["penalty"]))
    assert reached - best < 0.05 * (start - best)
    assert {row["hvps"] for row in found.trace} == {0}
    if name in ("BOME", "PBGD"):  # their weights have seen the validation rows
        assert found.val["loss"] < best - 0.05
    else:
        assert found.val["loss"] == pytest.approx(reached, abs=1e-3)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_resumed_run_is_the_uninterrupted_one(name: str, tmp_path: Path) -> None:
    def batch(t: int) -> Any:
        rows = torch.randint(0, len(TRAIN[0]), (6,))
        return TRAIN[0][rows], TRAIN[1][rows]

    algorithm = ALGORITHMS[name]
    algorithm = replace(algorithm, estimator=replace(algorithm.estimator, steps=2))
    options = {"algorithm": algorithm, "inner_batch": batch, "seed": 3}
    whole = run(name, 40, **options)
    run(name, 16, **options, checkpoint=tmp_path / "run.pt")
    resumed = run(name, 40, **options, resume=tmp_path / "run.pt")
    assert torch.equal(resumed.params["w"], whole.params["w"])
    assert torch.equal(resumed.hparams["penalty"], whole.hparams["penalty"])
