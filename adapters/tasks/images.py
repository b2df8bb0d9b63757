"""Image sets from the data folder: MNIST, Fashion-MNIST, Omniglot, and cell nuclei."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from adapters.tasks.folder import data_file
from adapters.tasks.kinds import Segmentation
from adapters.tasks.make import classification, partition
from adapters.tasks.task import Classification
from bilevel.checks import integer

__all__ = ["fashion", "mnist", "nuclei", "omniglot"]


def mnist(
    noise: float = 0.0, seed: int = 0, n_train: int = 5000, n_val: int = 5000
) -> Classification:
    """28×28 gray images of handwritten digits (LeCun et al. 1998); data folder.

    Train and val are drawn from the 60,000 training images, test is the official 10,000.  Pixels
    lie in [0, 1]; inputs have shape (1, 28, 28).
    See `adapters.tasks.make.classification` for the arguments and errors.
    """
    return _official("mnist", "mnist/mnist.npz", noise, seed, n_train, n_val)


def fashion(
    noise: float = 0.0, seed: int = 0, n_train: int = 5000, n_val: int = 5000
) -> Classification:
    """28×28 gray images of ten kinds of clothes (Fashion-MNIST, Xiao et al. 2017); data folder.

    Train and val are drawn from the first 20,000 training images, test is the official 10,000.
    See `adapters.tasks.make.classification` for the arguments and errors.
    """
    path = "fashion_mnist/fashion_mnist_20k_10k.npz"
    return _official("fashion", path, noise, seed, n_train, n_val)


def omniglot(
    noise: float = 0.0, seed: int = 0, n_train: int = 2904, n_val: int = 968
) -> Classification:
    """28×28 handwritten characters, 242 of 8 alphabets, 20 drawings each (Omniglot); data folder.

    "alphabet" is the number of a character's alphabet.  This is the small background set: its
    figures do not compare with those on all 1,623 characters.
    See `adapters.tasks.make.classification` for the arguments and errors.
    """
    with np.load(data_file("omniglot_small", "omniglot_small_28.npz")) as data:
        images, labels, alphabet = data["images"], data["character"], data["alphabet"]
    return classification(
        "omniglot",
        images[:, None] / 255.0,
        labels.astype(np.int64),
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
        keys={"alphabet": alphabet.astype(np.int64)},
    )


def nuclei(
    test_domain: int = 3, seed: int = 0, n_train: int = 200, n_val: int = 80
) -> Segmentation:
    """128×128 microscope images of cell nuclei with their masks, four domains; data folder.

    One imaging domain is the test split, because images of one plate are near relatives: a test
    on random rows would flatter.  "domain" is 0 and 1 for fluorescence with small and large
    nuclei, 2 for dense fluorescence, 3 for stained tissue in bright field (Data Science Bowl
    2018; Caicedo et al. 2019).

    Args:
        test_domain: the domain held out.
        seed: decides the split, which has the domain shares of the whole.
        n_train: training images.
        n_val: validation images.

    Raises:
        FileNotFoundError: see `adapters.tasks.folder.data_file`.
        TypeError: an argument of another type.
        ValueError: an unknown domain, a negative seed, or more images than there are.
    """
    if not 0 <= integer("test_domain", test_domain) <= 3:
        raise ValueError(f"test_domain must be 0, 1, 2 or 3, but got {test_domain}.")
    with np.load(data_file("nuclei_dsb2018", "nuclei128.npz")) as data:
        images = data["images"]
        masks = np.unpackbits(data["masks_packed"], axis=1).reshape(-1, 128, 128)
        domain = data["domain"].astype(np.int64)
    order = np.argsort(domain == test_domain, kind="stable")
    last = int((domain == test_domain).sum())
    parts = partition(domain[order], seed=seed, n_train=n_train, n_val=n_val, held_out=last)

    def part(rows: NDArray[np.int64]) -> dict[str, torch.Tensor]:
        index = order[rows]
        return {
            "x": torch.from_numpy(images[index, None]).float() / 255.0,
            "y": torch.from_numpy(masks[index]).float(),
            "domain": torch.from_numpy(domain[index]),
        }

    return Segmentation(
        "nuclei",
        {name: part(rows) for name, rows in zip(("train", "val", "test"), parts, strict=True)},
        {"test_domain": test_domain, "seed": seed, "n_train": n_train, "n_val": n_val},
    )


def _official(
    name: str, path: str, noise: float, seed: int, n_train: int, n_val: int
) -> Classification:
    with np.load(data_file(*path.split("/"))) as data:
        x = np.concatenate([data["x_train"], data["x_test"]])
        y = np.concatenate([data["y_train"], data["y_test"]]).astype(np.int64)
        held_out = len(data["y_test"])
    return classification(
        name,
        x[:, None] / np.float32(255.0),
        y,
        noise=noise,
        seed=seed,
        n_train=n_train,
        n_val=n_val,
        standardize=False,
        held_out=held_out,
    )
