"""The data side: streams, worker processes with perturbed hyperparameters, regularizers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset

from bilevel import Grad, ModuleInner, SelfTuning, Space, tune
from bilevel.self_tuning import (
    AugmentedDataset,
    HyperSource,
    activation_penalty,
    cutout,
    loader_stream,
    mixup,
    noisy,
    smoothed_cross_entropy,
    temporal_penalty,
)
from bilevel.self_tuning.data import Stream

SPACE = Space(
    noise=Grad(0.3, low=0.0, high=2.0),
    length=Grad(2.0, low=0.0, high=4.0),
    drop=Grad(0.2, low=0.0, high=0.8),
)


def augment(example: tuple[Tensor, Tensor], values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Add noise, and set the first entries to zero: an integer strength."""
    x, y = example
    x = x + values["noise"] * torch.randn_like(x)
    return {"x": x.masked_fill(torch.arange(len(x)) < values["length"], 0.0), "y": y}


def data(count: int, seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=g)
    return {"x": x, "y": (x[:, 5] > 0).long()}


def source(**options: Any) -> HyperSource:
    return HyperSource(SPACE, ["noise", "length"], integers=["length"], **options)


def dataset(where: HyperSource, *, perturbed: bool) -> AugmentedDataset:
    train = data(48, 0)
    return AugmentedDataset(
        TensorDataset(train["x"], train["y"]), augment, where, perturbed=perturbed
    )


@given(rows=st.integers(1, 40), size=st.integers(1, 12), epochs=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_each_epoch_visits_rows_once(rows: int, size: int, epochs: int) -> None:
    split = {"x": torch.arange(rows), "y": torch.arange(rows) * 2}
    stream = Stream("train", split, size, seed=3)
    batch = min(rows, size)
    per_epoch = rows // batch
    for epoch in range(epochs):
        drawn = [stream(epoch * per_epoch + i) for i in range(per_epoch)]
        seen = torch.cat([b["x"] for b in drawn]).tolist()
        assert len(set(seen)) == len(seen) == per_epoch * batch
        assert all(torch.equal(b["y"], 2 * b["x"]) for b in drawn)
    # Addressed by number: asking again, in another order, gives the same.
    again = Stream("train", split, size, seed=3)
    for t in reversed(range(epochs * per_epoch)):
        assert torch.equal(again(t)["x"], stream(t)["x"])


def test_examples_carry_the_point_that_they_were_made_at() -> None:
    where = source()
    where.update(where.center, torch.tensor([0.5, 1.0, 0.5]))
    still = dataset(where, perturbed=False)
    for i in range(5):
        assert torch.equal(still[i]["coordinates"], where.center)
    moving = dataset(where, perturbed=True)
    points = torch.stack([moving[i % 48]["coordinates"] for i in range(4000)])
    assert torch.allclose(points.mean(0), where.center, atol=0.06)
    assert torch.allclose(points.std(0), where.sigma, rtol=0.06)
    for i in range(20):  # zeros in front, as many as the rounded value says
        item = moving[i]
        expected = where.layout.values(item["coordinates"])["length"]
        assert int((item["x"] == 0).sum()) == int(expected)


def test_names_of_the_batch_are_not_perturbed_by_workers() -> None:
    where = source(per_batch=["drop"])
    where.update(where.center, torch.ones(3))
    point, _ = where.draw(perturbed=True)
    assert point[2] == where.center[2]
    assert (point[:2] != where.center[:2]).all()
    with pytest.raises(ValueError, match="'noise' must be owned by the gradient and not in per_b"):
        source(per_batch=["noise"])


@pytest.mark.parametrize(("mode", "workers"), [("stn", 0), ("delta", 1)])
def test_augmentation_in_worker_processes(mode: Any, workers: int) -> None:
    where = source()
    loaders = {
        name: DataLoader(
            dataset(where, perturbed=name == "perturbed"), batch_size=12, shuffle=True,
            num_workers=workers, drop_last=True, persistent_workers=workers > 0,
        )
        for name in ("train", "perturbed")
    }  # fmt: skip
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2))
    subject = ModuleInner(
        net, SPACE, dropout={"2": "drop"}, integers=["length"], source=where,
        loss=lambda out, values, batch: F.cross_entropy(out, batch["y"], reduction="none"),
        outer_loss=lambda out, batch: F.cross_entropy(out, batch["y"], reduction="none"),
        train=loader_stream(loaders["train"]), perturbed=loader_stream(loaders["perturbed"]),
        val=data(40, 1), test=data(40, 2),
    )  # fmt: skip
    before = where.center.clone()
    found = tune(subject, SelfTuning(mode=mode, train_steps=2, lr=0.05), 12)
    assert float(found.trace[-1]["grad_norm/noise"] or 0) > 0
    assert not torch.equal(where.center, before)
    assert bool((where.sigma > 0).all())
    for loader in loaders.values():
        loader._iterator = None


