"""AdaLoRA: the schedule of the budget, exact counts, and what survives."""

from __future__ import annotations

import pytest
import torch

from adapters import Trainer, registry, tasks
from adapters.reparam import maps
from adapters.weights.adalora import AdaLoRA, _largest, budget
from bilevel import Descent, tune
from hypergrad import Unrolled

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


def test_importance_is_that_of_the_vectors_and_not_of_their_offsets() -> None:
    """After one step Ī = (1 − β₁)|w ∂L/∂w|, w the new weight and the gradient of that step."""
    learner = registry.get("adalora")()
    assert isinstance(learner, Trainer)
    learner.setup(TASK, {"rank": 4, "lr": 1e-6}, seed=0)
    layers, before = maps(learner._assembly.model), learner.params
    batch = {**learner.inner_batches(1)[0], "kept": {}}
    loss = learner.problem.inner_loss(before, learner.hparams, batch)
    names = [n for n in before if n.endswith(".P")]
    grads = torch.autograd.grad(loss, [before[n] for n in names])
    again = registry.get("adalora")()
    assert isinstance(again, Trainer)
    again.setup(TASK, {"rank": 4, "lr": 1e-6}, seed=0)
    again.step()
    for name, grad, layer in zip(names, grads, layers.values(), strict=True):
        assert isinstance(layer.reparam, AdaLoRA)
        p = layer.reparam.std * layer.parts["P0"]
        found = again.method.memory["importance"][name]
        assert torch.allclose(found, 0.15 * (p * grad).abs(), rtol=1e-2, atol=1e-8)


def test_ranks_are_pruned_where_an_estimator_trains() -> None:
    learner = registry.get("adalora")()
    assert isinstance(learner, Trainer)
    values = {"warm_up": 0.1, "final": 0.3, "total": 30, "interval": 2, "rank": 4, "target": 0.5}
    learner.setup(TASK, values, seed=0)
    tune(learner, Descent(Unrolled(steps=5)), budget=30)
    lam = torch.cat([v for k, v in learner.params.items() if k.endswith(".lam")])
    assert int((lam != 0).sum()) == 6


@pytest.mark.parametrize(("rank", "target", "each"), [(2, 0.95, 1), (6, 0.67, 4), (6, 0.1, 1)])
def test_the_final_rank_is_below_the_first_and_at_least_one(
    rank: int, target: float, each: int
) -> None:
    learner = registry.get("adalora")()
    assert isinstance(learner, Trainer)
    values = {"warm_up": 0.0, "final": 0.4, "total": 10, "interval": 1}
    learner.setup(TASK, {**values, "rank": rank, "target": target}, seed=0)
    for _ in range(8):
        learner.step()
    lam = torch.cat([v for k, v in learner.params.items() if k.endswith(".lam")])
    assert int((lam != 0).sum()) == 3 * each
