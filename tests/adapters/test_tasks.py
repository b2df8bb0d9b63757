"""Tasks: splits, wrong labels, fingerprints and bad options."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters import Classification, tasks


@pytest.mark.parametrize("name", tasks.names())
def test_splits_are_disjoint_complete_and_stratified(name: str) -> None:
    task = tasks.get(name, seed=4)
    assert isinstance(task, Classification)
    rows = [tuple(row.flatten().tolist()) for s in task.splits.values() for row in s["x"]]
    sizes = {n: len(s["y"]) for n, s in task.splits.items()}
    assert sum(sizes.values()) == {"digits": 1797, "breast_cancer": 569}[name]
    # Some digits are pixel for pixel equal; a split never holds a sample twice.
    assert len(rows) - len(set(rows)) < 5
    shares = [
        torch.bincount(s["y"], minlength=task.n_classes) / len(s["y"]) for s in task.splits.values()
    ]
    assert all(torch.allclose(share, shares[0], atol=0.02) for share in shares)


@pytest.mark.parametrize("noise", [0.0, 0.3, 0.9])
def test_exactly_the_marked_training_labels_are_wrong(noise: float) -> None:
    clean, noisy = tasks.get("digits", seed=2), tasks.get("digits", seed=2, noise=noise)
    for split in ("train", "val", "test"):
        assert torch.equal(clean.split(split)["x"], noisy.split(split)["x"])
    wrong = clean.split("train")["y"] != noisy.split("train")["y"]
    assert torch.equal(wrong, noisy.corrupted)
    assert int(wrong.sum()) == round(600 * noise)
    for split in ("val", "test"):
        assert torch.equal(clean.split(split)["y"], noisy.split(split)["y"])


def test_seeds_decide_and_are_fingerprinted() -> None:
    one, same, other = (tasks.get("digits", noise=0.2, seed=s) for s in (1, 1, 2))
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert torch.equal(one.split("train")["y"], same.split("train")["y"])
    assert not torch.equal(one.split("train")["x"], other.split("train")["x"])
    assert one.fingerprint != tasks.get("digits", noise=0.1, seed=1).fingerprint


def test_standardized_by_the_training_samples() -> None:
    x = tasks.get("breast_cancer").split("train")["x"].double()
    assert torch.allclose(x.mean(0), torch.zeros(30).double(), atol=1e-5)
    assert torch.allclose(x.std(0, correction=0), torch.ones(30).double(), atol=1e-5)


def test_conversion_keeps_labels() -> None:
    task = tasks.get("digits").to(torch.float64)
    assert task.dtype == torch.float64
    assert task.split("val")["y"].dtype == torch.int64


def test_measure_is_per_sample() -> None:
    task = tasks.get("digits")
    logits, y = torch.randn(7, 10), torch.arange(7)
    found = task.measure(logits, {"y": y})
    assert torch.allclose(found["loss"], torch.logsumexp(logits, 1) - logits[range(7), y])
    assert found["accuracy"].tolist() == (logits.argmax(1) == y).float().tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 1.0}, r"noise must lie in \[0, 1\), but got 1.0"),
        ({"noise": -0.1}, "but got -0.1"),
        ({"n_train": 3}, "n_train must be at least 10, one per class, but got 3"),
        ({"n_train": 1500, "n_val": 297}, "must leave at least 10 of the 1797"),
        ({"seed": -1}, "seed"),
        ({"noize": 0.1}, "has no option 'noize'.*noise"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tasks.get("digits", **options)


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown task 'digit'.*digits"):
        tasks.get("digit")
    with pytest.raises(ValueError, match=r"unknown split 'vall'.*val"):
        tasks.get("digits").split("vall")
