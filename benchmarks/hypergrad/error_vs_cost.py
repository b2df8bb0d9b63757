"""Error against cost of every estimator at growing budgets, on P1: a picture and its table.

    python -m benchmarks.hypergrad.error_vs_cost [repeats]

All start at the minimum; the error is the distance to the implicit hypergradient of the exactly
solved system, in float64.  Where an estimator takes inner steps it takes gradient descent with the
step 1/L, L the largest eigenvalue of the Hessian, so that truncated unrolling is a Neumann series.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hypergrad import measure, problems
from benchmarks.hypergrad.environments import ROOT, cache_folder
from benchmarks.hypergrad.plain import GRADIENTS, plain
from benchmarks.hypergrad.problems import Stationary
from benchmarks.hypergrad.reference import flat, reference, relative_error
from benchmarks.hypergrad.table import Conditions
from hypergrad import (
    CG,
    F2SA,
    PZOBO,
    SAMA,
    SGD,
    Estimator,
    FiniteDifference,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    Unrolled,
    module_problem,
)

__all__ = ["Point", "estimators", "measured"]

FIGURE = ROOT / "docs" / "figures" / "error_vs_cost.png"
TABLE = ROOT / "benchmarks" / "results" / "hypergrad_error_vs_cost.md"


@dataclass(frozen=True)
class Point:
    """One estimator at one budget.

    Attributes:
        family: the curve that it belongs to.
        label: the estimator as it is written.
        gradients: CPU time in units of one gradient of the inner loss.
        error: relative distance to the exact hypergradient.
        cosine: of the angle to it; what matters to an outer optimizer like Adam.
    """

    family: str
    label: str
    gradients: float
    error: float
    cosine: float


def estimators(largest: float) -> dict[str, dict[str, Estimator[Any]]]:
    """Return the estimators by family and label, for the largest eigenvalue of the Hessian."""
    step = 1 / largest
    descent = SGD(step)

    def cg(k: int, **options: Any) -> Implicit:
        return Implicit(CG(rtol=0.0, max_iter=k, **options))

    return {
        "Implicit, CG": {f"CG({k})": cg(k) for k in (1, 2, 5, 10, 20, 50, 100)},
        "Implicit, CG preconditioned by Nyström": {
            f"CG({k}), Nystrom(100)": cg(k, preconditioner=Nystrom(100)) for k in (2, 5, 10, 20, 40)
        },
        "Implicit, Neumann": {
            f"Neumann({k})": Implicit(Neumann(k, step=step)) for k in (1, 5, 20, 100, 400)
        },
        "Unrolled, truncated": {
            f"Unrolled({k})": Unrolled(descent, k) for k in (1, 5, 20, 100, 400)
        },
        "one inner step: T1–T2, DARTS, SAMA": {
            "Implicit(Identity())": Implicit(Identity(step)),
            "FiniteDifference()": FiniteDifference(lr=step),
            "SAMA()": SAMA(descent),
        },
        "PZOBO": {
            f"PZOBO({k}), 20 steps": PZOBO(descent, 20, directions=k, orthogonal=True)
            for k in (1, 4, 16, 64)
        },
        "F2SA": {
            f"F2SA(λ={m}), {k} steps": F2SA(descent, k, multiplier=m)
            for k, m in ((5, 10.0), (20, 100.0), (100, 100.0), (400, 1000.0))
        },
    }


def measured(problem: Stationary, known: Mapping[str, Any], repeats: int) -> list[Point]:
    """Run every estimator on a problem in float64."""

    def inner(module: Any, hparams: Any, batch: Any) -> Tensor:
        return problem.inner_loss(module, dict(module.named_parameters()), hparams, batch)

    def outer(module: Any, hparams: Any, batch: Any) -> Tensor:
        return problem.outer_criterion(module(batch.x), batch.y)

    nested, params = module_problem(problem.module, inner, outer)

    def run(estimator: Estimator[Any]) -> Callable[[], Tensor]:
        def hypergradient() -> Tensor:
            hparams = problem.leaves()
            state = estimator.init(nested, params, hparams)
            found, _ = estimator(nested, params, hparams, problem.batch, problem.outer_batch, state)
            return flat(found.grad.values())

        return hypergradient

    families, yardstick, points = estimators(float(known["spectrum"][-1])), plain(problem), []
    for family, members in families.items():
        runs = {label: run(estimator) for label, estimator in members.items()}
        times = measure.interleaved({"": yardstick, **runs}, repeats, warm_ups=0)
        gradient = min(times[""]) / GRADIENTS
        for label, compute in runs.items():
            found, exact = compute(), known["exact"]
            error = relative_error(found, exact)
            cosine = float(torch.cosine_similarity(found, exact, dim=0))
            points.append(Point(family, label, min(times[label]) / gradient, error, cosine))
    return points


def draw(points: list[Point], where: Path) -> None:
    """Draw error against cost on logarithmic axes, a curve for each family."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(9, 5.2), layout="constrained")
    families = list(dict.fromkeys(p.family for p in points))
    styles = zip(plt.get_cmap("tab10").colors, "osD^vP*Xp", strict=False)  # type: ignore[attr-defined]
    for family, (color, marker) in zip(families, styles, strict=False):
        own = [p for p in points if p.family == family]
        # Below 1e-9 only rounding is left.
        errors = [max(p.error, 1e-9) for p in own]
        costs = [p.gradients for p in own]
        axes.loglog(costs, errors, color=color, marker=marker, markersize=7, label=family)
    axes.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xlabel("cost: CPU time in gradients of the inner loss")
    axes.set_ylabel("relative error of the hypergradient")
    axes.grid(which="major", color="0.9")
    figure.legend(loc="outside right upper", frameon=False)
    where.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(where, dpi=120)
    plt.close(figure)


def page(points: list[Point], conditions: Conditions) -> str:
    """Return the data of the picture as Markdown."""
    lines = [
        "# Error against cost of a hypergradient",
        "",
        f"{conditions}",
        "",
        "Softmax regression on digits, 650 weights, 64 feature penalties, at the minimum, float64.",
        "Cost: CPU time in gradients of the inner loss. Error: relative distance to the exact",
        "hypergradient; cosine: of the angle to it, which says more of estimators of one inner",
        "step, because their length is that of the step, 1/L. The Nyström sketch of 100 columns is",
        "made anew in each call; in a run it serves several. BOME and PBGD move the weights",
        "together with the hyperparameters and have no value at a given point.",
        "",
        "| family | estimator | cost | error | cosine |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for p in points:
        cells = [p.family, p.label, f"{p.gradients:.1f}", f"{p.error:.1e}", f"{p.cosine:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(repeats: int) -> None:
    torch.set_num_threads(1)
    known = reference("P1", None, cache_folder())
    problem = problems.make("P1", torch.float64, None, known["params"])
    assert isinstance(problem, Stationary)
    load = os.getloadavg()[0]
    points = measured(problem, known, repeats)
    loads = sorted((load, os.getloadavg()[0]))
    command = "python -m benchmarks.hypergrad.error_vs_cost"
    TABLE.write_text(page(points, Conditions(command, repeats, (loads[0], loads[1]))))
    draw(points, FIGURE)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
