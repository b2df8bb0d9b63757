"""Hypergradients of our update rules, with every option, against textbook autograd in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import optree
import pytest
import torch
from torch import Tensor

from hypergrad import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Forward,
    HigherUnrolled,
    Hyper,
    Lion,
    Optimizer,
    RMSprop,
    Unrolled,
)
from tests.hypergrad.naive import adagrad, adam, error, lion, rmsprop, sgd, unroll
from tests.hypergrad.naive import with_optimizer_hparams as with_numbers
from tests.hypergrad.problems import CASES, Case


@dataclass(frozen=True)
class Rule:
    """One of our rules, its textbook form, and values of all its numbers to tune."""

    make: type[Optimizer]
    textbook: Callable[..., Tensor]
    always: dict[str, float]
    optional: dict[str, float]
    flags: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    """Options of the textbook form alone."""

    def combinations(self) -> Iterator[tuple[dict[str, float], dict[str, bool]]]:
        """Every set of optional numbers, the others at their default, with every set of flags."""
        switches = (*self.flags, "maximize")
        for kept in itertools.product((False, True), repeat=len(self.optional)):
            numbers = {**self.always, **dict(itertools.compress(self.optional.items(), kept))}
            for on in itertools.product((False, True), repeat=len(switches)):
                flags = dict(itertools.compress(zip(switches, itertools.repeat(True)), on))
                if "momentum" not in numbers and (flags.get("nesterov") or "dampening" in numbers):
                    continue  # torch ignores dampening without momentum
                if "nesterov" in flags and "dampening" in numbers:
                    continue
                yield numbers, flags

    def ours(self, values: dict[str, Any], flags: dict[str, bool]) -> Optimizer:
        """Our rule with these values."""
        values = dict(values)
        if "beta1" in values:
            values["betas"] = (values.pop("beta1"), values.pop("beta2"))
        return self.make(**values, **flags)

    def theirs(self, flags: dict[str, bool]) -> Callable[..., Tensor]:
        """The textbook form."""
        sign = -1 if "maximize" in flags else 1
        options = {**self.fixed, **{k: v for k, v in flags.items() if k != "maximize"}}

        def step(w: Tensor, g: Tensor, state: dict[str, Any], **values: Any) -> Tensor:
            return self.textbook(w, sign * g, state, **values, **options)

        return step


BETAS = {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2}
RULES = {
    "SGD": Rule(
        SGD,
        sgd,
        {"lr": 0.1},
        {"momentum": 0.8, "dampening": 0.2, "weight_decay": 0.05},
        ("nesterov",),
    ),
    "Adam": Rule(Adam, adam, BETAS, {"weight_decay": 0.05}, ("amsgrad",)),
    "AdamW": Rule(
        AdamW, adam, {**BETAS, "weight_decay": 0.05}, {}, ("amsgrad",), {"decoupled": True}
    ),
    "RMSprop": Rule(
        RMSprop,
        rmsprop,
        {"lr": 0.02, "alpha": 0.9, "eps": 1e-2},
        {"weight_decay": 0.05, "momentum": 0.8},
        ("centered",),
    ),
    "Adagrad": Rule(
        Adagrad,
        adagrad,
        {"lr": 0.1, "eps": 1e-2},
        {"lr_decay": 0.3, "weight_decay": 0.05, "initial_accumulator_value": 0.1},
    ),
}


def run(case: Case, estimator: Any) -> Any:
    start = estimator.init(case.problem, case.params, case.hparams)
    found, _ = estimator(case.problem, case.params, case.hparams, case.inner, case.outer, start)
    return found


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def per_element(case: Case, value: float, seed: int) -> Any:
    """One entry per element of params, all different."""
    generator = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        noise = torch.rand(t.shape, generator=generator, dtype=t.dtype)
        return (value * (0.9 + 0.1 * noise)).requires_grad_()

    return optree.tree_map(draw, case.params)


def lookup(numbers: Any, names: list[str] | None = None) -> Callable[[Any, int], dict[str, Any]]:
    """Values of the i-th tensor for `unroll`: scalars, or trees with these names."""
    if names is None:
        return lambda h, i: {k: h[k] for k in numbers}
    return lambda h, i: {k: h[k][names[i]] for k in numbers}


@pytest.mark.parametrize("name", RULES)
def test_every_number_with_every_option(name: str) -> None:
    rule, plain = RULES[name], CASES["mlp"]()
    for numbers, flags in rule.combinations():
        case = with_numbers(plain, **{k: scalar(v) for k, v in numbers.items()})
        expected, last, _ = unroll(case, rule.theirs(flags), lookup(numbers), steps=6)
        ours = rule.ours({k: Hyper(k) for k in numbers}, flags)
        found = run(case, Unrolled(ours, 6, memory="segments"))
        assert error(found.grad["loss"], expected["loss"]) < 1e-12, (numbers, flags)
        for key in numbers:
            assert error(found.grad[key], expected[key]) < 1e-12, (key, numbers, flags)
        assert error(found.params, last) < 1e-14


@pytest.mark.parametrize("name", RULES)
def test_every_number_per_element_with_every_option(name: str) -> None:
    rule, plain = RULES[name], CASES["mlp"]()
    names = sorted(plain.params)
    for numbers, flags in rule.combinations():
        trees = {k: per_element(plain, v, i) for i, (k, v) in enumerate(numbers.items())}
        case = with_numbers(plain, **trees)
        expected, _, _ = unroll(case, rule.theirs(flags), lookup(numbers, names), steps=4)
        found = run(case, Unrolled(rule.ours({k: Hyper(k) for k in numbers}, flags), 4))
        for key in ("loss", *numbers):
            assert error(found.grad[key], expected[key]) < 1e-12, (key, numbers, flags)


@pytest.mark.parametrize("name", RULES)
def test_other_estimators_through_the_same_rules(name: str) -> None:
    """Forward mode, and a patched module of `higher`, differentiate `update` by autograd."""
    rule = RULES[name]
    numbers = {**rule.always, **rule.optional}
    ours = rule.ours({k: Hyper(k) for k in numbers}, {})
    case = with_numbers(CASES["ridge"](), **{k: scalar(v) for k, v in numbers.items()})
    reverse = run(case, Unrolled(ours, 5)).grad
    assert error(run(case, Forward(ours, 5)).grad, reverse) < 1e-12

    patched = CASES["tied_and_frozen"]()
    fixed = rule.ours(numbers, {})
    reverse = run(patched, Unrolled(fixed, 4)).grad
    assert error(run(patched, HigherUnrolled(fixed, 4)).grad, reverse) < 1e-12


@pytest.mark.parametrize("maximize", [False, True])
def test_lion_passes_a_derivative_through_rate_decay_and_start_only(maximize: bool) -> None:
    rule, plain = Rule(Lion, lion, {}, {}), CASES["mlp"]()
    numbers = {"lr": 0.02, "weight_decay": 0.3}
    flags = {"maximize": True} if maximize else {}
    ours = rule.ours({k: Hyper(k) for k in numbers}, flags)
    scalars = {k: scalar(v) for k, v in numbers.items()}
    trees = {k: per_element(plain, v, 0) for k, v in numbers.items()}
    for values, names in ((scalars, None), (trees, sorted(plain.params))):
        case = with_numbers(plain, **values)
        expected, last, _ = unroll(case, rule.theirs(flags), lookup(numbers, names), steps=6)
        found = run(case, Unrolled(ours, 6))
        assert error(found.params, last) < 1e-14
        for key in numbers:
            assert error(found.grad[key], expected[key]) < 1e-12
        for leaf in optree.tree_leaves(found.grad["loss"]):
            assert not leaf.any()


def test_lion_refuses_betas_that_ask_for_a_derivative() -> None:
    case = with_numbers(CASES["mlp"](), beta=scalar(0.9))
    for betas, key in (((Hyper("beta"), 0.99), "beta1"), ((0.9, Hyper("beta")), "beta2")):
        with pytest.raises(ValueError, match=f"Lion {key} cannot be tuned by a hypergradient: it"):
            run(case, Unrolled(Lion(0.1, betas), 3))
    fixed = Lion(0.1, (torch.tensor(0.9), torch.tensor(0.99)))
    assert error(run(CASES["mlp"](), Unrolled(fixed, 3)).params, CASES["mlp"]().params) > 0


def test_start_of_the_accumulator_matters_at_the_first_step_only() -> None:
    rule = Adagrad(0.1, initial_accumulator_value=Hyper("start"), eps=1e-2)
    case = with_numbers(CASES["mlp"](), start=scalar(0.2))
    estimator: Any = Unrolled(rule, 3)
    arguments = (case.problem, case.params, case.hparams, case.inner, case.outer)
    first, state = estimator(*arguments, estimator.init(*arguments[:3]))
    assert first.grad["start"] != 0
    second, _ = estimator(*arguments, state)
    assert second.grad["start"] == 0