def test_a_perturbed_stream_must_say_where_it_is() -> None:
    subject = ModuleInner(
        nn.Linear(6, 2), SPACE.fix(drop=0.1, length=2.0),
        predict=lambda m, v, b: m(noisy(b["x"], v["noise"]) if m.training else b["x"]),
        loss=lambda out, values, batch: F.cross_entropy(out, batch["y"], reduction="none"),
        outer_loss=lambda out, batch: F.cross_entropy(out, batch["y"]),
        train=data(20, 0), perturbed=data(20, 3), val=data(40, 1), test=data(40, 2),
    )  # fmt: skip
    with pytest.raises(ValueError, match="must have the entry 'coordinates'"):
        tune(subject, SelfTuning(), 10)


# Regularizers, one strength for each example.


def test_smoothed_cross_entropy() -> None:
    torch.manual_seed(0)
    logits, y = torch.randn(5, 4).double(), torch.tensor([0, 3, 1, 1, 2])
    eps = torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9]).double()
    found = smoothed_cross_entropy(logits, y, eps)
    for b in range(5):
        expected = F.cross_entropy(logits[b : b + 1], y[b : b + 1], label_smoothing=float(eps[b]))
        assert found[b].item() == pytest.approx(expected.item(), rel=1e-12)
    shares = F.one_hot(y, 4).double()
    assert torch.allclose(smoothed_cross_entropy(logits, shares, eps), found)


def test_noise_has_one_deviation_per_example() -> None:
    torch.manual_seed(0)
    x = torch.zeros(3, 20_000)
    found = noisy(x, torch.tensor([0.0, 0.5, 2.0])).std(1)
    assert torch.allclose(found, torch.tensor([0.0, 0.5, 2.0]), rtol=0.03)


def test_cutout_hides_squares() -> None:
    torch.manual_seed(0)
    x = torch.ones(4, 2, 12, 12)
    found = cutout(x, torch.tensor([0.0, 3.0, 3.0, 12.0]), torch.tensor([2.0, 0.0, 1.0, 4.0]))
    hidden = (found == 0).flatten(1).sum(1)
    assert hidden[:2].tolist() == [0, 0]
    assert torch.equal(found[:, 0], found[:, 1])  # the same hole in all channels
    assert 2 * 4 <= hidden[2] <= 2 * 9  # parts outside of the image are cut off
    areas = []
    for _ in range(200):
        areas.append(int((cutout(x[:1], 3.0, 1.0) == 0).sum()) / 2)
    assert max(areas) == 9
    assert hidden[3] > 2 * 12 * 6


def test_mixup_is_a_convex_combination() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(50, 3), torch.randint(0, 4, (50,))
    mixed, shares = mixup(x, y, 4, torch.full((50,), 0.7))
    assert torch.allclose(shares.sum(1), torch.ones(50))
    own = shares.gather(1, y[:, None])
    assert bool((own >= 0.5 - 1e-6).all())
    none, labels = mixup(x, y, 4, 0.0)  # a strength of zero leaves all but a few as they are
    assert (none - x).abs().amax(1).lt(0.01).float().mean() > 0.9
    assert (labels - F.one_hot(y, 4)).abs().amax(1).lt(0.01).float().mean() > 0.9
    assert not torch.allclose(mixed, x, atol=0.2)


def test_activation_penalties() -> None:
    h = torch.arange(12.0).view(2, 3, 2)
    assert activation_penalty(h).tolist() == [h[0].square().mean(), h[1].square().mean()]
    assert temporal_penalty(h).tolist() == [4.0, 4.0]
    assert math.isclose(float(temporal_penalty(torch.ones(1, 4, 2))), 0.0)
