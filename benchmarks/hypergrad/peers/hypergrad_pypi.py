"""hypergrad 0.0.1 (PyPI), of another author than this project's package of the same name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from benchmarks.hypergrad.library import Library, Method
from benchmarks.hypergrad.problems import Stationary, Training

__all__ = ["LIBRARY"]


def _methods(problem: Training | Stationary) -> list[Method]:
    if isinstance(problem, Training):
        return []
    from hypergrad import approx_hypergrad  # type: ignore[attr-defined]

    params, names = problem.params(), list(problem.hparams)

    def inner(weights: Any, hparams: Any) -> Tensor:
        named = dict(zip(params, weights, strict=True))
        hyper = dict(zip(names, hparams, strict=True))
        return problem.inner_loss(problem.forward(named), named, hyper, problem.batch)

    def outer(weights: Any, hparams: Any) -> Tensor:
        return problem.outer_loss(problem.forward(dict(zip(params, weights, strict=True))))

    def run(function: Any, *options: Any) -> Any:
        def hypergradient() -> Sequence[Tensor]:
            weights = tuple(p.detach() for p in params.values())
            hparams = tuple(problem.hparams.values())
            found: Sequence[Tensor] = function(inner, outer, weights, hparams, *options)
            return found

        return hypergradient

    cg = run(approx_hypergrad.conjugate_gradient, problem.iterations, 1.0)
    rank = min(20, sum(p.numel() for p in params.values()))
    nystrom = run(approx_hypergrad.nystrom, rank, 0.01)
    return [
        Method("conjugate_gradient", cg),
        Method(f"nystrom, rank {rank}, rho 0.01", nystrom),
    ]


LIBRARY = Library(
    "hypergrad_pypi",
    "hypergrad 0.0.1 (PyPI)",
    ("hypergrad",),
    _methods,
    requirements=("hypergrad==0.0.1",),
)
