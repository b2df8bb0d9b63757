"""The benchmark of hypergradients on a tiny setting: it runs, and ours are the right numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.hypergrad import __main__ as command
from benchmarks.hypergrad import measure, problems
from benchmarks.hypergrad.environments import PEERS, environment
from benchmarks.hypergrad.problems import Stationary, Training
from benchmarks.hypergrad.reference import conjugate_gradients, reference
from benchmarks.hypergrad.worker import Job, load, work


@pytest.mark.parametrize("name", ["P1a", "P2-sgd", "P4-adam"])
def test_ours_agree_with_the_reference(name: str, tmp_path: Path) -> None:
    job = Job("ours", name, 1, steps=3, compiled=False, memory=False, cache=str(tmp_path))
    rows = work(job)
    assert rows
    for row in rows:
        assert row.failure is None
        assert row.error is not None
        assert row.error < 1e-10
        assert row.ratio is not None
        assert row.ratio > 0


@pytest.mark.parametrize("name", ["P2-sgd", "P4-sgd"])
def test_references_agree_with_central_differences(name: str, tmp_path: Path) -> None:
    assert reference(name, 3, tmp_path)["check"] < 1e-6


def test_conjugate_gradients_solve_in_d_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    a, b = root @ root.T + torch.eye(5), torch.arange(5.0, dtype=torch.float64)
    *_, last = conjugate_gradients(a, b, 8)
    torch.testing.assert_close(a @ last, b)


def test_minimum_has_no_gradient_and_positive_curvature(tmp_path: Path) -> None:
    known = reference("P1a", None, tmp_path)
    problem = problems.make("P1a", torch.float64, None, known["params"])
    assert isinstance(problem, Stationary)
    params = problem.params()
    loss = problem.inner_loss(problem.forward(params), params, problem.hparams, problem.batch)
    for gradient in torch.autograd.grad(loss, list(params.values())):
        assert gradient.abs().max() < 1e-5
    assert known["spectrum"][0] > 0


@pytest.mark.parametrize(("name", "weights"), [("P2-sgd", 7510), ("P4-adam", 6090)])
def test_sizes_are_those_of_the_table(name: str, weights: int) -> None:
    problem = problems.make(name, torch.float32)
    assert isinstance(problem, Training)
    assert sum(p.numel() for p in problem.module.parameters()) == weights
    assert sum(h.numel() for h in problem.hparams.values()) == weights


def test_memory_of_a_fork_counts_what_the_run_allocates() -> None:
    def run() -> None:
        torch.ones(8_000_000)  # 32 MB

    grown, _ = measure.forked(lambda: measure.peak_growth(lambda: None, run))
    assert 25 < grown < 45


def test_failure_in_a_fork_is_an_error_here() -> None:
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        measure.forked(lambda: 1 / 0)


def test_peer_without_environment_says_how_to_get_it(tmp_path: Path) -> None:
    for name in PEERS:
        library, found = load(name), environment(name, tmp_path, {})
        if library.requirements:
            assert found.missing == f"not installed: python -m benchmarks.hypergrad --setup {name}"
        elif library.source:
            assert f"--{library.source} PATH" in (found.missing or "")
        else:
            assert found.missing is None  # in the dependencies of this project


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SystemExit, match="'P9' is not one of P1a"):
        command.main(["--problems", "P9"])


@pytest.mark.slow
def test_command_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["benchmarks.hypergrad"])
    page = tmp_path / "page.md"
    options = ["--problems", "P2-sgd", "--steps", "2", "--quick", "--repeats", "1"]
    command.main([*options, "--cache", str(tmp_path), "--output", str(page)])
    text = page.read_text()
    assert "**ours**: Unrolled, graph" in text
    assert "TorchOpt" in text
    assert "higher" in text
    assert str(tmp_path) not in text
    assert "P2-sgd" in capsys.readouterr().out
