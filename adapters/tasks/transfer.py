"""Transfer tasks: a source to start from, and a target to adapt to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.tasks.bundled import load_digit_images
from adapters.tasks.make import classification
from adapters.tasks.task import Classification, Split

__all__ = ["Transfer", "digits_rotated", "digits_transfer", "with_source"]


@dataclass(frozen=True, eq=False)
class Transfer(Classification):
    """A classification task that comes with a source: data that a network was trained on before.

    "train", "val" and "test" are the target's; the splits "source" and "source_test" are the
    source's, for pretraining and for measuring what adaptation forgets.

    Attributes:
        source_classes: labels of the source are 0 ... source_classes − 1.
        new_head: whether source and target have different classes, so that the last layer of a
            source network does not fit.
        hidden: widths of the source network's hidden layers.
        activation: of the source network's hidden layers.
    """

    source_classes: int = field(kw_only=True)
    new_head: bool = field(kw_only=True)
    hidden: tuple[int, ...] = field(kw_only=True)
    activation: str = field(kw_only=True)

    def __post_init__(self) -> None:
        missing = [name for name in ("source", "source_test") if name not in self.splits]
        if missing:
            raise ValueError(f"splits must also hold {missing}, but got {sorted(self.splits)}.")
        target = {n: s for n, s in self.splits.items() if n not in ("source", "source_test")}
        Classification(
            self.name, target, n_classes=self.n_classes, corrupted=self.corrupted
        )  # raises for bad labels of the target
        for name in ("source", "source_test"):
            labels = self.splits[name]["y"]
            if int(labels.min()) < 0 or int(labels.max()) >= self.source_classes:
                raise ValueError(
                    f"splits[{name!r}]['y'] must lie in 0 ... {self.source_classes - 1}, "
                    f"but got {int(labels.min())} ... {int(labels.max())}."
                )
        if not self.new_head and self.source_classes != self.n_classes:
            raise ValueError(
                f"a source with {self.source_classes} classes needs new_head=True for "
                f"{self.n_classes} target classes."
            )


def digits_transfer(
    noise: float = 0.0,
    seed: int = 0,
    n_train: int = 100,
    n_val: int = 200,
    hidden: tuple[int, ...] = (128, 128, 64),
    activation: str = "relu",
) -> Transfer:
    """Handwritten digits 5-9 with a network trained on digits 0-4 (896 and 901 samples).

    Labels of the target are 0 ... 4; the source has 600 training samples.  See
    `adapters.tasks.make.classification` for the first four arguments, which are those of the
    target, and `Transfer` for the last two.
    """
    images, labels = load_digit_images()
    low = labels < 5
    target = classification(
        "digits_transfer",
        images[~low],
        labels[~low] - 5,
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
    )
    source = images[low], labels[low]
    return with_source(target, *source, seed, True, tuple(hidden), activation)


def digits_rotated(
    noise: float = 0.0,
    seed: int = 0,
    n_train: int = 200,
    n_val: int = 200,
    hidden: tuple[int, ...] = (256, 256),
    activation: str = "relu",
) -> Transfer:
    """Handwritten digits turned by 90 degrees, with a network trained on upright ones.

    Half of the samples are the source, the others the target; both have ten classes.  See
    `adapters.tasks.make.classification` for the first four arguments, which are those of the
    target, and `Transfer` for the last two.
    """
    images, labels = load_digit_images()
    order = np.random.default_rng(np.random.SeedSequence([seed, 90])).permutation(len(labels))
    source, rest = order[: len(order) // 2], order[len(order) // 2 :]
    turned = np.rot90(images, axes=(2, 3)).copy()
    target = classification(
        "digits_rotated",
        turned[rest],
        labels[rest],
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
    )
    upright = images[source], labels[source]
    return with_source(target, *upright, seed, False, tuple(hidden), activation)


def with_source(
    target: Classification,
    images: NDArray[Any],
    labels: NDArray[Any],
    seed: int,
    new_head: bool,
    hidden: tuple[int, ...],
    activation: str,
) -> Transfer:
    """Return a target with a source made of images of its own: 600 to train on.

    Args:
        target: the task to adapt to.
        images: of the source, shape (samples, ...).
        labels: their classes, 0 ... k − 1.
        seed: decides the source's split.
        new_head: whether the classes differ from the target's.
        hidden: widths of the source network's hidden layers.
        activation: of its hidden layers.
    """
    source = classification(
        "source", images, labels, noise=0.0, seed=seed, n_train=600, n_val=100, standardize=False
    )
    # Nothing is chosen on the source, so its validation samples count as test samples.
    val, test = source.split("val"), source.split("test")
    later: Split = {key: torch.cat([val[key], test[key]]) for key in val}
    return Transfer(
        target.name,
        {**target.splits, "source": source.split("train"), "source_test": later},
        {**target.options, "hidden": hidden, "activation": activation},
        n_classes=target.n_classes,
        corrupted=target.corrupted,
        source_classes=source.n_classes,
        new_head=new_head,
        hidden=hidden,
        activation=activation,
    )
