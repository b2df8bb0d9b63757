"""Self-tuning as an outer algorithm: what it finds, resume, learners, studies, bad input."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from adapters import registry, tasks
from bilevel import (
    Budget,
    Choice,
    Descent,
    Fixed,
    Grad,
    ModuleInner,
    ProblemInner,
    RunStatus,
    SelfTuning,
    Space,
    tune,
)
from bilevel.self_tuning import jacobian_check, noisy, smoothed_cross_entropy, squared_norm
from bilevel.single_loop.rates import Decay
from hypergrad import SGD, Hyper, Problem, Unrolled
from studies import Study
from tests.bilevel.problems import RIDGE, RULE, TRAIN, optimal_penalty, ridge_options
from tests.bilevel.test_resume import Interrupt

Split = dict[str, Tensor]


def rows(count: int, seed: int, flip: float = 0.0) -> Split:
    """Three classes by two of ten features; a share of wrong labels."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 10, generator=g)
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()
    wrong = torch.rand(count, generator=g) < flip
    return {"x": x, "y": torch.where(wrong, torch.randint(0, 3, (count,), generator=g), y)}


SPACE = Space(
    drop=Grad(0.1, low=0.0, high=0.8),
    noise=Grad(0.1, low=0.0, high=2.0),
    smooth=Grad(0.05, low=0.0, high=0.5),
    decay=Grad(1e-3, low=1e-6, high=1.0, scale="log"),
    masked=Grad(2.0, low=0.0, high=5.0, doc="number of hidden features, an integer"),
)


def predict(module: nn.Module, values: Mapping[str, Any], batch: Split) -> Tensor:
    x = batch["x"]
    if module.training:
        x = noisy(x, values["noise"])
        hidden = torch.rand_like(x).argsort(1).argsort(1) < values["masked"][:, None]
        x = x.masked_fill(hidden, 0.0)
    out: Tensor = module(x)
    return out


def loss(outputs: Tensor, values: Mapping[str, Any], batch: Split) -> Tensor:
    return smoothed_cross_entropy(outputs, batch["y"], values["smooth"])


def outer(outputs: Tensor, batch: Split) -> Tensor:
    return F.cross_entropy(outputs, batch["y"], reduction="none")


def inner(**options: Any) -> ModuleInner:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)
    )
    given: dict[str, Any] = {
        "train": rows(60, 1, flip=0.3), "val": rows(100, 2), "test": rows(200, 3),
        "space": SPACE, "batch_size": 20, "dropout": {"3": "drop"}, "predict": predict,
        "penalty": lambda module, values: values["decay"] * squared_norm(module),
        "per_batch": ["decay"], "integers": ["masked"], "optimizer": SGD(lr=0.05, momentum=0.9),
        "metrics": lambda out, batch: {"accuracy": (out.argmax(1) == batch["y"]).float()},
    }  # fmt: skip
    return ModuleInner(net, loss=loss, outer_loss=outer, **{**given, **options})


def numbers(result: Any) -> Any:
    trace = [{k: repr(v) for k, v in row.items() if k != "seconds"} for row in result.trace]
    params = {name: value.tolist() for name, value in result.params.items()}
    return trace, result.test, result.val, result.schedule.columns(), params


@pytest.mark.parametrize("mode", ["stn", "delta"])
def test_tuning_helps_and_is_reported(mode: Any) -> None:
    still = tune(inner(), SelfTuning(mode=mode, lr=0.0, warmup=50), 200)
    subject = inner()
    found = tune(subject, SelfTuning(mode=mode, lr=0.03, warmup=50), 200, evaluate_every=10)
    assert found.val is not None
    assert still.val is not None
    assert found.val["loss"] < still.val["loss"]
    assert found.cost.steps == 200
    assert found.cost.gradients == (1 if mode == "stn" else 2) * 200 + 30
    assert len(found.trace) == 30
    assert set(found.schedule) == {"step", *SPACE}
    last = found.trace[-1]
    for name in SPACE:
        assert 0.05 <= float(last[f"sigma/{name}"] or 0) <= 1.0
        assert float(last[f"grad_norm/{name}"] or 0) > 0
    assert subject.evaluate("test")["accuracy"] > 0.6


