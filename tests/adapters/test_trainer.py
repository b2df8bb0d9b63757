"""The trainer against hand-written PyTorch: steps, BatchNorm, evaluation, the inner level."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from torch.nn import functional as F  # noqa: N812

from adapters import Trainer, tasks
from bilevel import Metrics, RunStatus
from hypergrad import Implicit, seeded
from hypergrad.tree import trainable_leaves
from tests.adapters import methods
from tests.adapters.methods import TASK, trainer


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_steps_equal_torch_optim_bit_for_bit(rule: str) -> None:
    learner = trainer(methods.Linear, rule=rule, lr=0.05)
    model = learner.module().train()
    torch_rule: torch.optim.Optimizer
    if rule == "sgd":
        torch_rule = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5, foreach=False)
    else:
        torch_rule = torch.optim.Adam(
            model.parameters(), lr=0.05, betas=(0.5, 0.999), foreach=False
        )
    twin = trainer(methods.Linear, rule=rule, lr=0.05)
    for batch in twin.inner_batches(20):
        loss = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none").mean()
        loss = loss + 0.5 * 0.01 * sum(p.square().sum() for p in model.parameters())
        torch_rule.zero_grad()
        loss.backward()
        torch_rule.step()
        assert learner.step()["loss"] == loss.item()
    for name, value in model.named_parameters():
        assert torch.equal(learner.params[name], value)


def test_a_convex_problem_is_solved() -> None:
    """Full batches on softmax regression reach scikit-learn's minimizer."""
    task = tasks.get("digits", n_train=200).to(torch.float64)
    learner = trainer(methods.Linear, task, lr=0.5, momentum=0.9, decay=0.1, batch=1000)
    for _ in range(600):
        metrics = learner.step()
    x, y = (task.split("train")[k].flatten(1 if k == "x" else 0).numpy() for k in "xy")
    ours = {name: value.detach() for name, value in learner.params.items()}
    # scikit-learn leaves the intercept free, so it becomes one more feature: ours is not free.
    reference = LogisticRegression(
        C=1 / (0.1 * len(y)), tol=1e-12, max_iter=9000, fit_intercept=False
    )
    design = torch.cat([torch.from_numpy(x), torch.ones(len(y), 1).double()], dim=1)
    reference.fit(design, y)
    found = torch.cat([ours["layers.0.weight"], ours["layers.0.bias"][:, None]], dim=1)
    torch.testing.assert_close(found, torch.from_numpy(reference.coef_), rtol=1e-5, atol=1e-6)
    assert metrics.status is RunStatus.RUNNING


def test_evaluation_agrees_with_scikit_learn() -> None:
    learner = trainer(methods.Focal)
    for _ in range(20):
        learner.step()
    for split in ("train", "val", "test"):
        data = TASK.split(split)
        p = learner.module()(data["x"]).detach().double().softmax(1).numpy()
        metrics = learner.evaluate(split)
        assert metrics["loss"] == pytest.approx(log_loss(data["y"], p, labels=range(10)), rel=1e-5)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(data["y"], p.argmax(1)))


def test_evaluation_in_chunks_is_the_mean_over_all_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = trainer(methods.Focal, TASK.to(torch.float64))
    whole = learner.evaluate("val")
    monkeypatch.setattr("adapters.trainer.EVALUATION_ROWS", 150)  # 400 = 150 + 150 + 100
    assert dict(learner.evaluate("val")) == pytest.approx(dict(whole), rel=1e-12)


def test_outer_batches_are_drawn_from_large_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = trainer(methods.Focal)
    assert len(learner.outer_batch()["y"]) == 400
    monkeypatch.setattr("adapters.trainer.EVALUATION_ROWS", 100)
    seen = torch.cat([learner.outer_batch()["index"] for _ in range(4)])
    assert sorted(seen.tolist()) == list(range(400))


def test_batch_norm_moves_in_steps_only() -> None:
    learner = trainer(methods.Normalized)
    model = learner.module().train()
    twin = trainer(methods.Normalized)

    def statistics() -> dict[str, torch.Tensor]:
        constants = learner.state_dict()["constants"]
        return {name: value for name, value in constants.items() if "running" in name}

    for batch in twin.inner_batches(3):
        before = statistics()
        learner.problem.inner_loss(learner.params, learner.hparams, batch)
        learner.problem.outer_loss(learner.params, learner.hparams, learner.outer_batch())
        learner.evaluate("val")
        assert all(torch.equal(before[k], v) for k, v in statistics().items())
        learner.step()
        # The frozen first layer makes the statistics independent of the trained weights.
        model(batch["x"])
        expected = dict(model.named_buffers())
        assert all(torch.equal(expected[k], v) for k, v in statistics().items())


def test_losses_are_pure_functions_of_their_batch() -> None:
    learner = trainer(methods.Normalized)
    one, two = learner.inner_batches(2)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)

    def loss(batch: dict[str, Any]) -> float:
        return learner.problem.inner_loss(learner.params, learner.hparams, batch).item()

    assert loss(one) == loss(one) != loss({**one, "seed": two["seed"]})  # other dropout masks
    assert torch.equal(torch.rand(2), expected)
    outer = learner.outer_batch()
    again = [
        learner.problem.outer_loss(learner.params, learner.hparams, {**outer, "seed": seed})
        for seed in (0, 1)
    ]
    assert again[0] == again[1]  # evaluation mode: no dropout


