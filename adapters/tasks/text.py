"""Texts: characters of bundled descriptions, and files of the data folder."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from adapters.tasks.folder import data_file
from adapters.tasks.kinds import Sequences
from adapters.tasks.make import classification, partition
from adapters.tasks.task import Classification
from bilevel.checks import integer

__all__ = ["banking77", "descriptions", "shakespeare", "stories"]


def descriptions(length: int = 32, seed: int = 0, n_train: int = 400) -> Sequences:
    """Characters of the descriptions that scikit-learn's bundled data sets carry.

    Each text is cut into 80 % train, 10 % val and 10 % test, in this order, so that no window
    spans two of them.  "document" is the number of the text.

    Args:
        length: characters of a window.
        seed: decides which training windows are taken.
        n_train: training windows, drawn at random positions; val and test are all
            non-overlapping windows.

    Raises:
        TypeError: an argument of another type.
        ValueError: a length that leaves no window, or a negative seed.
    """
    from sklearn import datasets

    loaders = ("breast_cancer", "diabetes", "digits", "iris", "linnerud", "wine")
    texts = [getattr(datasets, f"load_{name}")().DESCR for name in loaders]
    return _characters("descriptions", texts, length, seed, n_train)


def shakespeare(length: int = 64, seed: int = 0, n_train: int = 4000) -> Sequences:
    """Characters of Shakespeare's plays (tinyshakespeare, 65 characters); data folder.

    See `descriptions` for the arguments and errors.
    """
    path = data_file("text_lm", "tinyshakespeare.txt")
    return _characters("shakespeare", [path.read_text("utf-8")], length, seed, n_train)


def stories(length: int = 64, seed: int = 0, n_train: int = 2000) -> Sequences:
    """Shakespeare in the 512 tokens of stories260K, a small pretrained Llama; data folder.

    The network is the artifact "stories_net" of `adapters.language`; it needs the extra [hf].
    See `descriptions` for the arguments and errors.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data_file("stories260k", "tokenizer.json")))
    text = data_file("text_lm", "tinyshakespeare.txt").read_text("utf-8")
    # Line by line: the tokenizer puts a blank before each text.
    encoded = tokenizer.encode_batch([line for line in text.split("\n") if line])
    ids = np.concatenate([np.array(line.ids, dtype=np.int64) for line in encoded])
    return _windows("stories", [ids], tokenizer.get_vocab_size(), (), length, seed, n_train)


def banking77(
    noise: float = 0.0,
    seed: int = 0,
    n_train: int = 5000,
    n_val: int = 2000,
    n_words: int = 1000,
) -> Classification:
    """Questions to a bank in 77 intents, as tf-idf of words (Casanueva et al. 2020); data folder.

    Test is the official 3,080 questions.  Vocabulary and weights are those of the training
    samples; inputs have shape (n_words,).

    Args:
        noise: share of wrong training labels.
        seed: decides the split and the wrong labels.
        n_train: training samples.
        n_val: validation samples.
        n_words: most frequent words that count.

    Raises:
        FileNotFoundError: see `adapters.tasks.folder.data_file`.
        TypeError: an argument of another type.
        ValueError: see `adapters.tasks.make.classification`.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    rows: list[dict[str, str]] = []
    sizes = []
    for part in ("train", "test"):
        path = data_file("text_cls", f"banking77_{part}.csv")
        with path.open(encoding="utf-8", newline="") as file:
            rows += csv.DictReader(file)
        sizes.append(len(rows))
    held_out = sizes[1] - sizes[0]
    intents = sorted({row["category"] for row in rows})
    y = np.array([intents.index(row["category"]) for row in rows], dtype=np.int64)
    texts = [row["text"] for row in rows]
    split: dict[str, Any] = {
        "seed": seed,
        "n_train": n_train,
        "n_val": n_val,
        "held_out": held_out,
    }
    train = partition(y, **split)[0]
    words = TfidfVectorizer(
        max_features=integer("n_words", n_words, minimum=1), sublinear_tf=True
    ).fit([texts[i] for i in train])
    x = words.transform(texts).toarray().astype(np.float32)
    task = classification("banking77", x, y, noise=noise, standardize=False, **split)
    return dataclasses.replace(task, options={**task.options, "n_words": n_words})


def _characters(name: str, texts: Sequence[str], length: int, seed: int, n_train: int) -> Sequences:
    alphabet = tuple(sorted(set().union(*texts)))
    number = {character: i for i, character in enumerate(alphabet)}
    documents = [np.array([number[c] for c in text], dtype=np.int64) for text in texts]
    return _windows(name, documents, len(alphabet), alphabet, length, seed, n_train)


def _windows(
    name: str,
    documents: Sequence[np.ndarray[Any, np.dtype[np.int64]]],
    n_tokens: int,
    alphabet: tuple[str, ...],
    length: int,
    seed: int,
    n_train: int,
) -> Sequences:
    """Cut documents into windows of length + 1 tokens: x drops the last, y the first."""
    length = integer("length", length, minimum=1)
    n_train = integer("n_train", n_train, minimum=1)
    generator = np.random.default_rng(integer("seed", seed, minimum=0))
    regions: dict[str, list[tuple[int, int, int]]] = {"train": [], "val": [], "test": []}
    for i, ids in enumerate(documents):
        cuts = [0, len(ids) * 8 // 10, len(ids) * 9 // 10, len(ids)]
        for split, low, high in zip(regions, cuts, cuts[1:], strict=False):
            if high - low > length:
                regions[split].append((i, low, high))
    for split, found in regions.items():
        if not found:
            raise ValueError(f"length = {length} leaves no window for the {split} split.")

    def part(split: str) -> dict[str, torch.Tensor]:
        if split == "train":
            starts = [(i, s) for i, low, high in regions[split] for s in range(low, high - length)]
            chosen = generator.choice(len(starts), size=n_train, replace=n_train > len(starts))
            starts = [starts[j] for j in chosen]
        else:
            starts = [
                (i, s)
                for i, low, high in regions[split]
                for s in range(low, high - length, length + 1)
            ]
        windows = np.stack([documents[i][s : s + length + 1] for i, s in starts])
        return {
            "x": torch.from_numpy(windows[:, :-1].copy()),
            "y": torch.from_numpy(windows[:, 1:].copy()),
            "document": torch.tensor([i for i, _ in starts]),
        }

    return Sequences(
        name,
        {split: part(split) for split in regions},
        {"length": length, "seed": seed, "n_train": n_train},
        n_tokens=n_tokens,
        alphabet=alphabet,
    )