@pytest.mark.parametrize("mode", ["stn", "delta"])
@pytest.mark.parametrize("at", [1, 4])
def test_interrupted_and_resumed(mode: Any, at: int, tmp_path: Any) -> None:
    algorithm = SelfTuning(mode=mode, lr=0.05, warmup=3, train_steps=2)
    whole = tune(inner(), algorithm, 17)
    with pytest.raises(KeyboardInterrupt):
        tune(inner(), algorithm, 17, callbacks=[Interrupt(at)], checkpoint=tmp_path / "run.pt")
    resumed = tune(inner(), algorithm, 17, resume=tmp_path / "run.pt")
    assert len(whole.trace) == 7
    assert numbers(resumed) == numbers(whole)


def test_a_step_leaves_the_old_state_valid() -> None:
    for mode in ("stn", "delta"):
        subject, algorithm = inner(), SelfTuning(mode=mode, train_steps=2)
        _, state = algorithm.step(subject, algorithm.init(subject))
        saved = subject.state_dict()
        first, _ = algorithm.step(subject, state)
        subject.load_state_dict(saved)
        second, _ = algorithm.step(subject, state)
        assert repr(first) == repr(second)


def test_a_schedule_is_replayed() -> None:
    """Plain training on the recorded values of Δ-STN: the same general weights, bit for bit."""
    algorithm = SelfTuning(lr=0.05, train_steps=3)
    found = tune(inner(), algorithm, 15, history=100)
    fresh = inner()
    # Response steps use the batches between; skip them here.
    step, draw = fresh.step, fresh.inner_batches

    def every_other() -> Any:
        metrics = step()
        draw(1)
        return metrics

    fresh.step = every_other  # type: ignore[method-assign]
    metrics = list(found.schedule.replay(fresh, 15))
    assert len(metrics) == 15
    for name, value in found.params.items():
        assert torch.allclose(fresh.params[name], value, atol=1e-5)


@pytest.mark.parametrize("mode", ["stn", "delta"])
def test_export_is_the_plain_network(mode: Any) -> None:
    subject = inner()
    found = tune(subject, SelfTuning(mode=mode, lr=0.05, warmup=20), 60)
    plain = subject.export()
    assert [type(m) for m in plain] == [
        nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout, nn.Linear,
    ]  # fmt: skip
    assert plain[3].p == pytest.approx(float(found.hparams["drop"]))
    test = rows(200, 3)
    with torch.no_grad():
        exported = F.cross_entropy(plain(test["x"]), test["y"])
    assert found.test is not None
    assert exported.item() == pytest.approx(found.test["loss"], rel=1e-5)


