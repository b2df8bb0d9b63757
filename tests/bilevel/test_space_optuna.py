"""Spaces and Optuna: names, samplers, storage, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.distributions import (
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from bilevel import Choice, Fixed, Float, Grad, Int, Space, Switch
from tests.bilevel.strategies import owned, spaces

optuna.logging.set_verbosity(optuna.logging.WARNING)


def example() -> Space:
    return Space(
        lr=Grad(0.1, 1e-4, 1.0, "log"),
        wd=Grad(1e-2, 1e-6, 1e2, "log", shape=(2,)),
        drop=Grad(0.1, 0.0, 0.5, shape=(2, 2)),
        mix=Grad([0.2, 0.3, 0.5], scale="simplex", shape=(3,)),
        beta=Float(0.0, 0.99),
        arch=Choice("mlp", "cnn", 3),
        width=Int(16, 256, log=True, when={"arch": "mlp"}),
        depth=Int(2, 10, step=4, when={"arch": ("cnn", 3)}),
        norm=Switch(when={"depth": 6}),
        epochs=Fixed(20),
    ).own(wd="sampler", drop="shared", mix="sampler")


def equal(a: dict[str, Any], b: dict[str, Any], rtol: float = 0.0, atol: float = 0.0) -> None:
    assert a.keys() == b.keys()
    for name in a:
        if isinstance(a[name], torch.Tensor | float):
            torch.testing.assert_close(
                torch.as_tensor(a[name]), torch.as_tensor(b[name]), rtol=rtol, atol=atol
            )
        else:
            assert type(a[name]) is type(b[name])
            assert a[name] == b[name]


def test_names_and_distributions() -> None:
    log = FloatDistribution(1e-6, 1e2, log=True)
    unit = FloatDistribution(0.0, 1.0)
    assert example().to_optuna() == {
        "wd[0]": log,
        "wd[1]": log,
        "drop": FloatDistribution(0.0, 0.5),
        "mix[0]": unit,
        "mix[1]": unit,
        "beta": FloatDistribution(0.0, 0.99),
        "arch": CategoricalDistribution(("mlp", "cnn", 3)),
        "width@arch=mlp": IntDistribution(16, 256, log=True),
        "depth@arch=cnn|3": IntDistribution(2, 10, step=4),
        "norm@depth=6": CategoricalDistribution((False, True)),
    }


@pytest.mark.parametrize(
    "sampler",
    [
        optuna.samplers.TPESampler(seed=0, n_startup_trials=5),
        optuna.samplers.RandomSampler(seed=0),
        optuna.samplers.NSGAIISampler(seed=0, population_size=5),
    ],
    ids=lambda s: type(s).__name__,
)
def test_conditional_space_over_30_trials(
    sampler: optuna.samplers.BaseSampler, tmp_path: Path
) -> None:
    space = example()
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(sampler=sampler, storage=url, study_name="s")
    asked = []
    for _ in range(30):
        trial = study.ask()
        values = space.suggest(trial)
        equal(space.validate(values, complete=True), values)
        asked.append(values)
        study.tell(trial, float(values["wd"].log().sum()) + values["beta"])
    assert len({values["arch"] for values in asked}) >= 2
    assert all(("width" in values) == (values["arch"] == "mlp") for values in asked)
    stored = optuna.load_study(study_name="s", storage=url).trials
    for trial_, values in zip(stored, asked, strict=True):
        equal(space.values_from_params(trial_.params), values)


def test_ask_with_distributions_ignores_inactive_names() -> None:
    space = example()
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trial = study.ask(space.to_optuna())
    values = space.values_from_params(trial.params)
    assert ("width" in values) != ("depth" in values)


def test_grid_sampler_covers_the_grid() -> None:
    space = Space(a=Choice("x", "y"), b=Switch(), lr=Grad(0.1, 0.0, 1.0))
    grid = {label: list(d.choices) for label, d in space.to_optuna().items()}  # type: ignore[attr-defined]
    study = optuna.create_study(sampler=optuna.samplers.GridSampler(grid, seed=0))
    seen = []
    study.optimize(lambda trial: seen.append(space.suggest(trial)) or 0.0, n_trials=4)  # type: ignore[func-returns-value]
    assert {(v["a"], v["b"]) for v in seen} == {(a, b) for a in "xy" for b in (False, True)}


def test_cma_es_on_a_tensor() -> None:
    pytest.importorskip("cmaes", reason="Optuna's CmaEsSampler needs the cmaes package")
    space = Space(wd=Grad(1e-1, 1e-6, 1e2, "log", shape=(2,))).own(wd="sampler")
    study = optuna.create_study(sampler=optuna.samplers.CmaEsSampler(seed=0))
    study.optimize(
        lambda trial: float((space.suggest(trial)["wd"].log10() + 2).square().sum()), n_trials=60
    )
    assert study.best_value < 0.1


def test_a_seeded_sampler_sees_the_same_space_again() -> None:
    runs = []
    for _ in range(2):
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=7))
        runs.append(example().suggest(study.ask()))
    equal(runs[0], runs[1])


def test_enqueued_values_are_tried_first() -> None:
    space = example()
    wanted = space.validate({"arch": "cnn", "depth": 6, "norm": True, "wd": [1e-3, 1.0]})
    study = optuna.create_study()
    params = space.to_params(wanted)
    assert params["norm@depth=6"] is True
    assert "width@arch=mlp" not in params
    study.enqueue_trial(params)
    equal(space.suggest(study.ask()), wanted, rtol=1e-6)


@given(owned(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=80)
def test_params_round_trip(space: Space, seed: int) -> None:
    space = space.without(*(n for n in space if isinstance(space[n], Fixed)))
    values = space.validate(space.sample(torch.Generator().manual_seed(seed)), dtype=torch.float64)
    params = space.to_params(values)
    distributions = space.to_optuna()
    assert params.keys() <= distributions.keys()
    trial = optuna.trial.FixedTrial(params)
    equal(space.suggest(trial), space.values_from_params(params))
    again = space.validate(space.values_from_params(params), dtype=torch.float64)
    equal(again, values, rtol=1e-6, atol=1e-6)


@given(spaces(only_sampled=True))
@settings(deadline=None, max_examples=60)
def test_distributions_round_trip(space: Space) -> None:
    distributions = space.to_optuna()
    again = Space.from_optuna(distributions)
    assert again.to_optuna() == distributions
    assert again.order == space.order


def test_from_optuna_rebuilds_tensors_and_conditions() -> None:
    again = Space.from_optuna(example().to_optuna())
    assert isinstance(again["wd"], Grad)
    assert again["wd"].value_shape == (2,)
    assert again.owner("wd") == "sampler"
    assert again["depth"] == Int(2, 10, step=4, when={"arch": ("cnn", 3)})
    assert again["norm"] == Switch(when={"depth": 6})
    assert again.to_optuna() == example().to_optuna()


@pytest.mark.parametrize(
    ("distributions", "error", "message"),
    [
        ({"a": FloatDistribution(0, 1, step=0.5)}, ValueError, "'a' has a step, which Float has"),
        ({"a": IntDistribution(3, 3)}, ValueError, "'a' has one value only; use Fixed"),
        ({"a": 0.5}, TypeError, "'a' must be an Optuna distribution, but got 0.5"),
        ({"a b": FloatDistribution(0, 1)}, ValueError, "'a b' must be an identifier"),
        ({"w[0]": FloatDistribution(0, 1), "w[2]": FloatDistribution(0, 1)}, ValueError, "2 of 3"),
        (
            {"w[0]": FloatDistribution(0, 1), "w[1]": FloatDistribution(0, 2)},
            ValueError,
            "w: all elements must be floating with the same range",
        ),
        (
            {"w[0]": FloatDistribution(0, 1), "w": FloatDistribution(0, 1)},
            ValueError,
            "'w' is there",
        ),
        (
            {"n@a=x": IntDistribution(1, 2)},
            ValueError,
            "n is conditional on 'a', which is not there",
        ),
        (
            {"a": CategoricalDistribution(("x",)), "n@a=y": IntDistribution(1, 2)},
            ValueError,
            "n is conditional on a=y, but a is Choice",
        ),
    ],
)
def test_from_optuna_refuses(
    distributions: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Space.from_optuna(distributions)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bta": 0.5}, ValueError, "params: unknown name 'bta'; did you mean 'beta'"),
        ({"beta": 2.0}, ValueError, r"beta must be in \[0.0, 0.99\], but got 2.0"),
        ({"wd[1]": "x"}, TypeError, r"wd\[1\] must be a number, but got 'x'"),
        ({"beta": None}, TypeError, "beta must be a number, but got None"),
    ],
)
def test_bad_params(change: dict[str, Any], error: type[Exception], message: str) -> None:
    space = example()
    with pytest.raises(error, match=message):
        space.values_from_params({**space.to_params({}), **change})
    with pytest.raises(ValueError, match="'beta' is missing"):
        space.values_from_params({n: v for n, v in space.to_params({}).items() if n != "beta"})


def test_roundings_at_a_bound_are_no_errors() -> None:
    space = Space(lr=Float(1e-4, 0.1, log=True), wd=Grad(0.05, 0.0, 0.1, shape=(2,)))
    space = space.own(wd="sampler")
    above = 0.1 * (1 + 1e-15)  # exp(log(0.1)) may be that
    params = {"lr": above, "wd[0]": 0.1, "wd[1]": 0.0}
    values = space.values_from_params(params)
    assert values["lr"] == 0.1
    assert float(values["wd"][0]) > 0.1  # in float32
    assert space.to_params(values) == {"lr": 0.1, "wd[0]": 0.1, "wd[1]": 0.0}
    with pytest.raises(ValueError, match=r"lr must be in \[0.0001, 0.1\], but got 0.1001"):
        space.values_from_params({**params, "lr": 0.1001})


def test_options_with_reserved_characters_stay_unambiguous() -> None:
    space = Space(
        opt=Choice("a|b", "a", "b", "c=1&d@e[0]/100%"),
        x=Float(0, 1, when={"opt": "a|b"}),
        y=Float(0, 1, when={"opt": ("a", "b")}),
        z=Float(0, 1, when={"opt": "c=1&d@e[0]/100%"}),
    )
    labels = list(space.to_optuna())
    assert labels[1:3] == ["x@opt=a%7Cb", "y@opt=a|b"]
    assert dict(Space.from_optuna(space.to_optuna())) == dict(space)


def test_uniform_coordinates_are_uniform_on_the_simplex() -> None:
    """Moments of a flat Dirichlet distribution: mean 1/n, variance (n - 1)/(n²(n + 1))."""
    n = 4
    space = Space(p=Grad([0.25] * n, scale="simplex", shape=(n,))).own(p="sampler")
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([space.sample(generator)["p"] for _ in range(4000)]).double()
    variance = (n - 1) / (n**2 * (n + 1))
    torch.testing.assert_close(
        draws.mean(0), torch.full((n,), 1 / n).double(), rtol=0, atol=4 * (variance / 4000) ** 0.5
    )
    torch.testing.assert_close(draws.var(0), torch.full((n,), variance).double(), rtol=0.1, atol=0)


def test_random_draws_follow_their_scale() -> None:
    space = Space(a=Float(1e-4, 1.0, log=True), b=Float(-1.0, 3.0), i=Int(1, 3), c=Choice("x", "y"))
    generator = torch.Generator().manual_seed(0)
    draws = [space.sample(generator) for _ in range(3000)]
    share = [sum(v["a"] < t for v in draws) / 3000 for t in (1e-3, 1e-2, 1e-1)]
    assert share == pytest.approx([0.25, 0.5, 0.75], abs=0.04)
    assert sum(v["b"] for v in draws) / 3000 == pytest.approx(1.0, abs=0.1)
    for value in (1, 2, 3):
        assert sum(v["i"] == value for v in draws) / 3000 == pytest.approx(1 / 3, abs=0.04)
    assert sum(v["c"] == "x" for v in draws) / 3000 == pytest.approx(0.5, abs=0.04)
