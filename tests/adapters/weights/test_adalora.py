"""AdaLoRA: the schedule of the budget, exact counts, and what survives."""

from __future__ import annotations

import torch

from adapters import Trainer, registry, tasks
from adapters.reparam import maps
from adapters.weights.adalora import _largest, budget

TASK = tasks.get("digits_transfer")


def test_budgets_of_the_paper() -> None:
    """Two layers, ranks 6 → 3, 20 steps; the numerator is t − t_i."""
    plain = [budget(t, 12, 6, 0, 0, 20) for t in range(11)]
    assert plain == [12, 11, 10, 9, 9, 8, 8, 7, 7, 6, 6]
    phased = [budget(t, 12, 6, 5, 5, 20) for t in range(21)]
    assert phased[:6] == [12] * 6
    assert phased[6:11] == [10, 9, 8, 7, 6]
    assert phased == sorted(phased, reverse=True)
    assert set(phased[15:]) == {6}


def test_ties_are_broken_by_index() -> None:
    mask = _largest({"a": torch.ones(3), "b": torch.ones(3)}, 4)
    assert mask["a"].tolist() == [1, 1, 1]
    assert mask["b"].tolist() == [1, 0, 0]


def test_the_budget_is_met_and_the_final_mask_stays() -> None:
    learner = registry.get("adalora")()
    assert isinstance(learner, Trainer)
    values = {
        "warm_up": 4 / 30,
        "final": 1 / 3,
        "total": 30,
        "interval": 2,
        "rank": 4,
        "target": 0.5,
    }
    learner.setup(TASK, values, seed=0)
    live, last = [], None
    for step in range(1, 36):
        learner.step()
        lam = torch.cat([v for k, v in sorted(learner.params.items()) if k.endswith(".lam")])
        live.append(int((lam != 0).sum()))
        if step % 2 == 0 and step <= 20:
            assert live[-1] <= budget(step, 12, 6, 4, 10, 30)
        if step > 20:
            assert live[-1] == 6
            assert last is None or torch.equal(last, lam != 0)
            last = lam != 0
    assert live[0] == 12
    assert learner.method.memory["kept"].keys() == maps(learner._assembly.model).keys()