def test_dropout_masks_come_from_the_batch_seed() -> None:
    learner = trainer(methods.Normalized)
    [batch] = learner.inner_batches(1)
    model = learner.module().train()
    with seeded(batch["seed"]):
        expected = F.cross_entropy(model(batch["x"]), batch["y"]) * 1.1
    found = learner.problem.inner_loss(learner.params, learner.hparams, batch)
    torch.testing.assert_close(found, expected)


def test_set_hparams_moves_losses_and_optimizer() -> None:
    learner = Trainer.of(methods.Linear)(methods.Linear.space.own(momentum="grad"))
    learner.setup(TASK, {"decay": 1e-5}, seed=0)
    [batch] = learner.inner_batches(1)
    squares = sum(p.square().sum() for p in learner.params.values())
    args = (learner.params, learner.hparams, batch)
    before = learner.problem.inner_loss(*args)
    learner.set_hparams({"decay": torch.tensor(0.25), "momentum": torch.tensor(0.7)})
    after = learner.problem.inner_loss(learner.params, learner.hparams, batch)
    torch.testing.assert_close(after - before, 0.5 * (0.25 - 1e-5) * squares)
    values = learner.optimizer.resolve(learner.hparams, trainable_leaves(learner.params))
    assert values["momentum"].item() == pytest.approx(0.7)


def test_what_it_hands_out_cannot_change_it() -> None:
    learner, twin = trainer(methods.Linear), trainer(methods.Linear)
    state = learner.state_dict()
    with torch.no_grad():
        state["params"].zero_()
        learner.module().get_parameter("layers.0.weight").zero_()
        state["optimizer"].clear()
    learner.hparams["decay"] = torch.tensor(0.5)
    assert dict(learner.step()) == dict(twin.step())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decays": torch.tensor(0.1)}, "'decays' is not owned by the gradient"),
        ({"lr": torch.tensor(0.1)}, "'lr' is not owned by the gradient"),
        ({"decay": torch.tensor([0.1])}, r"decay must have shape \(\), but got \(1,\)"),
        ({"decay": torch.tensor(math.nan)}, "decay must be finite"),
    ],
)
def test_bad_hparams_are_refused_whole(values: dict[str, Any], message: str) -> None:
    learner = trainer(methods.Linear)
    before = learner.hparams
    with pytest.raises(ValueError, match=message):
        learner.set_hparams({"decay": torch.tensor(0.5), **values})
    assert learner.hparams == before


def test_adopt_checks_what_it_gets() -> None:
    learner = trainer(methods.Linear)
    params, state = learner.params, learner.optimizer_state
    with pytest.raises(ValueError, match="params must have shapes"):
        learner.adopt({"layers.0.weight": params["layers.0.weight"]}, state, 1)
    with pytest.raises(ValueError, match="optimizer state has entries"):
        learner.adopt(params, {"exp_avg": None}, 1)
    learner.adopt({n: torch.zeros_like(p) for n, p in params.items()}, state, 0)
    assert learner.evaluate("val")["loss"] == pytest.approx(math.log(10))


def test_gradients_of_the_losses_reach_an_implicit_estimator() -> None:
    """With params at the minimum, dF/d log decay from CG agrees with a refit."""
    task = tasks.get("digits", n_train=100).to(torch.float64)
    outer: list[float] = []
    for decay in (0.0999, 0.1001, 0.1):
        learner = trainer(methods.Linear, task, lr=0.5, momentum=0.9, decay=decay, batch=1000)
        for _ in range(1500):
            learner.step()
        outer.append(learner.evaluate("val")["loss"])
    estimator = Implicit()
    args = (learner.problem, learner.params, learner.hparams)
    [batch] = learner.inner_batches(1)
    found, _ = estimator(*args, batch, learner.outer_batch(), estimator.init(*args))
    assert found.grad["decay"].item() == pytest.approx((outer[1] - outer[0]) / 2e-4, rel=1e-4)


def test_costs_count_steps_and_gradients() -> None:
    learner = trainer(methods.Linear)
    total = sum((learner.step().cost for _ in range(4)), Metrics({}).cost)
    assert (total.steps, total.gradients, total.hvps) == (4, 4, 0)
    assert total.seconds > 0
    assert learner.evaluate("val").cost.gradients == 0


def test_a_metric_that_is_no_tensor_is_refused() -> None:
    class Wrong(methods.Linear):
        """A metric that is a text."""

        name = "wrong"

        def measure(self, model: Any, hparams: Any, batch: Any) -> Any:
            """No numbers."""
            return {"loss": "0.5"}

    with pytest.raises(TypeError, match=r"wrong: measure must return a tensor.*loss is '0\.5'"):
        trainer(Wrong).evaluate("val")
