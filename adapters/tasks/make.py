"""Turns arrays into a classification task: a stratified split, and wrong training labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.tasks.task import Classification
from bilevel.checks import integer, real

__all__ = ["classification"]


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

    Raises:
        TypeError: an argument of another type.
        ValueError: noise outside [0, 1), a negative seed, or sizes that leave a part with fewer
            samples than classes.
    """
    from sklearn.model_selection import train_test_split

    noise = real("noise", noise)
    if not 0.0 <= noise < 1.0:
        raise ValueError(f"noise must lie in [0, 1), but got {noise}.")
    seed = integer("seed", seed, minimum=0)
    k = int(y.max()) + 1
    sizes = {"n_train": integer("n_train", n_train), "n_val": integer("n_val", n_val)}
    for argument, size in sizes.items():
        if size < k:
            raise ValueError(f"{argument} must be at least {k}, one per class, but got {size}.")
    if len(y) - n_train - n_val < k:
        raise ValueError(
            f"n_train + n_val must leave at least {k} of the {len(y)} samples for the test "
            f"split, but got {n_train} + {n_val}."
        )

    # Independent streams: another noise level leaves the split as it is.
    split_seed, noise_seed = np.random.SeedSequence(seed).generate_state(2)
    train, rest = train_test_split(
        np.arange(len(y)), train_size=n_train, stratify=y, random_state=int(split_seed)
    )
    val, test = train_test_split(
        rest, train_size=n_val, stratify=y[rest], random_state=int(split_seed)
    )
    x = x.astype(np.float64)
    if standardize:
        deviation = x[train].std(axis=0)
        x = (x - x[train].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)

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
        }

    return Classification(
        name,
        {"train": part(train), "val": part(val), "test": part(test)},
        {"noise": noise, "seed": seed, "n_train": n_train, "n_val": n_val},
        n_classes=k,
        corrupted=torch.from_numpy(corrupted),
    )
