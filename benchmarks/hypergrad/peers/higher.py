"""higher 0.2.1 (PyPI): patched modules and differentiable copies of torch.optim."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["LIBRARY"]


def _methods(problem: Training | Stationary) -> list[Method]:
    if isinstance(problem, Stationary):
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher

    def run() -> Sequence[Tensor]:
        hparams = problem.leaves()
        optimizer = problem.rule.torch(problem.module)
        with higher.innerloop_ctx(problem.module, optimizer) as (module, stepper):
            for batch in problem.batches:
                named = dict(module.named_parameters())
                stepper.step(problem.inner_loss(module, named, hparams, batch))
            return torch.autograd.grad(problem.outer_loss(module), list(hparams.values()))

    return [Method("innerloop_ctx", run)]


LIBRARY = Library("higher", "higher 0.2.1", ("higher",), _methods)
