"""Real data sets that scikit-learn carries inside, so that nothing is downloaded."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.tasks.kinds import Regression
from adapters.tasks.make import classification, partition, standardized
from adapters.tasks.task import Classification
from bilevel.checks import integer

__all__ = ["breast_cancer", "diabetes", "digits", "digits_split", "load_digit_images"]


def digits(
    noise: float = 0.0, seed: int = 0, n_train: int = 600, n_val: int = 400
) -> Classification:
    """8×8 gray images of handwritten digits in 10 classes (1797 samples, UCI).

    Pixels are divided by 16, so they lie in [0, 1]; inputs have shape (1, 8, 8).
    See `adapters.tasks.make.classification` for the arguments and errors.
    """
    x, y = load_digit_images()
    return classification(
        "digits",
        x,
        y,
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
    )


def breast_cancer(
    noise: float = 0.0, seed: int = 0, n_train: int = 240, n_val: int = 140
) -> Classification:
    """30 measurements of cell nuclei, malignant or benign (569 samples, Wisconsin Diagnostic).

    Features are standardized by the training samples; inputs have shape (30,).
    See `adapters.tasks.make.classification` for the arguments and errors.
    """
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    return classification(
        "breast_cancer",
        data.data,
        data.target,
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=True,
    )


def diabetes(seed: int = 0, n_train: int = 200, n_val: int = 120) -> Regression:
    """Progression of diabetes after a year from 10 measurements (442 patients, Efron et al. 2004).

    Inputs, shape (10,), and the target are standardized by the training samples.

    Args:
        seed: decides the split.
        n_train: training samples.
        n_val: validation samples; the rest are test samples.

    Raises:
        TypeError: an argument of another type.
        ValueError: a negative seed, or sizes that leave no test sample.
    """
    from sklearn.datasets import load_diabetes

    data = load_diabetes(scaled=False)
    rows = {"seed": seed, "n_train": n_train, "n_val": n_val}
    # One class: the split is a plain shuffle.
    parts = partition(np.zeros(len(data.target), dtype=np.int64), **rows)
    x = standardized(data.data, parts[0])
    y = standardized(data.target[:, None], parts[0])
    splits = {
        name: {
            "x": torch.from_numpy(x[index]).to(torch.float32),
            "y": torch.from_numpy(y[index]).to(torch.float32),
        }
        for name, index in zip(("train", "val", "test"), parts, strict=True)
    }
    return Regression("diabetes", splits, rows)


def digits_split(
    parts: int = 5, noise: float = 0.0, seed: int = 0, n_train: int = 600, n_val: int = 400
) -> Classification:
    """Handwritten digits in parts of consecutive classes, for learning one part after another.

    "part" of a sample is 0 ... parts − 1; training samples are ordered by it.

    Args:
        parts: number of parts; must divide 10.
        noise: share of wrong training labels, see `adapters.tasks.make.classification`; the part
            is that of the true class.
        seed: decides the split and the wrong labels.
        n_train: training samples.
        n_val: validation samples; the rest are test samples.

    Raises:
        TypeError: an argument of another type.
        ValueError: parts does not divide 10, or see `adapters.tasks.make.classification`.
    """
    if integer("parts", parts, minimum=1) not in (1, 2, 5, 10):
        raise ValueError(f"parts must divide the 10 classes, but got {parts}.")
    x, y = load_digit_images()
    task = classification(
        "digits_split",
        x,
        y,
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
        keys={"part": (y * parts // 10).astype(np.int64)},
    )
    train = task.split("train")
    order = train["part"].argsort(stable=True)
    return dataclasses.replace(
        task,
        splits={**task.splits, "train": {k: v[order] for k, v in train.items()}},
        corrupted=task.corrupted[order],
        options={"parts": parts, **task.options},
    )


def load_digit_images() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return all digits, shape (1797, 1, 8, 8) with values in [0, 1], and their classes."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images[:, None] / 16.0, data.target.astype(np.int64)
