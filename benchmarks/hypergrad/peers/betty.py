"""betty-ml 0.2.1: its implicit hypergradients, by the function that its engine calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["LIBRARY"]


def _methods(problem: Training | Stationary) -> list[Method]:
    if isinstance(problem, Training):
        return []  # IterativeProblem raises KeyError at construction
    iterations = problem.iterations
    cg = _run(problem, type="cg", cg_iterations=iterations)
    neumann = _run(problem, type="neumann", neumann_iterations=iterations, neumann_alpha=1.0)
    return [
        Method("cg", cg),
        Method("neumann, alpha 1", neumann),
        Method("darts", _run(problem, type="darts")),
    ]


class _Hyperparameters(nn.Module):
    def __init__(self, problem: Stationary) -> None:
        super().__init__()
        self.hparams = nn.ParameterList(v.clone() for v in problem.hparams.values())


def _run(problem: Stationary, **options: Any) -> Any:
    from betty.configs import Config
    from betty.hypergradient import get_grads
    from betty.problems import ImplicitProblem

    class Inner(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Tensor:
            hyper = dict(zip(problem.hparams, outer.module.hparams, strict=True))
            named = dict(self.module.named_parameters())
            return problem.inner_loss(self.module, named, hyper, batch)

    class Outer(ImplicitProblem):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Tensor:
            return problem.outer_loss(inner.module)

    def make(kind: Any, name: str, module: nn.Module, config: Any) -> Any:
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        return kind(
            name,
            config=config,
            module=module,
            optimizer=optimizer,
            train_data_loader=[problem.batch],
        )

    outer = make(Outer, "outer", _Hyperparameters(problem), Config())
    inner = make(Inner, "inner", problem.module, Config(**options))
    inner.cur_batch = problem.batch
    inner._paths = []

    def run() -> Sequence[Tensor]:
        loss = outer.training_step_exec(None)
        found: Sequence[Tensor] = get_grads(loss, [outer, inner, outer], False, False)
        return found

    return run


LIBRARY = Library(
    "betty", "betty-ml 0.2.1", ("betty",), _methods, requirements=("betty-ml==0.2.1",)
)