def test_export_of_a_module_with_names_of_its_own() -> None:
    """`key` and `between` are common names in attention."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key, self.between, self.drop = nn.Linear(10, 5), nn.Linear(5, 3), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.between(self.drop(self.key(x)))
            return out

    torch.manual_seed(0)
    subject = ModuleInner(
        Own(), SPACE, loss=loss, outer_loss=outer, train=rows(60, 1), val=rows(100, 2),
        dropout={"drop": "drop"}, integers=["masked"],
    )  # fmt: skip
    plain: Any = subject.export()
    assert plain.drop.p == pytest.approx(0.1)
    assert type(plain.key) is type(plain.between) is nn.Linear
    assert subject.splits == ("train", "val")
    with pytest.raises(ValueError, match="saved params have 7 entries, but the network has 73"):
        subject.load_state_dict({**subject.state_dict(), "params": torch.zeros(7)})


def test_the_deployed_weights_of_stn_respond_to_lambda() -> None:
    subject, algorithm = inner(), SelfTuning(mode="stn", train_steps=4)
    state = algorithm.init(subject)
    _, after = algorithm.step(subject, state)
    weights = after["weights"]
    pieces = weights["response"].split([math.prod(s) for s in weights["shapes"]])
    named = {
        n: p.view(s) for n, p, s in zip(weights["names"], pieces, weights["shapes"], strict=True)
    }
    model = subject.response_model()
    general = dict(subject.named(weights["general"]))
    expected = model.effective(general, named, state["z"])
    for name, value in subject.params.items():
        assert torch.allclose(value, expected[name], atol=1e-6)
        assert not torch.equal(value, general[name]) or name.startswith("1.")


@pytest.mark.parametrize("mode", ["stn", "delta"])
def test_statistics_of_batch_norm_see_every_training_batch(mode: Any) -> None:
    subject = inner()
    tune(subject, SelfTuning(mode=mode, train_steps=3, warmup=4), 10)
    plain: Any = subject.export()
    assert int(plain[1].num_batches_tracked) == 10
    assert float(plain[1].running_mean.abs().max()) > 0.0


def test_other_algorithms_take_a_module_inner() -> None:
    """Smooth values have the same hypergradient as any; dropout rates have none."""
    space = SPACE.fix(drop=0.1, noise=0.1, smooth=0.05, masked=2)
    subject = inner(space=space, dropout={}, integers=[], predict=lambda m, v, b: m(b["x"]))
    found = tune(subject, Descent(Unrolled(steps=5)), 20)
    assert found.status is RunStatus.MAX_ITER
    assert float(found.trace[-1]["grad_norm"] or 0) > 0
    with pytest.raises(ValueError, match="drop"):
        tune(inner(), Descent(Unrolled(steps=5)), 20)


def test_ridge_regression_finds_the_best_penalty() -> None:
    """On the tensors of a bare problem, one perturbation for each batch."""
    algorithm = SelfTuning(
        lr=Decay(0.2, 0.5), sigma=0.3, tune_sigma=False, warmup=100, train_steps=5,
        response_optimizer=SGD(lr=0.3, momentum=0.2),
    )  # fmt: skip
    found = tune(RIDGE, algorithm, 900, **ridge_options(hparams={"penalty": 0.1}))
    assert math.log(float(found.hparams["penalty"])) == pytest.approx(
        math.log(optimal_penalty()), abs=0.15
    )
    checks = jacobian_check(
        ProblemInner(
            RIDGE, found.params, optimizer=RULE, space=found.space, inner_batch=TRAIN,
            hparams=found.hparams, outer_batch=ridge_options()["outer_batch"],
        ),
        algorithm, found, steps=300, delta=0.1,
    )["penalty"]  # fmt: skip
    assert checks.cosine > 0.98
    assert checks.ratio == pytest.approx(1.0, abs=0.15)
    assert checks.slope == pytest.approx(checks.retrained_slope, abs=0.02)


@pytest.mark.parametrize("mode", ["stn", "delta"])
def test_jacobian_check_leaves_everything_as_it_was(mode: Any) -> None:
    subject, algorithm = inner(), SelfTuning(mode=mode, warmup=30, train_steps=5)
    found = tune(subject, algorithm, 60)
    before = repr(subject.state_dict())
    checks = jacobian_check(subject, algorithm, found, steps=5)
    assert repr(subject.state_dict()) == before
    assert set(checks) == set(SPACE)
    assert all(-1 <= check.cosine <= 1 for check in checks.values())
    with pytest.raises(ValueError, match="steps and delta must be positive"):
        jacobian_check(subject, algorithm, found, steps=0)


# Learners and studies.


def network_space() -> Space:
    return registry.get("network").space.own(
        weight_decay="fixed", layer_decay="grad", robustness="fixed", shift="fixed"
    )


@pytest.mark.parametrize("mode", ["stn", "delta"])
def test_a_trainer_learner_is_tuned_as_it_is(mode: Any) -> None:
    task = tasks.get("digits", n_train=100, n_val=60)
    losses = []
    for algorithm in (None, SelfTuning(mode=mode, lr=0.03, warmup=20, train_steps=2)):
        learner: Any = registry.get("network")(network_space())
        learner.setup(task, {"width": 16}, seed=0)
        if algorithm is None:
            for _ in range(60):
                learner.step()
        else:
            found = tune(learner, algorithm, 60)
            assert set(found.schedule) - {"step"} == set(learner.space.grad)
            assert found.schedule["dropout"].shape[1:] == (2,)
        losses.append(learner.evaluate("val")["loss"])
    assert losses[1] < 1.3 * losses[0]


def test_a_study_runs_it_in_each_trial(tmp_path: Any) -> None:
    algorithm = SelfTuning(lr=0.03, train_steps=2)
    study = Study(
        "stn", "network", tasks.get("digits", n_train=50, n_val=50), tmp_path / "a.db",
        space=network_space().fix(width=16, depth=1, activation="relu", optimizer="sgd"),
        algorithm=algorithm, sampler="random",
    )  # fmt: skip
    study.run(2, 10, rungs=2)
    schedule = study.schedule()
    assert schedule is not None
    assert len(schedule["label_smoothing"]) == 6


# Bad input.


def test_learning_rates_are_refused_with_the_reason() -> None:
    space = Space(SPACE, lr=Grad(0.05, low=0.0, high=1.0))
    with pytest.raises(ValueError, match=r"'lr' is a hyperparameter of the optimizer. Self-tuning"):
        tune(inner(space=space, optimizer=SGD(lr=Hyper("lr"))), SelfTuning(), 50)
    learner: Any = registry.get("network")(network_space().own(lr="grad"))
    learner.setup(tasks.get("digits", n_train=50, n_val=50), {}, seed=0)
    with pytest.raises(ValueError, match="'lr' is a hyperparameter of the optimizer"):
        tune(learner, SelfTuning(), 50)


def test_unused_hyperparameters_are_refused() -> None:
    space = Space(SPACE, width=Grad(0.05, low=0.0, high=1.0))
    with pytest.raises(ValueError, match="training loss does not depend on 'width'"):
        tune(inner(space=space), SelfTuning(), 50)


def test_the_check_of_use_changes_nothing() -> None:
    subject = inner()
    before, state = repr(subject.state_dict()), torch.get_rng_state()
    SelfTuning().init(subject)
    assert repr(subject.state_dict()) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_tune() -> None:
    with pytest.raises(ValueError, match="the gradient owns none"):
        inner(space=SPACE.own(**dict.fromkeys(SPACE, "fixed")))
    with pytest.raises(ValueError, match="the gradient owns none"):
        inner(space=Space(a=Fixed(1.0), b=Choice("x", "y")))


def test_values_on_a_bound_name_the_hyperparameter() -> None:
    with pytest.raises(ValueError, match=r"drop must be in \(0.0, 0.8\)"):
        inner(hparams={"drop": 0.0})


def test_tied_weights_need_delta() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(10, 10), nn.Linear(10, 10)
            self.b.weight = self.a.weight
            self.out = nn.Linear(10, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.b(self.a(x)))
            return out

    def subject() -> ModuleInner:
        return ModuleInner(
            Tied(), SPACE.fix(drop=0.1), loss=loss, outer_loss=outer, train=rows(60, 1),
            val=rows(60, 2), test=rows(60, 3), predict=predict, integers=["masked"],
            penalty=lambda m, v: v["decay"] * squared_norm(m),
        )  # fmt: skip

    with pytest.raises(ValueError, match="cannot tune tied weights, but 'a' and 'b' share one"):
        tune(subject(), SelfTuning(mode="stn"), 20)
    tied = subject()
    tune(tied, SelfTuning(mode="delta"), 20)
    plain = tied.export()
    assert plain.a.weight is plain.b.weight


def test_the_same_data_twice_is_warned_about() -> None:
    data = rows(60, 1)
    with pytest.warns(UserWarning, match="train and val are the same data"):
        inner(train=data, val=data)
    with pytest.warns(UserWarning, match="train and val are the same data"):
        inner(train=data, val={"x": data["x"], "y": data["y"].clone()})


def test_a_short_last_batch() -> None:
    """Lists of batches may hold one that is shorter; perturbations follow."""
    data = rows(50, 1)
    batches = [{k: v[i : i + 20] for k, v in data.items()} for i in (0, 20, 40)]
    found = tune(inner(train=batches, val=batches[::-1]), SelfTuning(train_steps=3), 12)
    assert found.status is RunStatus.MAX_ITER


def test_a_loss_that_is_not_finite_ends_at_the_last_good_values() -> None:
    calls = [0]

    def broken(outputs: Tensor, values: Mapping[str, Any], batch: Split) -> Tensor:
        calls[0] += 1
        return loss(outputs, values, batch) * (math.nan if calls[0] > 60 else 1.0)

    torch.manual_seed(0)
    subject = ModuleInner(
        nn.Linear(10, 3), SPACE.fix(drop=0.1), loss=broken, outer_loss=outer, predict=predict,
        train=rows(60, 1), val=rows(60, 2), test=rows(60, 3),
        penalty=lambda m, v: v["decay"] * squared_norm(m),
    )  # fmt: skip
    found = tune(subject, SelfTuning(train_steps=2), 100)
    assert found.status is RunStatus.DIVERGED
    assert "nan" in found.reason
    assert all(bool(v.detach().isfinite().all()) for v in found.params.values())
    assert all(np.isfinite(found.schedule[n]).all() for n in found.schedule)


def test_a_derivative_that_is_not_finite_names_the_hyperparameter() -> None:
    calls = [0]

    def outer_loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        calls[0] += 1
        root = (hparams["penalty"] - hparams["penalty"].detach()).sqrt()
        bad = root if calls[0] > 3 else torch.zeros(())
        return RIDGE.outer_loss(params, hparams, batch) + bad

    problem = Problem(RIDGE.inner_loss, outer_loss)
    found = tune(problem, SelfTuning(train_steps=2), Budget(outer_steps=9), **ridge_options())
    assert found.status is RunStatus.DIVERGED
    assert "not finite in ['penalty']" in found.reason
    assert len(found.trace) == 3


def test_sigma_stays_in_its_bounds_and_says_so() -> None:
    algorithm = SelfTuning(lr=0.0, sigma_lr=1.0, entropy_weight=10.0, train_steps=1)
    found = tune(inner(), algorithm, 8)
    assert float(found.trace[-1]["sigma/drop"] or 0) == pytest.approx(1.0)
    assert found.trace[-1]["sigma_clamped"] == 5
    still = tune(inner(), SelfTuning(lr=0.0, tune_sigma=False, sigma=0.3, train_steps=1), 4)
    assert float(still.trace[-1]["sigma/drop"] or 0) == pytest.approx(0.3)


def test_sigma_by_name() -> None:
    sigma = dict.fromkeys(SPACE, 0.2) | {"decay": 0.9}
    found = tune(inner(), SelfTuning(tune_sigma=False, sigma=sigma, train_steps=1), 2)
    assert float(found.trace[0]["sigma/decay"] or 0) == pytest.approx(0.9)
    with pytest.raises(ValueError, match="sigma: expected one number for each of"):
        tune(inner(), SelfTuning(sigma={"drop": 0.2}), 10)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"mode": "both"}, "mode must be 'stn' or 'delta', but got 'both'"),
    ({"train_steps": 0}, "train_steps must be at least 1"),
    ({"warmup": -1}, "warmup must be at least 0"),
    ({"lr": -0.1}, "lr must be >= 0, but got -0.1"),
    ({"sigma": 2.0}, r"sigma must be in sigma_bounds \[0.05, 1.0\], but got 2.0"),
    ({"sigma": {"p": 0.0}}, r"sigma\['p'\] must be in"),
    ({"sigma_bounds": (0.0, 1.0)}, "sigma_bounds must be 0 < low"),
    ({"entropy_weight": -1.0}, "entropy_weight must be >= 0"),
    ({"mode": "stn", "linearize": True}, "linearize=True belongs to mode='delta'"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelfTuning(**options)


def test_settings_that_do_not_fit_the_inner_level() -> None:
    with pytest.raises(ValueError, match="needs the outputs of a network"):
        tune(RIDGE, SelfTuning(linearize=True), 50, **ridge_options())
    bad = SelfTuning(response_optimizer=SGD(lr=Hyper("x")))
    with pytest.raises(ValueError, match="response_optimizer must have constant numbers"):
        tune(inner(), bad, 50)
    with pytest.raises(ValueError, match="a stream of batches, so it cannot be evaluated"):
        inner(train=lambda t: rows(5, t)).evaluate("train")
    with pytest.raises(ValueError, match="the same positive number of rows"):
        inner(train={"x": torch.ones(3, 10), "y": torch.ones(4)})
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        inner(batch_size=0)


def test_an_operation_without_forward_derivative_says_what_to_do() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return 2 * x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return 2 * g

    def doubled(module: nn.Module, values: Mapping[str, Any], batch: Split) -> Tensor:
        out: Tensor = Double.apply(predict(module, values, batch))  # type: ignore[no-untyped-call]
        return out

    with pytest.raises((NotImplementedError, RuntimeError), match=r"linearize=False"):
        tune(inner(predict=doubled), SelfTuning(), 20)
    tune(inner(predict=doubled), SelfTuning(linearize=False), 10)
