"""Spaces and Ray Tune search spaces; no Ray runtime is started."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ray import tune
from ray.tune.search import sample
from ray.tune.search.variant_generator import generate_variants

from bilevel import Choice, Fixed, Float, Grad, Int, Space, Switch
from tests.bilevel.strategies import owned, spaces


def example() -> Space:
    return Space(
        lr=Grad(0.1, 1e-4, 1.0, "log"),
        wd=Grad(1e-2, 1e-6, 1e2, "log", shape=(2,)),
        beta=Float(0.0, 0.99),
        arch=Choice("mlp", "cnn"),
        width=Int(16, 256, log=True, when={"arch": "mlp"}),
        depth=Int(2, 10, step=2, when={"arch": "cnn"}),
        odd=Int(1, 9, step=4),
        heads=Int(1, 4),
        norm=Switch(),
        epochs=Fixed(20),
    ).own(wd="sampler")


def signature(entry: Any) -> tuple[Any, ...]:
    sampler = entry.get_sampler()
    if isinstance(entry, sample.Categorical):
        return ("choice", tuple((type(c), c) for c in entry.categories), str(sampler))
    quantum = (sampler.q, str(sampler.sampler)) if isinstance(sampler, sample.Quantized) else ()
    return (type(entry).__name__, entry.lower, entry.upper, type(sampler).__name__, *quantum)


def test_domains() -> None:
    got = {label: signature(entry) for label, entry in example().to_ray().items()}
    want = {
        "wd[0]": tune.loguniform(1e-6, 1e2),
        "wd[1]": tune.loguniform(1e-6, 1e2),
        "beta": tune.uniform(0.0, 0.99),
        "arch": tune.choice(["mlp", "cnn"]),
        "width@arch=mlp": tune.lograndint(16, 257),
        "depth@arch=cnn": tune.qrandint(2, 10, 2),
        "odd": tune.choice([1, 5, 9]),
        "heads": tune.randint(1, 5),
        "norm": tune.choice([False, True]),
    }
    assert got == {label: signature(entry) for label, entry in want.items()}


def test_integer_bounds_are_inclusive_on_both_sides() -> None:
    space = Space(
        i=Int(1, 3), log=Int(1, 3, log=True), grid=Int(4, 12, step=4), odd=Int(1, 9, step=4)
    )
    rng = np.random.RandomState(0)
    draws = {n: {d.sample(random_state=rng) for _ in range(200)} for n, d in space.to_ray().items()}
    assert draws == {"i": {1, 2, 3}, "log": {1, 2, 3}, "grid": {4, 8, 12}, "odd": {1, 5, 9}}


def test_configs_of_ray_become_values() -> None:
    space = example()
    seen = set()
    for _ in range(40):
        (_, config) = next(iter(generate_variants({"config": space.to_ray()})))
        values = space.values_from_params(config["config"])
        space.validate(values, complete=True)
        assert ("width" in values) == (values["arch"] == "mlp") == ("depth" not in values)
        seen.add(values["arch"])
    assert seen == {"mlp", "cnn"}


@given(owned(), st.integers(0, 2**31 - 1))
@settings(deadline=None, max_examples=80)
def test_every_draw_is_valid(space: Space, seed: int) -> None:
    rng = np.random.RandomState(seed)
    config = {label: entry.sample(random_state=rng) for label, entry in space.to_ray().items()}
    values = space.values_from_params(config)
    space.validate(values, complete=True)
    assert all(not isinstance(v, torch.Tensor) or v.dtype == torch.float32 for v in values.values())


@given(spaces(only_sampled=True))
@settings(deadline=None, max_examples=60)
def test_round_trip(space: Space) -> None:
    entries = space.to_ray()
    again = Space.from_ray(entries)
    assert {n: signature(e) for n, e in again.to_ray().items()} == {
        n: signature(e) for n, e in entries.items()
    }


def test_from_ray() -> None:
    space = Space.from_ray(
        {
            "lr": tune.loguniform(1e-4, 1.0),
            "n": tune.randint(1, 5),
            "k": tune.qrandint(3, 17, 5),
            "s": tune.choice([False, True]),
            "c": tune.choice([0, 1]),
            "epochs": 20,
        }
    )
    assert dict(space) == {
        "lr": Float(1e-4, 1.0, log=True),
        "n": Int(1, 4),
        "k": Int(5, 15, step=5),
        "s": Switch(),
        "c": Choice(0, 1),
        "epochs": Fixed(20),
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (tune.randn(0, 1), "'a' must be tune.uniform.* but got Float with sampler Normal"),
        (tune.quniform(0.0, 1.0, 0.5), "but got Float with sampler"),
        (tune.grid_search([1, 2]), "but got {'grid_search'"),
        (tune.sample_from(lambda config: 1), "but got Function"),
        ({"b": tune.uniform(0, 1)}, "but got {'b'"),
    ],
)
def test_from_ray_refuses(entry: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space.from_ray({"a": entry})


def test_optuna_search_of_ray_accepts_the_space() -> None:
    optuna_search = pytest.importorskip("ray.tune.search.optuna")
    space = example()
    search = optuna_search.OptunaSearch(metric="loss", mode="min", seed=0)
    assert search.set_search_properties("loss", "min", space.to_ray())
    for i in range(5):
        config = search.suggest(str(i))
        space.validate(space.values_from_params(config), complete=True)
        search.on_trial_complete(str(i), {"loss": float(i)})
