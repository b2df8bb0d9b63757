"""What every learner must do, whatever its method: one check a function.

`LEARNERS` maps a registry name to the settings that make its checks fast.  A new learner is one
more line here; `tests/adapters/test_battery.py` runs every check on every line.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters import Learner, Task, Trainer, registry, tasks
from bilevel import Descent, Float, Grad, Inner, RunStatus, Space, tune
from hypergrad import Unrolled, check_hypergradient

__all__ = ["CHECKS", "LEARNERS", "Subject"]


@dataclass(frozen=True)
class Subject:
    """A learner and how to check it.

    Attributes:
        learner: its class.
        task: name of a small task, and its options.
        options: of the task.
        hparams: values that make it small.
        smooth: values at which its smooth hyperparameters are compared with central
            differences; kinks of the loss must not lie within the step of the differences.
        tolerance: largest relative error of that comparison.
        earlier: smooth hyperparameters that act in the first phase only, and are compared there.
        supervised: whether 60 steps must lower the loss of the training split.
        diverges: whether an absurd learning rate makes the loss infinite.
        ours: False for networks of others that compute in float32 inside, and with other kernels
            where a graph is recorded: no bits and no differences to compare.
    """

    learner: type[Learner]
    task: str = "digits"
    options: Mapping[str, Any] = field(default_factory=lambda: {"noise": 0.2, "n_train": 200})
    hparams: Mapping[str, Any] = field(default_factory=dict)
    smooth: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-5
    earlier: tuple[str, ...] = ()
    supervised: bool = True
    diverges: bool = True
    ours: bool = True

    def make_task(self, dtype: torch.dtype = torch.float32) -> Task:
        return tasks.get(self.task, **self.options).to(dtype)

    def set_up(self, seed: int = 0, dtype: torch.dtype = torch.float32, **hparams: Any) -> Learner:
        learner = self.learner()
        learner.setup(self.make_task(dtype), {**self.hparams, **hparams}, seed=seed)
        return learner


_SMALL = {"width": 16, "depth": 2}

_TRANSFER = {"hidden": (32,), "activation": "tanh"}


def _adapter(name: str, **hparams: Any) -> Subject:
    """A fine-tuning method on a small network, at a learning rate where it learns at once."""
    return Subject(
        registry.get(name),
        task="digits_transfer",
        options=_TRANSFER,
        hparams=hparams,
    )


LEARNERS: dict[str, Subject] = {
    "adalora": _adapter("adalora", rank=4, warm_up=0.2, total=60),
    "adawac": Subject(
        registry.get("adawac"), options={"noise": 0.2, "n_train": 600}, hparams={"burn_in": 0}
    ),
    "allora": _adapter("allora"),
    # Averaged from the start where differences are compared, so that β acts there.
    "coin": Subject(
        registry.get("coin"),
        "digits_stream",
        {"n_train": 448, "n_val": 70, **_TRANSFER},
        {"epochs": 4},
        {"from_start": True},
    ),
    "compander": Subject(
        registry.get("compander"), hparams={"width": 16}, smooth={"activation": "tanh"}
    ),
    "dct_adamw": _adapter("dct_adamw"),
    "diffora": Subject(
        registry.get("diffora"),
        "digits_transfer",
        {"hidden": (32, 16), "activation": "tanh"},
        {"search_steps": 10, "warm_up": 0.3},
    ),
    "eva": _adapter("eva", headroom=2.0),
    "finetune": _adapter("finetune"),
    "frugal": _adapter("frugal", projector="columns", density=0.5, refresh=2),
    "galore": _adapter("galore", refresh=3),
    "gradnormlorp": _adapter("gradnormlorp", refresh=3),
    "hut": _adapter("hut"),
    "layer_adaptive_pruning": _adapter("layer_adaptive_pruning", round_steps=9, grid=10, lr=3e-3),
    "learned_weights": Subject(registry.get("learned_weights")),
    "lift": _adapter("lift", budget_rank=2, refresh=3),
    "lora": _adapter("lora"),
    "lora_sb": _adapter("lora_sb", rank=8),
    "miss": _adapter("miss", rank=4),
    "reweighted": Subject(registry.get("reweighted"), hparams={"burn_in": 0}),
    "s2ft": _adapter("s2ft", up=0.25),
    "sara": _adapter("sara", min_dim=16, reselect=3),
    "sorsa": _adapter("sorsa"),
    "svfit": _adapter("svfit"),
    "bang": Subject(
        registry.get("bang"),
        "digits_robust",
        {"n_train": 200, "n_val": 100, **_TRANSFER},
        {"steps": 70, "lr": 1e-3},
        earlier=("lr", "weight_decay", "smoothing"),
    ),
    "eata": Subject(
        registry.get("eata"),
        "digits_stream",
        {"n_train": 224, "n_val": 70},
        {"batch": 32, "redundancy": 2.0},
        supervised=False,
    ),
    "network": Subject(
        registry.get("network"),
        hparams=_SMALL,
        smooth={**_SMALL, "activation": "tanh"},
    ),
    # Comparisons with Unrolled, which holds the table constant, stay within the first epoch; the
    # hypergradient of the softening is compared where the table has been filled.
    "peft": Subject(
        registry.get("peft"),
        "descriptions",
        {"length": 16, "n_train": 64},
        {"rank": 2, "batch": 8},
        ours=False,
    ),
    "ps_kd": Subject(
        registry.get("ps_kd"), hparams={"batch": 16}, smooth={"batch": 64, "activation": "tanh"}
    ),
}


def in_last_phase(learner: Learner) -> Trainer:
    """Train until the last phase, where the gradient owns what it owns by default."""
    assert isinstance(learner, Trainer)
    while learner.phase != learner.phases[-1]:
        learner.step()
    return learner


def numbers(learner: Learner, steps: int) -> list[dict[str, float]]:
    """Everything a learner says over some steps and one evaluation of each split."""
    found = [dict(learner.step()) for _ in range(steps)]
    return [*found, *(dict(learner.evaluate(split)) for split in ("train", "val", "test"))]


def plain(tree: Any) -> bool:
    """Whether a tree holds only tensors, numbers, strings, None, lists, tuples and dicts."""
    if isinstance(tree, dict):
        return all(isinstance(k, str | int) and plain(v) for k, v in tree.items())
    if isinstance(tree, list | tuple):
        return all(map(plain, tree))
    return tree is None or isinstance(tree, bool | int | float | str) or type(tree) is Tensor


def trains_and_evaluates(subject: Subject) -> None:
    learner = subject.set_up()
    before = learner.evaluate("train")["loss"]
    for _ in range(60):
        metrics = learner.step()
        assert math.isfinite(metrics["loss"])
        assert (metrics.cost.steps, metrics.cost.gradients) >= (1, 1)
    after = learner.evaluate("train")["loss"]
    assert math.isfinite(after)
    assert after < before or not subject.supervised
    assert learner.evaluate("val").status is RunStatus.RUNNING


def evaluation_changes_nothing(subject: Subject) -> None:
    one, two = subject.set_up(), subject.set_up()
    for _ in range(3):
        one.step(), two.step()
        for split in ("val", "test", "train"):
            assert dict(one.evaluate(split)) == dict(one.evaluate(split))
    assert numbers(one, 3) == numbers(two, 3)


def resume_equals_no_break(subject: Subject) -> None:
    learner = subject.set_up(seed=3)
    for _ in range(7):
        learner.step()
    state = learner.state_dict()
    assert plain(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    uninterrupted = numbers(learner, 6)
    buffer.seek(0)
    again = subject.set_up(seed=3)
    again.load_state_dict(torch.load(buffer, weights_only=True))
    assert numbers(again, 6) == uninterrupted


def seeds_decide(subject: Subject) -> None:
    assert numbers(subject.set_up(1), 4) == numbers(subject.set_up(1), 4)
    assert numbers(subject.set_up(1), 4) != numbers(subject.set_up(2), 4)


def leaves_the_global_random_state(subject: Subject) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    numbers(subject.set_up(), 2)
    assert torch.equal(torch.rand(3), expected)


def takes_random_draws(subject: Subject) -> None:
    generator = torch.Generator().manual_seed(0)
    space = subject.learner.space
    for _ in range(3):
        learner = subject.learner()
        learner.setup(subject.make_task(), space.sample(generator), seed=0)
        assert math.isfinite(learner.step()["loss"])


def bad_inputs_raise(subject: Subject) -> None:
    space = subject.learner.space
    name = next(iter(space))
    with pytest.raises(ValueError, match="unknown name 'no_such_name'"):
        subject.set_up(no_such_name=1)
    with pytest.raises((TypeError, ValueError), match=name):
        subject.set_up(**{name: "a text"})
    for name in space.grad:
        with pytest.raises(ValueError, match=name):
            subject.set_up(**{name: math.nan})
        with pytest.raises(ValueError, match=name):
            subject.set_up(**{name: -1e9})
    with pytest.raises(ValueError, match="seed"):
        subject.set_up(seed=-1)
    with pytest.raises(ValueError, match="split"):
        subject.set_up().evaluate("no_such_split")
    with pytest.raises(RuntimeError, match="call setup"):
        subject.learner().step()


def divergence_is_a_status(subject: Subject) -> None:
    """A loss that is not finite ends the run at the last weights where it was finite."""
    learner = subject.set_up()
    assert isinstance(learner, Trainer)
    learner.step()
    good = {name: value.clone() for name, value in learner.params.items()}
    learner.step()
    loss = learner.method.loss
    learner.method.loss = lambda *args: loss(*args) * math.nan  # type: ignore[method-assign]
    for _ in range(2):
        assert math.isnan(learner.step()["loss"])
        assert learner.status is RunStatus.DIVERGED
    learner.method.loss = loss  # type: ignore[method-assign]
    metrics = learner.step()
    assert (metrics.status, metrics.cost.gradients) == (RunStatus.DIVERGED, 0)
    assert all(torch.equal(good[name], value) for name, value in learner.params.items())
    assert learner.evaluate("val").status is RunStatus.DIVERGED
    resumed = subject.set_up()
    resumed.load_state_dict(learner.state_dict())
    assert resumed.step().status is RunStatus.DIVERGED
    assert dict(resumed.evaluate("val")) == dict(learner.evaluate("val"))


def a_huge_learning_rate_diverges(subject: Subject) -> None:
    space = subject.learner.space
    if "lr" not in space:
        pytest.skip("no learning rate")
    free = Space({**space, "lr": Float(1e-9, 1e38, log=True)})
    learner = subject.learner(free)
    learner.setup(subject.make_task(), {**subject.hparams, "lr": 1e36}, seed=0)
    losses = [learner.step() for _ in range(50)]
    assert (losses[-1].status is RunStatus.DIVERGED) == subject.diverges
    assert isinstance(learner, Trainer)
    assert all(value.isfinite().all() for value in learner.params.values())
    assert math.isfinite(learner.evaluate("train")["loss"])


def steps_are_those_of_unrolled(subject: Subject) -> None:
    """Trainer steps and the forward pass of an unrolled hypergradient: the same bits."""
    if not subject.ours:
        pytest.skip("a network of others")
    plainly, unrolled = (in_last_phase(subject.set_up()) for _ in range(2))
    for _ in range(4):
        plainly.step()
    estimator = Unrolled(unrolled.optimizer, steps=4)
    batches = unrolled.inner_batches(4)
    args = (unrolled.problem, unrolled.params, unrolled.hparams)
    found, state = estimator(
        *args, batches.__getitem__, unrolled.outer_batch(), estimator.init(*args)
    )
    unrolled.adopt(found.params, state["optimizer"], steps=4)
    assert all(torch.equal(plainly.params[k], v) for k, v in unrolled.params.items())
    assert numbers(plainly, 3) == numbers(unrolled, 3)


def smooth_hyperparameters_match_differences(subject: Subject) -> None:
    """Every `Grad` of the space, those that the sampler owns by default included."""
    if not subject.ours:
        pytest.skip("a network of others")
    space = subject.learner.space
    smooth = {name for name, domain in space.items() if isinstance(domain, Grad)}
    compare_with_differences(subject, smooth - set(subject.earlier), last=True)
    if subject.earlier:
        compare_with_differences(subject, set(subject.earlier), last=False)


def compare_with_differences(subject: Subject, names: set[str], last: bool) -> None:
    space = subject.learner.space
    others = [n for n in space.grad if n not in names]
    owned = space.own(**dict.fromkeys(names, "grad"), **dict.fromkeys(others, "sampler"))
    learner = subject.learner(owned)
    learner.setup(subject.make_task(torch.float64), {**subject.hparams, **subject.smooth}, seed=0)
    if last:
        in_last_phase(learner)
    for _ in range(2):
        learner.step()
    assert isinstance(learner, Trainer)
    batches = learner.inner_batches(4)
    report = check_hypergradient(
        Unrolled(learner.optimizer, steps=4),
        learner.problem,
        learner.params,
        learner.hparams,
        batches.__getitem__,
        learner.outer_batch(),
        tol=subject.tolerance,
    )
    assert {row.name for row in report.rows} >= {f"hparams[{name!r}]" for name in learner.hparams}
    assert report.passed, str(report)


def frozen_tensors_stay(subject: Subject) -> None:
    learner = in_last_phase(subject.set_up())
    before = {name: value.clone() for name, value in learner.frozen.items()}
    numbers(learner, 5)
    assert learner.frozen.keys() == before.keys()
    assert all(torch.equal(before[name], value) for name, value in learner.frozen.items())


def is_an_inner_level(subject: Subject) -> None:
    """`tune` runs on it, and the schedule has every value."""
    learner = in_last_phase(subject.set_up())
    assert isinstance(learner, Inner)
    result = tune(learner, Descent(), budget=6)
    assert result.schedule["step"][-1] > 0
    assert set(result.schedule.names) == set(learner.hparams)


CHECKS = [
    trains_and_evaluates,
    evaluation_changes_nothing,
    resume_equals_no_break,
    seeds_decide,
    leaves_the_global_random_state,
    takes_random_draws,
    bad_inputs_raise,
    divergence_is_a_status,
    a_huge_learning_rate_diverges,
    steps_are_those_of_unrolled,
    smooth_hyperparameters_match_differences,
    frozen_tensors_stay,
    is_an_inner_level,
]
