"""Sparsity-constrained optimal transport: at most k non-zeros in every column of the plan.

    min_T ⟨T, C⟩ + (γ/2) ‖T‖²    s.t.  T ≥ 0, T1 = a, Tᵀ1 = b, ‖t_j‖₀ ≤ k

Dual, with s_j = α + β_j − c_j:        max aᵀα + bᵀβ − Σ_j (1/2γ) Σ_{i ∈ top_k(s_j)} [s_ij]₊²
Semi-dual, with s_j = α − c_j:         max aᵀα − Σ_j (⟨s_j, t_j⟩ − (γ/2) ‖t_j‖²),
    t_j = projection of top_k(s_j)/γ on {t ≥ 0, Σ t = b_j}

A step is one iteration of L-BFGS, or of Adam, on every problem of every split.  The plan is the
gradient formula at the current potentials; nothing else is trained.  The duals are those of the
convex relaxation: where ties at rank k leave a gap, T misses its row marginals, so "row_error" is
always reported, and costs are only comparable where it is small.  The dual has a kink at
such ties, and L-BFGS ends there with status LINESEARCH.

γ and C are smooth by the envelope theorem, without unrolling: d value/dγ = ½‖T‖² and
d value/dC = T.  Cardinality, form and optimizer are the sampler's.

Source: Liu, Puigcerver and Blondel, "Sparsity-Constrained Optimal Transport", ICLR 2023.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from adapters.iteration import Iteration, Progress
from adapters.tasks import Task
from adapters.tasks.transport import Transport
from bilevel.domains import Choice, Float, Grad, Int
from bilevel.metrics import Role, RunStatus
from bilevel.space import Space

__all__ = ["SparseTransport", "dual", "plan", "project_simplex", "semi_dual"]

STALLED = 1e-6
"""Largest gradient at which a line search without further decrease counts as converged."""


class SparseTransport(Iteration):
    """Optimal transport with at most k non-zeros in a column, by smooth duals and L-BFGS."""

    name = "sparse_ot"
    space = Space(
        gamma=Grad(
            1.0, low=1e-3, high=100.0, scale="log", doc="γ, with max C = 1; smooth, by envelope"
        ),
        cardinality=Int(1, 64, log=True, default=4, doc="k, largest number of non-zeros"),
        form=Choice("semi_dual", "dual", default="semi_dual", doc="which dual"),
        optimizer=Choice("lbfgs", "adam", default="lbfgs", doc="of the potentials"),
        lr=Float(1e-4, 1.0, log=True, default=0.02, when={"optimizer": "adam"}, doc="of Adam"),
        tol=Float(1e-12, 1e-3, log=True, default=1e-9, doc="stop at this gradient norm"),
        max_iter=Int(50, 20_000, log=True, default=500, doc="most iterations"),
    ).own(gamma="sampler")
    task_type: ClassVar[type[Task]] = Transport
    roles: ClassVar[Mapping[str, Role]] = {
        "row_error": "constraint",
        "column_error": "constraint",
        "nonzeros": "diagnostic",
        "value": "diagnostic",
    }

    def start(self) -> dict[str, Any]:
        """Zero potentials for every problem."""
        task, values = cast(Transport, self.setting.task), self.setting.constants
        state: dict[str, Any] = {"k": 0, "problems": {}}
        for name, split in task.splits.items():
            m, n = split["a"].shape[1], split["b"].shape[1]
            if values["cardinality"] > m:
                raise ValueError(
                    f"cardinality must be at most the {m} rows of a plan, but got "
                    f"{values['cardinality']}."
                )
            length = m if values["form"] == "semi_dual" else m + n
            zero = torch.zeros(length, dtype=task.dtype, device=task.device)
            state["problems"][name] = [
                {"potentials": zero.clone(), "optimizer": None, "gap": math.inf, "done": False}
                for _ in range(len(split["a"]))
            ]
        return state

    def iterate(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
        """One iteration of the optimizer on each problem that has not converged."""
        problems: dict[str, list[dict[str, Any]]] = {}
        value = 0.0
        for name, split in self.setting.task.splits.items():
            cost = cast(Transport, self.setting.task).cost(split)
            problems[name] = []
            for i, problem in enumerate(state["problems"][name]):
                after, found = self._advance(problem, split["a"][i], split["b"][i], cost[i])
                problems[name].append(after)
                value += found if name == "train" else 0.0
        done = all(p["done"] for found in problems.values() for p in found)
        k = state["k"] + 1
        status = RunStatus.RUNNING
        if done:
            worst = max(p["gap"] for found in problems.values() for p in found)
            stalled = worst > max(self.setting.constants["tol"], STALLED)
            status = RunStatus.LINESEARCH if stalled else RunStatus.CONVERGED
        elif k >= self.setting.constants["max_iter"]:
            status = RunStatus.MAX_ITER
        after = {"k": k, "problems": problems}
        entries = dict(self.measure(after, "train"))
        entries["value"] = value / len(problems["train"])
        if not math.isfinite(value):
            entries["loss"] = math.nan
        return after, Progress(entries, status)

    def measure(self, state: Mapping[str, Any], split: str) -> Mapping[str, float]:
        """Cost, errors of the marginals and most non-zeros of a column, means over problems."""
        plans = self.plans(state, split)
        found = self.setting.task.measure(plans, self.setting.task.split(split))
        entries = {name: float(each.mean()) for name, each in found.items()}
        return {**entries, "nonzeros": float((plans > 0).sum(dim=1).max())}

    def plans(self, state: Mapping[str, Any], split: str) -> Tensor:
        """Return the plans of a split, shape (problems, m, n)."""
        task, values = cast(Transport, self.setting.task), self.setting.constants
        data = task.split(split)
        cost = task.cost(data)
        return torch.stack(
            [
                plan(
                    problem["potentials"],
                    data["a"][i],
                    data["b"][i],
                    cost[i],
                    values["gamma"],
                    values["cardinality"],
                    values["form"],
                )
                for i, problem in enumerate(state["problems"][split])
            ]
        )

    def _advance(
        self, problem: Mapping[str, Any], a: Tensor, b: Tensor, cost: Tensor
    ) -> tuple[dict[str, Any], float]:
        values = self.setting.constants
        objective = semi_dual if values["form"] == "semi_dual" else dual
        potentials = problem["potentials"].clone().requires_grad_()
        shape = (a, b, cost, values["gamma"], values["cardinality"])

        optimizer: torch.optim.Optimizer
        if values["optimizer"] == "lbfgs":
            optimizer = torch.optim.LBFGS(
                [potentials],
                max_iter=1,
                max_eval=25,
                tolerance_grad=0.0,
                tolerance_change=0.0,
                history_size=10,
                line_search_fn="strong_wolfe",
            )
        else:
            optimizer = torch.optim.Adam([potentials], lr=values["lr"])
        if problem["optimizer"] is not None:
            optimizer.load_state_dict(problem["optimizer"])

        def closure() -> float:
            with torch.enable_grad():
                loss = -objective(potentials, *shape)
                (potentials.grad,) = torch.autograd.grad(loss, [potentials])
            return float(loss.detach())

        if problem["done"]:
            return dict(problem), -closure()
        optimizer.step(closure)  # type: ignore[no-untyped-call, unused-ignore]
        value = -closure()
        gap = float(cast(Tensor, potentials.grad).abs().max())
        after = {
            "potentials": potentials.detach(),
            "optimizer": optimizer.state_dict(),
            "gap": gap,
            # The potentials stand still where the line search finds no decrease any more.
            "done": gap <= values["tol"]
            or bool(torch.equal(potentials.detach(), problem["potentials"])),
        }
        return after, value


def semi_dual(
    potentials: Tensor, a: Tensor, b: Tensor, cost: Tensor, gamma: float | Tensor, k: int
) -> Tensor:
    """Return the semi-dual objective at α, to be maximized; concave, differentiable a.e.

    Args:
        potentials: α, shape (m,).
        a: weights of rows, shape (m,).
        b: weights of columns, shape (n,).
        cost: C, shape (m, n).
        gamma: γ > 0; a tensor makes the value differentiable in it.
        k: largest number of non-zeros of a column, 1 ... m.
    """
    s = potentials[:, None] - cost
    # At the optimal t the derivative through t vanishes (envelope theorem).
    t = _columns(s.detach(), b, gamma, k).detach()
    return a @ potentials - (s * t).sum() + gamma / 2 * t.square().sum()


def dual(
    potentials: Tensor, a: Tensor, b: Tensor, cost: Tensor, gamma: float | Tensor, k: int
) -> Tensor:
    """Return the dual objective at (α, β), shape (m + n,), to be maximized; see `semi_dual`."""
    m = len(a)
    alpha, beta = potentials[:m], potentials[m:]
    s = alpha[:, None] + beta - cost
    top = s.topk(k, dim=0).values
    return a @ alpha + b @ beta - top.clamp(min=0).square().sum() / (2 * gamma)


def plan(
    potentials: Tensor,
    a: Tensor,
    b: Tensor,
    cost: Tensor,
    gamma: float | Tensor,
    k: int,
    form: str,
) -> Tensor:
    """Return T of the potentials, shape (m, n): at most k non-zeros in a column, T ≥ 0.

    The semi-dual's T has exact column sums.
    """
    if form == "semi_dual":
        return _columns(potentials[:, None] - cost, b, gamma, k)
    m = len(a)
    s = potentials[:m, None] + potentials[m:] - cost
    top, rows = s.topk(k, dim=0)
    return torch.zeros_like(s).scatter(0, rows, top.clamp(min=0) / gamma)


def project_simplex(v: Tensor, mass: Tensor) -> Tensor:
    """Return the nearest t ≥ 0 with Σ t = mass to each column of v, shape (k, n); by sorting.

    Args:
        v: shape (k, n).
        mass: positive, shape (n,).
    """
    ordered = v.sort(dim=0, descending=True).values
    rank = torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)[:, None]
    excess = (ordered.cumsum(dim=0) - mass) / rank
    support = (ordered > excess).sum(dim=0, keepdim=True)
    return (v - excess.gather(0, support - 1)).clamp(min=0)


def _columns(s: Tensor, b: Tensor, gamma: float | Tensor, k: int) -> Tensor:
    top, rows = s.topk(k, dim=0)
    return torch.zeros_like(s).scatter(0, rows, project_simplex(top / gamma, b))
