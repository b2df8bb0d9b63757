"""Turns arrays into a classification task: a stratified split, and wrong training labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.tasks.task import Classification, Split
from bilevel.checks import integer, real

__all__ = ["classification", "halves", "partition", "standardized"]

Indices = NDArray[np.int64]


def partition(
    y: NDArray[Any], *, seed: int, n_train: int, n_val: int, held_out: int = 0
) -> tuple[Indices, Indices, Indices]:
    """Return the rows of train, val and test: a stratified split.

    Args:
        y: classes 0 ... k − 1, shape (samples,).
        seed: decides the split.
        n_train: training samples.
        n_val: validation samples.
        held_out: the test split is the last `held_out` rows; 0 makes it of all rows that are
            neither in train nor in val.

    Raises:
        TypeError: an argument of another type.
        ValueError: a negative seed, or sizes that leave a part with fewer samples than classes.
    """
    from sklearn.model_selection import train_test_split

    k = int(y.max()) + 1
    sizes = {"n_train": integer("n_train", n_train), "n_val": integer("n_val", n_val)}
    for argument, size in sizes.items():
        if size < k:
            raise ValueError(f"{argument} must be at least {k}, one per class, but got {size}.")
    pool = len(y) - held_out
    if pool - n_train - n_val < (0 if held_out else k):
        limit = (
            f"must not exceed the {pool} samples"
            if held_out
            else f"must leave at least {k} of the {pool} samples for the test split"
        )
        raise ValueError(f"n_train + n_val {limit}, but got {n_train} + {n_val}.")
    state = _seeds(seed)[0]
    rows = np.arange(pool)
    train, rest = (
        train_test_split(rows, train_size=n_train, stratify=y[:pool], random_state=state)
        if n_train < pool
        else (rows, rows[:0])
    )
    val, test = (
        train_test_split(rest, train_size=n_val, stratify=y[rest], random_state=state)
        if n_val < len(rest)
        else (rest, rest[:0])
    )
    return train, val, np.arange(pool, len(y)) if held_out else test


def standardized(x: NDArray[Any], train: Indices) -> NDArray[np.float64]:
    """Return x minus the mean, over the standard deviation, of its training rows."""
    x = x.astype(np.float64)
    deviation = x[train].std(axis=0)
    found: NDArray[np.float64] = (x - x[train].mean(axis=0)) / np.where(
        deviation > 0, deviation, 1.0
    )
    return found


def _seeds(seed: int) -> list[int]:
    """Return independent seeds of the split and of the label noise."""
    seeds = np.random.SeedSequence(integer("seed", seed, minimum=0)).generate_state(2)
    return [int(each) for each in seeds]


def classification(
    name: str,
    x: NDArray[Any],
    y: NDArray[Any],
    *,
    noise: float,
    seed: int,
    n_train: int,
    n_val: int,
    standardize: bool,
    held_out: int = 0,
    keys: Mapping[str, NDArray[Any]] | None = None,
) -> Classification:
    """Split arrays into train, val and test, and replace training labels by wrong ones.

    The split is stratified: every part has the class shares of the whole.  Exactly
    round(noise · n_train) training samples, drawn uniformly, get another class, drawn uniformly
    from the wrong ones.  Validation and test labels stay as they are.

    Args:
        name: name of the task.
        x: inputs, shape (samples, ...).
        y: classes 0 ... k − 1, shape (samples,).
        noise: share of wrong training labels, in [0, 1).
        seed: decides the split and the wrong labels.
        n_train: training samples.
        n_val: validation samples; the rest are test samples.
        standardize: subtract the mean and divide by the standard deviation of the training
            samples, feature by feature.
        held_out: the last rows that are the test split, see `partition`.
        keys: more entries of every split, one row per sample.

    Raises:
        TypeError: an argument of another type.
        ValueError: noise outside [0, 1), a negative seed, or sizes that leave a part with fewer
            samples than classes.
    """
    noise = real("noise", noise)
    if not 0.0 <= noise < 1.0:
        raise ValueError(f"noise must lie in [0, 1), but got {noise}.")
    # Independent streams: another noise level leaves the split as it is.
    noise_seed = _seeds(seed)[1]
    train, val, test = partition(y, seed=seed, n_train=n_train, n_val=n_val, held_out=held_out)
    k = int(y.max()) + 1
    x = standardized(x, train) if standardize else x

    generator = np.random.default_rng(noise_seed)
    labels = y.astype(np.int64)
    wrong = generator.permutation(n_train)[: round(noise * n_train)]
    corrupted = np.zeros(n_train, dtype=bool)
    corrupted[wrong] = True
    labels[train[wrong]] = (y[train[wrong]] + generator.integers(1, k, size=len(wrong))) % k

    def part(index: NDArray[Any]) -> Mapping[str, torch.Tensor]:
        return {
            "x": torch.from_numpy(x[index]).to(torch.float32),
            "y": torch.from_numpy(labels[index]),
            **{key: torch.from_numpy(value[index]) for key, value in (keys or {}).items()},
        }

    return Classification(
        name,
        {"train": part(train), "val": part(val), "test": part(test)},
        {"noise": noise, "seed": seed, "n_train": n_train, "n_val": n_val},
        n_classes=k,
        corrupted=torch.from_numpy(corrupted),
    )


def halves(split: Split, seed: int) -> tuple[Split, Split]:
    """Return two halves of a split with the same share of each class, up to a sample.

    Raises:
        ValueError: fewer than two samples.
    """
    y = split["y"].cpu()
    if len(y) < 2:
        raise ValueError(f"two halves need at least 2 samples, but got {len(y)}.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    order = order[y[order].argsort(stable=True)]
    one, two = ({k: v[o.to(v.device)] for k, v in split.items()} for o in (order[::2], order[1::2]))
    return one, two
