"""Tasks: splits, wrong labels, fingerprints and bad options."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import adapters.language  # noqa: F401  registers the pretrained language model
from adapters import Classification, artifacts, tasks
from adapters.tasks import Segmentation, Sequences

EMBEDDED = {
    "breast_cancer": (569, 240),
    "descriptions": (488, 400),
    "diabetes": (442, 200),
    "digits": (1797, 600),
    "digits_robust": (1347, 600),
    "digits_rotated": (899, 200),
    "digits_split": (1797, 600),
    "digits_stream": (899, 448),
    "digits_transfer": (896, 100),
}
"""name -> samples of train, val and test together, and of train"""

FOLDER = {"banking77", "fashion", "mnist", "nuclei", "omniglot", "shakespeare", "stories"}


PROBLEMS = {"constrained_logistic", "digit_clouds", "hock_schittkowski"}
"""For solvers; their tests are beside those of the solvers."""


def test_every_task_is_here() -> None:
    ours = {n for n in tasks.names() if tasks._makers[n].__module__.startswith("adapters.")}
    assert ours == set(EMBEDDED) | FOLDER | PROBLEMS


@pytest.mark.parametrize("name", EMBEDDED)
def test_splits_are_complete_and_seeded(name: str) -> None:
    task, same, other = (tasks.get(name, seed=s) for s in (4, 4, 5))
    sizes = [len(task.split(split)["y"]) for split in ("train", "val", "test")]
    assert (sum(sizes), sizes[0]) == EMBEDDED[name]
    assert task.fingerprint == same.fingerprint != other.fingerprint
    assert tasks.get(name, **task.options).fingerprint == task.fingerprint
    assert task.to(torch.float64).dtype == torch.float64
    assert task.to(torch.float64).fingerprint != task.fingerprint


@pytest.mark.parametrize("name", ["breast_cancer", "digits", "digits_split", "digits_transfer"])
def test_splits_are_disjoint_and_stratified(name: str) -> None:
    task = tasks.get(name, seed=4)
    assert isinstance(task, Classification)
    parts = [task.split(split) for split in ("train", "val", "test")]
    rows = [tuple(row.flatten().tolist()) for s in parts for row in s["x"]]
    # Some digits are pixel for pixel equal; a split never holds a sample twice.
    assert len(rows) - len(set(rows)) < 5
    shares = [torch.bincount(s["y"], minlength=task.n_classes) / len(s["y"]) for s in parts]
    assert all(torch.allclose(share, shares[0], atol=0.02) for share in shares)


def test_windows_of_text_are_one_step_apart_and_splits_share_no_character() -> None:
    from sklearn.datasets import load_wine

    task = tasks.get("descriptions", length=16, n_train=50)
    assert isinstance(task, Sequences)
    text = load_wine().DESCR
    cuts = [0, len(text) * 8 // 10, len(text) * 9 // 10, len(text)]
    for name, low, high in zip(("train", "val", "test"), cuts, cuts[1:], strict=False):
        split = task.split(name)
        assert torch.equal(split["x"][:, 1:], split["y"][:, :-1])
        rows = (split["document"] == 5).nonzero()[:, 0]
        windows = [
            "".join(task.alphabet[i] for i in [*split["x"][r].tolist(), int(split["y"][r, -1])])
            for r in rows
        ]
        assert windows
        assert all(window in text[low:high] for window in windows)


def test_a_stream_has_its_corruptions_in_turn() -> None:
    train = tasks.get("digits_stream").split("train")
    assert train["group"].tolist() == sorted(train["group"].tolist())
    assert torch.bincount(train["group"]).tolist() == [64] * 7
    parts = tasks.get("digits_split", noise=0.5).split("train")["part"]
    assert parts.tolist() == sorted(parts.tolist())
    clean = tasks.get("digits_split").split("test")
    assert torch.equal(clean["part"], clean["y"] // 2)


def test_measures_of_other_kinds() -> None:
    torch.manual_seed(0)
    regression = tasks.get("diabetes")
    y, guess = torch.randn(5, 1), torch.randn(5, 1)
    found = regression.measure(guess, {"y": y})
    assert torch.allclose(found["loss"], (guess - y)[:, 0] ** 2)

    sequences = tasks.get("descriptions", length=3)
    assert isinstance(sequences, Sequences)
    logits, ids = torch.randn(2, 3, sequences.n_tokens), torch.tensor([[1, 2, 3], [4, 5, 6]])
    picked = logits.log_softmax(2).gather(2, ids[..., None])[..., 0]
    assert torch.allclose(sequences.measure(logits, {"y": ids})["loss"], -picked.mean(1))

    mask = torch.tensor([[[0.0, 1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    splits = {n: {"x": torch.zeros(2, 1, 2, 2), "y": mask} for n in ("train", "val", "test")}
    segmentation = Segmentation("masks", splits)
    logits = torch.tensor([[[5.0, 5.0], [-5.0, 5.0]], [[-5.0, -5.0], [-5.0, -5.0]]])
    found = segmentation.measure(logits[:, None], {"y": mask})
    assert torch.allclose(found["iou"], torch.tensor([0.5, 1.0]))
    expected = torch.nn.functional.softplus(torch.tensor([5.0, -5.0, 5.0, -5.0])).mean()
    assert torch.allclose(found["loss"][0], expected)


@pytest.mark.parametrize("name", sorted(FOLDER))
def test_a_missing_data_folder_says_what_to_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BILEVEL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="set the environment variable BILEVEL_DATA"):
        tasks.get(name)


def test_a_data_folder_without_the_file_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BILEVEL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"does not hold mnist/mnist\.npz"):
        tasks.get("mnist")


@pytest.mark.slow
@pytest.mark.skipif("BILEVEL_DATA" not in os.environ, reason="needs the data folder")
@pytest.mark.parametrize("name", sorted(FOLDER))
def test_tasks_of_the_data_folder(name: str) -> None:
    small = {} if name in ("shakespeare", "stories", "omniglot") else {"n_train": 150, "n_val": 80}
    task = tasks.get(name, **small)
    assert tasks.get(name, **task.options).fingerprint == task.fingerprint
    if name == "nuclei":
        domains = {n: set(s["domain"].tolist()) for n, s in task.splits.items()}
        assert domains == {"train": {0, 1, 2}, "val": {0, 1, 2}, "test": {3}}
    if task.is_image:
        assert 0.0 <= float(task.split("test")["x"].min()) < float(task.split("test")["x"].max())
        assert float(task.split("test")["x"].max()) <= 1.0


@pytest.mark.slow
@pytest.mark.skipif("BILEVEL_DATA" not in os.environ, reason="needs the data folder")
def test_the_pretrained_language_model_knows_something() -> None:
    task = tasks.get("stories", n_train=64)
    net = artifacts.resolve(["stories_net"], task, 0)["stories_net"]
    split = {key: value[:64] for key, value in task.split("val").items()}
    with torch.no_grad():
        assert task.measure(net(split["x"]), split)["loss"].mean() < torch.tensor(512.0).log() - 0.5


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
