"""Products that a hypergradient takes after an outer step: warm start and preconditioner.

    OMP_NUM_THREADS=1 python -m benchmarks.hypergrad.warm_start [ridge]

P3, data cleaning on digits (see problems.py), in float64.  A first hypergradient at the minimum
w*(h) leaves its solution and its preconditioner; then h moves by 0.5 against it, w is trained on,
and the next hypergradient is compared with the exact one at the new w*(h): from a solve to a
residual of 1e-10, which is itself checked by the dense Hessian.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import Any

import optree
import torch
from torch import Tensor

from benchmarks.hypergrad import problems
from benchmarks.hypergrad.reference import minimize
from hypergrad import CG, MINRES, Hypergradient, Implicit, Nystrom, Problem, module_problem
from hypergrad.implicit import ImplicitState
from hypergrad.operators import Hessian
from hypergrad.outer import outer_gradients
from hypergrad.tree import hyper_leaves, trainable_leaves

RIDGE = problems.RIDGE_P3
"""With it, cold CG reaches 6, 2, 1.3 and 0.1 % after 7, 20, 27 and 100 products."""

LENGTH, GOAL, MOST, OWN = 0.5, 0.01, 30, 3e-3


@dataclass(frozen=True)
class Point:
    """Weights and hyperparameters."""

    problem: Problem
    params: dict[str, Tensor]
    hparams: dict[str, Tensor]
    batch: problems.Batch

    def call(self, solver: CG, state: ImplicitState | None) -> tuple[Hypergradient, ImplicitState]:
        estimator = Implicit(solver, warm_start=True)
        if state is None:
            state = estimator.init(self.problem, self.params, self.hparams)
        return estimator(self.problem, self.params, self.hparams, self.batch, None, state)

    def exact(self) -> Tensor:
        """Return the hypergradient with the system solved to rounding, definite or not."""
        solver = MINRES(rtol=1e-10, max_iter=5000)
        estimator = Implicit(solver)
        state = estimator.init(self.problem, self.params, self.hparams)
        found, _ = estimator(self.problem, self.params, self.hparams, self.batch, None, state)
        if not found.status.ok:
            raise RuntimeError(f"the reference is not solved: {found.status}")
        return flat(found.grad)

    def dense(self) -> Tensor:
        """Return the same by the dense Hessian."""
        w, h = trainable_leaves(self.params), hyper_leaves(self.hparams)
        point = Hessian().at(self.problem, w, h, self.batch)
        b = point.space.pack(outer_gradients(self.problem, w, h, None)[1])
        rows = torch.vmap(point.matvec, chunk_size=64)(torch.eye(len(b), dtype=b.dtype))
        cross = point.cross(torch.linalg.solve((rows + rows.T) / 2, b))
        return -flat([c for c in cross if c is not None])


def flat(tree: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in optree.tree_leaves(tree)])


def main(ridge: float) -> None:
    torch.set_num_threads(1)
    setting = problems.make("P3", torch.float64)
    assert isinstance(setting, problems.Stationary)

    def penalty(named: problems.Named, hparams: problems.Named) -> Tensor:
        return 0.5 * ridge * torch.stack([p.square().sum() for p in named.values()]).sum()

    setting = replace(setting, penalty=penalty)
    problem, _ = module_problem(
        setting.module,
        lambda m, h, b: setting.inner_loss(m, dict(m.named_parameters()), h, b),
        lambda m, h, b: setting.outer_loss(m),
    )

    def at(hparams: dict[str, Tensor]) -> Point:
        return Point(problem, setting.params(), trained(hparams), setting.batch)

    minimize(setting, 1e-6)
    first = at(setting.hparams)
    exact = first.exact()
    off = error(exact, first.dense())
    tight = CG(rtol=2e-3, max_iter=200)
    plain = first.call(tight, None)
    helped = first.call(replace(tight, preconditioner=Nystrom(rank=50)), None)
    print(f"torch {torch.__version__}; ridge {ridge:g}; reference to dense solve: {off:.0e}\n")
    print("| first call, cold | products | error | residual | status |")
    print("| --- | ---: | ---: | ---: | --- |")
    for name, (found, _) in (("CG", plain), ("CG, Nyström rank 50", helped)):
        print(row(name, found, exact))
    moved = {k: h - LENGTH * exact / exact.norm() for k, h in setting.hparams.items()}
    stale = at(moved)
    setting = replace(setting, hparams=moved)
    points = {"none": stale}
    for steps in (25, 100):
        descend(setting, steps)
        points[f"{steps} more L-BFGS steps" if steps > 25 else f"{steps} L-BFGS steps"] = at(moved)
    minimize(setting, 1e-6)
    points["to the minimum"] = solved = at(moved)
    exact, stale_exact = solved.exact(), stale.exact()
    between = error(stale_exact, exact)
    print(f"\nFrom the exact hypergradient at w*(h) to that at the stale w: {between:.1%}.")
    start = plain[1]
    kept = {**helped[1], "adjoint": None}
    solvers: dict[str, tuple[CG, ImplicitState | None]] = {
        "cold CG": (CG(), None),
        "warm q": (CG(), start),
        "kept Nyström": (CG(preconditioner=Nystrom(rank=50)), kept),
        "warm q, kept Nyström": (CG(preconditioner=Nystrom(rank=50)), helped[1]),
    }
    print(f"\nProducts to {GOAL:.0%} (all counted: residual of the start, cross product)\n")
    print("| training of w after the outer step | " + " | ".join(solvers) + " | at 7 products |")
    print("| --- |" + " ---: |" * (len(solvers) + 1))
    both = solvers["warm q, kept Nyström"]
    for name, point in points.items():
        cells = [reached(point, *how, exact) for how in solvers.values()]
        seven = within(point, *both, 7)
        cells.append(f"{error(seven.grad, exact):.2%}, residual {seven.residual:.1e}")
        print(f"| {name} | " + " | ".join(cells) + " |")
    off, needed = (
        error(within(stale, *both, 7).grad, stale_exact),
        reached(stale, *both, stale_exact),
    )
    print(
        f"\nAgainst the exact hypergradient at the stale w, with both kept: {off:.1%} after 7 "
        f"products; products to the goal: {needed}."
    )
    print(f"\nStopping by itself at rtol={OWN}: outer steps of that length, w trained to w*(h)\n")
    print("| outer step | products | error | residual | status |")
    print("| ---: | ---: | ---: | ---: | --- |")
    solver = CG(rtol=OWN, max_iter=100, preconditioner=Nystrom(rank=50, every=20))
    state = None
    for step in range(7):
        point = at(setting.hparams)
        found, state = point.call(solver, state)
        print(row(str(step), found, point.exact()))
        direction = flat(found.grad)
        h = {k: v - LENGTH * direction / direction.norm() for k, v in setting.hparams.items()}
        setting = replace(setting, hparams=h)
        minimize(setting, 1e-6)


def trained(tree: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach().clone().requires_grad_() for k, v in tree.items()}


def descend(setting: problems.Stationary, steps: int) -> None:
    named = dict(setting.module.named_parameters())
    optimizer = torch.optim.LBFGS(named.values(), max_iter=steps, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        loss = setting.inner_loss(setting.module, named, setting.hparams, setting.batch)
        loss.backward()
        return loss.item()

    optimizer.step(closure)


def error(found: Any, exact: Tensor) -> float:
    return float((flat(found) - exact).norm() / exact.norm())


def row(name: str, found: Hypergradient, exact: Tensor) -> str:
    return (
        f"| {name} | {found.n_hvp} | {error(found.grad, exact):.2%} | {found.residual:.1e} | "
        f"{found.status.value} |"
    )


def within(point: Point, solver: CG, state: ImplicitState | None, products: int) -> Hypergradient:
    """The best hypergradient of so many products: as many iterations as they leave."""
    for iterations in range(products, 0, -1):
        found, _ = point.call(replace(solver, rtol=0.0, max_iter=iterations), state)
        if found.n_hvp <= products:
            return found
    raise ValueError(f"{products} products are too few.")


def reached(point: Point, solver: CG, state: ImplicitState | None, exact: Tensor) -> str:
    for iterations in range(1, MOST + 1):
        found, _ = point.call(replace(solver, rtol=0.0, max_iter=iterations), state)
        if error(found.grad, exact) <= GOAL:
            return str(found.n_hvp)
        if not found.status.ok and found.status.value != "max_iter":
            return f"no ({found.status.value})"
    return f"> {MOST}"


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else RIDGE)
