"""Checkpoint files, plain descriptions of configs, states of random generators."""

from __future__ import annotations

import functools
import os
import pickle
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bilevel import Budget, Descent, Until
from bilevel.checkpoint import check_writable, copy, load, save
from bilevel.describe import describe, differences
from bilevel.rng import global_seed, rng_state, set_rng_state
from hypergrad import CG, SGD, Hyper, Implicit, Unrolled

TREE = {"a": torch.arange(3.0), "b": [1, 2.5, "x", None, True], 3: (torch.zeros(()), {})}


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b) and a.dtype == b.dtype
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def test_a_tree_reads_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.pt"
    save(path, TREE)
    assert equal(load(path), TREE)
    assert [p.name for p in path.parent.iterdir()] == ["x.pt"]


@dataclass
class Thing:
    x: int


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": [Thing(1)]}, r"checkpoint\['a'\]\[0\] is a .*Thing; a checkpoint holds only"),
        ({"a": {1, 2}}, r"checkpoint\['a'\] is a builtins.set"),
        ({"a": np.zeros(2)}, r"checkpoint\['a'\] is a numpy.ndarray"),
        ({(1, 2): 0}, r"checkpoint has the key \(1, 2\)"),
    ],
)
def test_other_data_is_refused_and_the_earlier_file_kept(
    tree: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.pt"
    save(path, TREE)
    with pytest.raises(TypeError, match=message):
        save(path, tree)
    assert equal(load(path), TREE)


def test_a_write_that_fails_half_way_keeps_the_earlier_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    save(path, TREE)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(path, {"a": 1})
    assert equal(load(path), TREE)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save(path, TREE)
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"x\.pt' is not a readable checkpoint"):
            load(path)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch executed",)


def test_reading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pt")
    Path("evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "evil.pkl"):
        with pytest.raises(ValueError, match="not a readable checkpoint"):
            load(name)
    assert not Path("executed").exists()


def test_writability_is_checked_before(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b.pt", "checkpoint")
    assert [p.name for p in tmp_path.rglob("*")] == ["a"]
    with pytest.raises(IsADirectoryError, match=r"checkpoint: cannot write .* it is a folder"):
        check_writable(tmp_path, "checkpoint")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="checkpoint: cannot write"):
        check_writable(tmp_path / "file" / "x.pt", "checkpoint")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError, match="checkpoint: cannot write"):
        check_writable(tmp_path / "x.pt", "checkpoint")


def test_copies_do_not_change() -> None:
    tree = {"a": [torch.zeros(2)], "b": None}
    copied = copy(tree)
    tree["a"][0] += 1  # type: ignore[index]
    assert copied["a"][0].tolist() == [0, 0]


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.normal()), random.gauss(0, 1)  # noqa: NPY002


def test_random_state_goes_through_a_file(tmp_path: Path) -> None:
    draws()  # so that both Gaussian generators hold a cached second number
    save(tmp_path / "rng.pt", rng_state())
    first = draws(), draws()
    set_rng_state(load(tmp_path / "rng.pt"))
    assert (draws(), draws()) == first


def test_a_seed_lasts_for_its_block() -> None:
    state = rng_state()
    with global_seed(5):
        first = draws()
    after = draws()
    with global_seed(5):
        assert draws() == first
    set_rng_state(state)
    with global_seed(None):
        assert draws() == after


def test_descriptions_are_equal_for_equal_configs() -> None:
    def make(lr: float) -> Descent:
        rule = SGD(lr=Hyper("lr"), momentum=torch.tensor([0.5, 0.9]))
        adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.9))
        return Descent(Unrolled(rule, steps=3), adam, lr={"lr": lr}, inner_steps=Until(1e-3))

    assert describe(make(0.1)) == describe(make(0.1))
    assert differences(describe(make(0.1)), describe(make(0.2)), "algorithm") == [
        "algorithm.lr.lr: 0.1 before, 0.2 now"
    ]
    other = Descent(Implicit(CG()), lr={"lr": 0.1})
    changed = differences(describe(make(0.1)), describe(other), "algorithm")
    paths = [line.split(":")[0] for line in changed]
    assert "algorithm.estimator.type" in paths
    assert "algorithm.optimizer" in paths


def test_large_tensors_are_described_by_their_values() -> None:
    a, b = torch.zeros(100), torch.zeros(100)
    assert describe(a) == describe(b)
    b[50] = 1e-7
    assert describe(a) != describe(b)
    assert len(str(describe(a))) < 120


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "at least one of steps"),
        ({"steps": 0}, ValueError, "steps must be positive, but got 0"),
        ({"steps": 1.5}, TypeError, "steps must be an integer, but got 1.5"),
        ({"outer_steps": True}, TypeError, "outer_steps must be an integer, but got True"),
        ({"seconds": -1}, ValueError, "seconds must be positive, but got -1"),
        ({"seconds": float("nan")}, ValueError, "seconds must be positive, but got nan"),
    ],
)
def test_bad_budgets(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Budget(**arguments)
