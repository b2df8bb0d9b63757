"""Allocators against brute force, and pruning in rounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from adapters import Trainer, artifacts, registry, tasks
from adapters.allocate import (
    erk,
    global_threshold,
    lamp,
    lamp_score,
    proportional,
    rate_distortion,
    uniform,
)
from adapters.pruning.rate_distortion import distortion_curves, kept_after, mask, masks, prune
from adapters.reparam import adaptable


@given(st.data())
def test_the_knapsack_is_the_brute_force_optimum(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(4, 19), min_size=3, max_size=3))
    curve = st.lists(st.floats(0, 10), min_size=7, max_size=7)
    curves = {str(i): data.draw(curve) for i in range(3)}
    kept = {str(i): [kept_after(n, d / 6) for d in range(7)] for i, n in enumerate(sizes)}
    budget = data.draw(st.integers(0, sum(sizes)))
    chosen = rate_distortion(curves, kept, budget)
    assert sum(kept[n][d] for n, d in chosen.items()) <= budget
    best = min(
        sum(curves[str(i)][d] for i, d in enumerate(points))
        for points in itertools.product(range(7), repeat=3)
        if sum(kept[str(i)][d] for i, d in enumerate(points)) <= budget
    )
    assert sum(curves[n][d] for n, d in chosen.items()) == pytest.approx(best, abs=1e-12)
    scaled = {n: [3.5 * x for x in c] for n, c in curves.items()}
    assert sum(curves[n][d] for n, d in rate_distortion(scaled, kept, budget).items()) == (
        pytest.approx(best, abs=1e-9)
    )


def test_equal_layers_get_equal_ratios() -> None:
    curve = [(d / 20) ** 2 for d in range(21)]
    kept = [kept_after(100, d / 20) for d in range(21)]
    chosen = rate_distortion(dict.fromkeys("abc", curve), dict.fromkeys("abc", kept), 150)
    assert max(chosen.values()) - min(chosen.values()) <= 1


@given(st.data())
def test_proportional_sums_respects_caps_and_is_proportional(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 5))
    caps = {str(i): data.draw(st.integers(0, 30)) for i in range(count)}
    weights = {n: data.draw(st.floats(0.01, 10)) for n in caps}
    budget = data.draw(st.integers(0, sum(caps.values())))
    counts = proportional(weights, caps, budget)
    assert sum(counts.values()) == budget
    assert all(0 <= counts[n] <= caps[n] for n in caps)
    free = [n for n in caps if counts[n] < caps[n] - 1]
    for one, two in itertools.combinations(free, 2):
        # Where no cap binds, shares differ from proportional ones by less than one entry.
        assert abs(counts[one] / weights[one] - counts[two] / weights[two]) <= (
            1 / weights[one] + 1 / weights[two] + 1e-9
        )


def test_baselines() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = {n: s * torch.randn(6, 5, generator=generator) for n, s in (("a", 1.0), ("b", 0.1))}
    assert uniform({"a": 30, "b": 30}, 21) == {"a": 11, "b": 10}
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    threshold = flat.sort(descending=True).values[19]
    expected = {n: int((w.abs() >= threshold).sum()) for n, w in weights.items()}
    assert global_threshold({n: w.abs() for n, w in weights.items()}, 20) == expected
    score = lamp_score(weights["a"])
    squares = weights["a"].double().square()
    for i, j in itertools.product(range(6), range(5)):
        rest = squares[squares >= squares[i, j]].sum()
        assert float(score[i, j]) == pytest.approx(float(squares[i, j] / rest), rel=1e-9)
    assert float(score.max()) == 1.0
    assert min(lamp(weights, 2).values()) == 1, "every layer keeps its largest weight"
    assert erk({"wide": (100, 100), "narrow": (4, 4)}, 1000) == {"wide": 984, "narrow": 16}


def test_curves_start_at_zero_and_leave_the_network_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    x = torch.randn(20, 6)
    expected = model.eval()(x)
    model.train()
    mask(model, ["0", "3"])
    mean = distortion_curves(model, x, [0.0, 0.5, 1.0])
    worst = distortion_curves(model, x, [0.0, 0.5, 1.0], "worst")
    assert model.training
    assert torch.equal(model.eval()(x), expected)
    for name in ("0", "3"):
        assert mean[name][0] == worst[name][0] == 0.0
        assert worst[name][2] >= mean[name][2] > 0
    empty = (expected - model[3].bias).detach().square().mean()
    assert mean["3"][2] == pytest.approx(float(empty), rel=1e-5)


@pytest.mark.parametrize("allocator", ["rate_distortion", "uniform", "global", "erk", "lamp"])
def test_rounds_reach_the_target_and_masks_only_shrink(allocator: str) -> None:
    learner = registry.get("layer_adaptive_pruning")()
    assert isinstance(learner, Trainer)
    values = {
        "allocator": allocator,
        "sparsity": 0.9,
        "fraction": 0.5,
        "round_steps": 3,
        "grid": 10,
    }
    learner.setup(tasks.get("digits_transfer"), values, seed=0)
    model = learner._assembly.model
    total = sum(m.mask.numel() for m in masks(model).values())
    before = {n: m.mask.clone() for n, m in masks(model).items()}
    for step in range(1, 16):
        learner.step()
        now = masks(model)
        assert all((now[n].mask <= before[n]).all() for n in now)
        before = {n: m.mask.clone() for n, m in now.items()}
        kept = sum(int(m.mask.sum()) for m in now.values())
        target = min(0.9, 1 - 0.5 ** (1 + step // 3))
        budget = int((1 - target) * total)
        slack = 0.03 * total if allocator == "rate_distortion" else 0
        assert budget - slack <= kept <= budget
    for name, layer in masks(model).items():
        assert not adaptable(model)[name].weight[layer.mask == 0].any()


@pytest.mark.slow
def test_ratios_by_distortion_beat_uniform_and_global_ones() -> None:
    """Accuracy of a pruned network, not trained again: rate-distortion ≈ LAMP > global > uniform.

    At 80 and 90 %, over four networks; at 95 % all are too bad to compare.
    """
    accuracy: dict[tuple[float, str], float] = {}
    ratios = [0.98 * i / 50 for i in range(51)]
    for seed in range(4):
        task = tasks.get("digits_rotated", seed=seed)
        net = artifacts.resolve(["source_net"], task, seed)["source_net"]
        assert isinstance(net, nn.Module)
        data, calibration = task.split("source_test"), task.split("source")["x"][:256]
        weights = {n: p.weight.detach().clone() for n, p in adaptable(net).items()}
        sizes = {n: w.numel() for n, w in weights.items()}
        layers = mask(net, weights)
        curves = distortion_curves(net, calibration, ratios, "worst")
        kept = {n: [kept_after(size, r) for r in ratios] for n, size in sizes.items()}
        for sparsity in (0.8, 0.9):
            budget = int((1 - sparsity) * sum(sizes.values()))
            points = rate_distortion(curves, kept, budget)
            found = {
                "rate_distortion": {n: kept[n][d] for n, d in points.items()},
                "lamp": lamp(weights, budget),
                "global": global_threshold({n: w.abs() for n, w in weights.items()}, budget),
                "uniform": uniform(sizes, budget),
            }
            for name, counts in found.items():
                for layer, value in prune(weights, counts).items():
                    layers[layer].mask.copy_(value)
                with torch.no_grad():
                    hits = net(data["x"]).argmax(1) == data["y"]
                key = (sparsity, name)
                accuracy[key] = accuracy.get(key, 0.0) + float(hits.double().mean()) / 4
            for layer in layers.values():
                layer.mask.fill_(1.0)
    for sparsity in (0.8, 0.9):
        best = accuracy[sparsity, "rate_distortion"]
        assert abs(best - accuracy[sparsity, "lamp"]) < 0.04
        assert best > accuracy[sparsity, "global"] > accuracy[sparsity, "uniform"]


CURVE = {"a": [0.0, 1.0]}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rate_distortion(CURVE, {"b": [1, 0]}, 1), "curves are for"),
        (lambda: rate_distortion(CURVE, {"a": [1]}, 1), "2 distortions for 1"),
        (lambda: rate_distortion({"a": [math.nan]}, {"a": [1]}, 1), "a: distortions must be fin"),
        # Once chosen as point 0, whatever it costs.
        (lambda: rate_distortion({"a": [0.0, math.inf]}, {"a": [5, 0]}, 2), "must be finite"),
        (lambda: rate_distortion(CURVE, {"a": [5, 3]}, 2), "budget 2 is below"),
        (lambda: rate_distortion(CURVE, {"a": [5, 3]}, 9, unit=0), "unit must be at least 1"),
        (lambda: proportional({"a": 1.0}, {"a": 3}, 4), "budget must lie in 0 ... 3, but got 4"),
        (lambda: proportional({"a": -1.0}, {"a": 3}, 2), "must not be negative"),
        (lambda: proportional({"a": 1.0}, {"b": 3}, 2), "but caps for"),
        (lambda: distortion_curves(nn.Linear(2, 2), torch.ones(1, 2), [0.0]), "carries no masks"),
    ],
)
def test_bad_input(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_empty_calibration_and_unknown_kinds() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    mask(model, ["0"])
    with pytest.raises(ValueError, match="at least one calibration sample"):
        distortion_curves(model, torch.ones(0, 2), [0.0])
    with pytest.raises(ValueError, match="kind must be"):
        distortion_curves(model, torch.ones(1, 2), [0.0], "median")  # type: ignore[arg-type]
