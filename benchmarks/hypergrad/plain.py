"""The yardstick: T ordinary optimizer steps, or one gradient of the inner loss."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch

from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["GRADIENTS", "plain"]

GRADIENTS = 20
"""Gradients in one run of the yardstick of a `Stationary`: one is too short to time."""


def plain(problem: Training | Stationary) -> Callable[[], None]:
    """Return what trains plainly, with the penalty in the loss."""
    return _steps(problem) if isinstance(problem, Training) else _gradients(problem)


def _steps(problem: Training) -> Callable[[], None]:
    def run() -> None:
        module = deepcopy(problem.module)
        named = dict(module.named_parameters())
        optimizer = problem.rule.torch(module)
        for batch in problem.batches:
            optimizer.zero_grad()
            problem.inner_loss(module, named, problem.hparams, batch).backward()
            optimizer.step()

    return run


def _gradients(problem: Stationary) -> Callable[[], None]:
    def run() -> None:
        module = deepcopy(problem.module)
        named = dict(module.named_parameters())
        weights = list(named.values())
        for _ in range(GRADIENTS):
            loss = problem.inner_loss(module, named, problem.hparams, problem.batch)
            torch.autograd.grad(loss, weights)

    return run
