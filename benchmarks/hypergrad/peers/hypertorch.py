"""hypertorch (prolearner/hypertorch on GitHub, not on PyPI): its package is named hypergrad too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["LIBRARY"]


def _methods(problem: Training | Stationary) -> list[Method]:
    import hypergrad as hypertorch  # the clone comes first on the path

    if isinstance(problem, Stationary):
        return [Method("CG", _implicit(problem, hypertorch))]
    if problem.rule.kind == "adam":
        return []
    return [
        Method("Momentum, reverse_unroll", _unrolled(problem, hypertorch, keep=True)),
        Method("Momentum, reverse", _unrolled(problem, hypertorch, keep=False)),
    ]


def _implicit(problem: Stationary, hypertorch: Any) -> Any:
    start, names = problem.params(), list(problem.hparams)

    def named(params: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(start, params, strict=True))

    def outer(params: Sequence[Tensor], hparams: Any) -> Tensor:
        return problem.outer_loss(problem.forward(named(params)))

    def descent(params: Sequence[Tensor], hparams: Any) -> list[Tensor]:
        """One gradient step of length 1: I minus its Jacobian is the Hessian."""
        weights = named(params)
        hyper = dict(zip(names, hparams, strict=True))
        loss = problem.inner_loss(problem.forward(weights), weights, hyper, problem.batch)
        grads = torch.autograd.grad(loss, params, create_graph=True)
        return [w - g for w, g in zip(params, grads, strict=True)]

    def run() -> Sequence[Tensor]:
        hparams = list(problem.leaves().values())
        found: Sequence[Tensor] = hypertorch.CG(
            list(start.values()),
            hparams,
            problem.iterations,
            descent,
            outer,
            tol=0.0,
            set_grad=False,
        )
        return found

    return run


def _unrolled(problem: Training, hypertorch: Any, keep: bool) -> Any:
    names = list(problem.hparams)

    def outer(params: Sequence[Tensor], hparams: Any) -> Tensor:
        named = dict(zip(names, params, strict=False))  # auxiliary variables come after
        return problem.outer_loss(problem.forward(named))

    def loss(params: Sequence[Tensor], hparams: Any, batch: Any) -> Tensor:
        named = dict(zip(names, params, strict=True))
        hyper = dict(zip(names, hparams, strict=True))
        return problem.inner_loss(problem.forward(named), named, hyper, batch)

    def run() -> Sequence[Tensor]:
        hparams, rule = list(problem.leaves().values()), problem.rule
        steps = [
            hypertorch.Momentum(lambda p, h, batch=batch: loss(p, h, batch), rule.lr, rule.momentum)
            for batch in problem.batches
        ]
        params = steps[0].get_opt_params(list(problem.params().values()))
        history = [params]
        for step in steps:
            params = step(params, hparams, create_graph=keep)
            if not keep:
                params = [p.detach().requires_grad_() for p in params]
            history.append(params)
        if keep:
            return hypertorch.reverse_unroll(params, hparams, outer, set_grad=False)  # type: ignore[no-any-return]
        return hypertorch.reverse(history, hparams, steps, outer, set_grad=False)  # type: ignore[no-any-return]

    return run


LIBRARY = Library("hypertorch", "hypertorch (git)", ("hypergrad",), _methods, source="hypertorch")
