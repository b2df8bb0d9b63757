"""This library: every estimator that gives the hypergradient of a problem, in every mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any, get_args, get_type_hints

from torch import Tensor

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import Batch, Stationary, Training
from hypergrad import (
    CG,
    SGD,
    Adam,
    Hyper,
    Hypergradient,
    Implicit,
    Optimizer,
    Unrolled,
    module_problem,
)

__all__ = ["LIBRARY", "rule"]


def rule(problem: Training, decay: Any) -> Optimizer:
    """Return a problem's update rule with tunable weight decay."""
    if problem.rule.kind == "sgd":
        return SGD(problem.rule.lr, problem.rule.momentum, weight_decay=decay)
    return Adam(problem.rule.lr, weight_decay=decay)


def _methods(problem: Training | Stationary) -> list[Method]:
    return _unrolled(problem) if isinstance(problem, Training) else _implicit(problem)


def _unrolled(problem: Training) -> list[Method]:
    def error(module: Any, hparams: Any, batch: Batch) -> Tensor:
        return problem.criterion(module(batch.x), hparams, batch)

    def outer(module: Any, hparams: Any, batch: Batch) -> Tensor:
        return problem.outer_criterion(module(batch.x), batch.y)

    nested, params = module_problem(problem.module, error, outer)

    def run(estimator: Unrolled) -> Callable[[], Sequence[Tensor]]:
        def hypergradient() -> Sequence[Tensor]:
            hparams = {"decay": problem.leaves()}
            state = estimator.init(nested, params, hparams)
            batches = problem.batches.__getitem__
            found, _ = estimator(nested, params, hparams, batches, problem.outer_batch, state)
            return _compiled_or_error(found, list(found.grad["decay"].values()))

        return hypergradient

    optimizer, steps = rule(problem, Hyper("decay")), len(problem.batches)
    methods = [
        Method(f"Unrolled, {how}", run(Unrolled(optimizer, steps, memory=how)))  # type: ignore[arg-type]
        for how in _choices(Unrolled, "memory")
        if how != "forward"  # for a few hyperparameters, not for one each weight
    ]
    # Compiling saves the overhead of small steps; large ones are bound by arithmetic.
    compiled = _compiled(Unrolled) if sum(p.numel() for p in params.values()) < 100_000 else []
    for how in compiled:
        estimator = Unrolled(optimizer, steps, compile=how)  # type: ignore[call-arg]
        methods.append(
            Method(f'Unrolled, compile="{how}"', run(estimator), compiles=True, single=True)
        )
    return methods


def _implicit(problem: Stationary) -> list[Method]:
    def inner(module: Any, hparams: Any, batch: Batch) -> Tensor:
        return problem.inner_loss(module, dict(module.named_parameters()), hparams, batch)

    def outer(module: Any, hparams: Any, batch: Batch) -> Tensor:
        return problem.outer_criterion(module(batch.x), batch.y)

    nested, params = module_problem(problem.module, inner, outer)

    def run(estimator: Implicit) -> Callable[[], Sequence[Tensor]]:
        def hypergradient() -> Sequence[Tensor]:
            hparams = problem.leaves()
            state = estimator.init(nested, params, hparams)
            found, _ = estimator(nested, params, hparams, problem.batch, problem.outer_batch, state)
            return _compiled_or_error(found, list(found.grad.values()))

        return hypergradient

    solver = CG(rtol=0.0, max_iter=problem.iterations)
    methods = [Method("Implicit", run(Implicit(solver)))]
    for how in _compiled(Implicit):
        estimator = Implicit(solver, compile=how)  # type: ignore[call-arg]
        methods.append(
            Method(f'Implicit, compile="{how}"', run(estimator), compiles=True, single=True)
        )
    return methods


def _compiled_or_error(found: Hypergradient, grads: list[Tensor]) -> list[Tensor]:
    """Return the tensors; a call that fell back to eager is no measurement of compiled code."""
    if found.compiled is not None and not found.compiled.used:
        raise RuntimeError(f"ran eagerly: {found.compiled.reason}")
    return grads


def _choices(estimator: type, field: str) -> tuple[str, ...]:
    """Return the values of a field of type Literal; none if there is no such field."""
    if field not in {f.name for f in fields(estimator)}:
        return ()
    return get_args(get_type_hints(estimator)[field])


def _compiled(estimator: type) -> list[str]:
    return [how for how in _choices(estimator, "compile") if how != "off"]


LIBRARY = Library("ours", "this library", ("hypergrad",), _methods)
