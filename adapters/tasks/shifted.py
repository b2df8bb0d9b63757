"""Tasks with shifted images: a stream to adapt to, and a source that has seen what will come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from adapters.corruptions import corrupt, corrupt_randomly
from adapters.tasks.bundled import load_digit_images
from adapters.tasks.make import classification
from adapters.tasks.task import Split
from adapters.tasks.transfer import Transfer, with_source

__all__ = ["digits_robust", "digits_stream"]

STREAM = ("noise", "contrast", "brightness", "salt_pepper", "blur", "dropout", "inversion")
SHIFTS = ("noise", "contrast", "brightness", "salt_pepper", "blur", "dropout", "shift")


def digits_stream(
    strength: float = 1.0,
    seed: int = 0,
    n_train: int = 448,
    n_val: int = 210,
    hidden: tuple[int, ...] = (128, 64),
    activation: str = "relu",
) -> Transfer:
    """Handwritten digits under seven corruptions in turn, with a network trained on clean ones.

    "group" is the number of the corruption; training samples are ordered by it and are meant to
    be adapted to without their labels.  Every corruption gets the same share of a split.

    Args:
        strength: of the corruptions, in [0, 1], see `adapters.corruptions`.
        seed: decides splits and corruptions.
        n_train: samples of the stream.
        n_val: validation samples; the rest of the target are test samples.
        hidden: widths of the source perceptron's hidden layers.
        activation: of its hidden layers.

    Raises:
        TypeError: an argument of another type.
        ValueError: a strength outside [0, 1], or sizes that leave no test samples.
    """
    images, labels = load_digit_images()
    half = len(labels) // 2
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    images, labels = images[order], labels[order]
    clean = classification(
        "digits_stream",
        images[half:],
        labels[half:],
        noise=0.0,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
    )
    generator = torch.Generator().manual_seed(seed)
    splits = {n: _in_turn(s, STREAM, strength, generator) for n, s in clean.splits.items()}
    options = {"strength": strength, "seed": seed, "n_train": n_train, "n_val": n_val}
    target = dataclasses.replace(clean, splits=splits, options=options)
    source = images[:half], labels[:half]
    return with_source(target, *source, seed, False, tuple(hidden), activation)


def digits_robust(
    strength: float = 1.0,
    seed: int = 0,
    n_train: int = 600,
    n_val: int = 300,
    hidden: tuple[int, ...] = (128, 64),
    activation: str = "relu",
) -> Transfer:
    """Clean handwritten digits, with a network trained on 450 others under random corruptions.

    The splits "shifted_val" and "shifted" hold the validation and test images under each of
    seven corruptions: what fine-tuning on clean images forgets.

    Args:
        strength: of the corruptions of the shifted splits; those of the source are 0.7 of it
            and meet four images of five.
        seed: decides splits and corruptions.
        n_train: training samples of the target.
        n_val: validation samples; the rest of the target are test samples.
        hidden: widths of the source perceptron's hidden layers.
        activation: of its hidden layers.

    Raises:
        TypeError: an argument of another type.
        ValueError: a strength outside [0, 1], or sizes that leave no test samples.
    """
    images, labels = load_digit_images()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).numpy()
    images, labels = images[order], labels[order]
    target = classification(
        "digits_robust",
        images[450:],
        labels[450:],
        noise=0.0,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
    )
    generator = torch.Generator().manual_seed(seed)
    shifted: Mapping[str, Split] = {
        name: _every(target.split(split), SHIFTS, strength, generator)
        for name, split in (("shifted_val", "val"), ("shifted", "test"))
    }
    # Eight draws of each image stand for fresh corruptions in every epoch.
    x = torch.from_numpy(images[:450]).float().repeat(8, 1, 1, 1)
    source = {
        "x": corrupt_randomly(x, SHIFTS, 0.7 * strength, 0.8, generator),
        "y": torch.from_numpy(labels[:450]).repeat(8),
    }
    return Transfer(
        "digits_robust",
        {**target.splits, **shifted, "source": source, "source_test": shifted["shifted"]},
        {
            "strength": strength,
            "seed": seed,
            "n_train": n_train,
            "n_val": n_val,
            "hidden": tuple(hidden),
            "activation": activation,
        },
        n_classes=10,
        corrupted=target.corrupted,
        source_classes=10,
        new_head=False,
        hidden=tuple(hidden),
        activation=activation,
    )


def _in_turn(
    split: Split, names: Sequence[str], strength: float, generator: torch.Generator
) -> Split:
    """Corrupt an equal share of the rows by each corruption, in the order of the names."""
    groups = torch.arange(len(split["y"])) * len(names) // len(split["y"])
    x = torch.cat(
        [
            corrupt(split["x"][groups == i], name, strength, generator)
            for i, name in enumerate(names)
        ]
    )
    return {**split, "x": x, "group": groups}


def _every(
    split: Split, names: Sequence[str], strength: float, generator: torch.Generator
) -> Split:
    """All rows under each corruption."""
    return {
        "x": torch.cat([corrupt(split["x"], name, strength, generator) for name in names]),
        "y": split["y"].repeat(len(names)),
    }
