"""TorchOpt 0.7.3: meta-optimizers on a module, and implicit differentiation by custom_root."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["LIBRARY"]


def _methods(problem: Training | Stationary) -> list[Method]:
    if isinstance(problem, Stationary):
        return [Method("custom_root, solve_cg", _implicit(problem))]
    methods = [Method("MetaOptimizer", _unrolled(problem))]
    if problem.rule.kind == "adam":
        methods.append(Method("MetaAdam, accelerated", _unrolled(problem, accelerated=True)))
    return methods


def _unrolled(problem: Training, **options: Any) -> Any:
    import torchopt

    def run() -> Sequence[Tensor]:
        hparams, module, rule = problem.leaves(), deepcopy(problem.module), problem.rule
        if rule.kind == "sgd":
            optimizer = torchopt.MetaSGD(module, rule.lr, momentum=rule.momentum)
        else:
            given = {f"use_{k}_op": v for k, v in options.items()}
            optimizer = torchopt.MetaAdam(module, rule.lr, **given)
        for batch in problem.batches:
            # The meta-optimizer replaces the parameters, so they must be named anew.
            named = _named(module)
            optimizer.step(problem.inner_loss(module, named, hparams, batch))
        return torch.autograd.grad(problem.outer_loss(module), list(hparams.values()))

    return run


def _named(module: torch.nn.Module) -> dict[str, Tensor]:
    """Name the parameters, also where they are no leaves any more."""
    return {
        f"{prefix}.{key}": tensor
        for prefix, part in module.named_modules()
        for key, tensor in part._parameters.items()
        if tensor is not None
    }


def _implicit(problem: Stationary) -> Any:
    import torchopt

    names = list(problem.hparams)

    def optimality(params: tuple[Tensor, ...], *hparams: Tensor) -> tuple[Tensor, ...]:
        def loss(params: tuple[Tensor, ...]) -> Tensor:
            named = dict(zip(start, params, strict=True))
            hyper = dict(zip(names, hparams, strict=True))
            return problem.inner_loss(problem.forward(named), named, hyper, problem.batch)

        return torch.func.grad(loss)(params)

    start = problem.params()
    solve = torchopt.linear_solve.solve_cg(maxiter=problem.iterations, rtol=0.0, atol=0.0)

    @torchopt.diff.implicit.custom_root(  # type: ignore[untyped-decorator]
        optimality, argnums=tuple(range(1, len(names) + 1)), solve=solve
    )
    def minimum(params: tuple[Tensor, ...], *hparams: Tensor) -> tuple[Tensor, ...]:
        return tuple(p.detach().clone().requires_grad_() for p in params)

    def run() -> Sequence[Tensor]:
        hparams = problem.leaves()
        params = minimum(tuple(start.values()), *hparams.values())
        named = dict(zip(start, params, strict=True))
        value = problem.outer_loss(problem.forward(named))
        return torch.autograd.grad(value, list(hparams.values()))

    return run


LIBRARY = Library("torchopt", "TorchOpt 0.7.3", ("torchopt",), _methods)
