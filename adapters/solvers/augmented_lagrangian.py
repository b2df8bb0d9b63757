"""Exact augmented Lagrangian: Newton steps by sketching, on a merit function of x and λ.

    min_x f(x)  s.t.  c(x) = 0;   L = f + cᵀλ,  g = ∇ₓL,  G = ∂c/∂x,  H = ∇²ₓₓL,  R = (g, c)
    M(x, λ) = L + (η₁/2) ‖c‖² + (η₂/2) ‖g‖²
    ∇ₓM = g + η₂ H g + η₁ Gᵀ c,      ∇_λ M = c + η₂ G g

An outer iteration solves  [[B, Gᵀ], [G, 0]] z = −R  roughly, by projections of z onto random
sketches Sᵀ(Az − b) = 0 (Gaussian vectors or rows; GMRES and direct solution as baselines), until
‖A‖_F Ψ ‖Az − b‖ ≤ θ_k δ ‖b‖.  Where ∇Mᵀz > −(η₂/2) ‖R‖² it raises η₁, lowers η₂ and δ, and goes on
sketching from the same z; then it takes an Armijo step.  B is H, or H + (ξ_B + ‖H‖_F) I where H is
not positive on the null space of G.  Nothing is trained; state is x, λ, η₁, η₂, δ and a generator.

Differs from the published code on purpose: ∇M uses H = ∇²ₓₓL, where the code has ∇²f, which is no
gradient of M once constraints curve; halvings of the step are bounded.  No hyperparameter is
smooth (branches decide).  Data p of the problem are: `sensitivity` gives d(x, λ)/dp by one solve
with the same matrix, A d(x, λ)/dp = −∂R/∂p.

Source: Hong, Na, Mahoney and Kolar, "Constrained Optimization via Exact Augmented Lagrangian and
Randomized Iterative Sketching", ICML 2023.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from adapters.iteration import Iteration, Progress
from adapters.solvers.sketch import Sketch
from adapters.tasks import Task
from adapters.tasks.constrained import Constrained
from bilevel.domains import Choice, Float, Int
from bilevel.metrics import Role, RunStatus
from bilevel.space import Space

__all__ = ["ExactAugmentedLagrangian", "merit", "merit_gradient", "sensitivity"]

HALVINGS = 60
FLOOR = 1e-6
"""Smallest δ."""


@dataclass(frozen=True)
class _Point:
    """Derivatives at (x, λ)."""

    c: Tensor
    g: Tensor
    G: Tensor
    H: Tensor

    @property
    def residual(self) -> Tensor:
        return torch.cat([self.g, self.c])


class ExactAugmentedLagrangian(Iteration):
    """Equality-constrained Newton on an exact augmented Lagrangian, with sketched linear solves."""

    name = "exact_augmented_lagrangian"
    space = Space(
        eta1=Float(0.1, 100.0, log=True, default=1.0, doc="first weight of ‖c‖²"),
        eta2=Float(1e-3, 1.0, log=True, default=0.1, doc="first weight of ‖g‖²"),
        delta=Float(0.01, 0.9, log=True, default=0.1, doc="first accuracy of the linear solves"),
        floor=Float(1e-3, 1.0, log=True, default=0.1, doc="ξ_B, shift of an indefinite Hessian"),
        armijo=Float(1e-4, 0.45, log=True, default=0.1, doc="β, share of the predicted decrease"),
        factor=Float(1.05, 4.0, default=1.5, doc="ν, change of the weights"),
        psi_scale=Float(1e-3, 1.0, log=True, default=1.0, doc="factor of the cautious bound Ψ"),
        sketch=Choice(
            "gaussian", "kaczmarz", "gmres", "exact", default="gaussian", doc="linear solver"
        ),
        block=Int(1, 64, log=True, default=1, doc="directions of a sketch, at most n + m"),
        schedule=Choice("constant", "1/k", "1/k^2", default="constant", doc="θ_k"),
        max_inner=Int(1000, 1_000_000, log=True, default=100_000, doc="sketches of a solve"),
        tol=Float(1e-8, 1e-3, log=True, default=1e-4, doc="stop at ‖R‖ ≤ tol"),
        max_outer=Int(10, 10_000, log=True, default=1000, doc="outer iterations"),
        singular=Float(1e-12, 0.1, log=True, default=1e-2, doc="smallest eigenvalue of G Gᵀ"),
    )
    task_type: ClassVar[type[Task]] = Constrained
    roles: ClassVar[Mapping[str, Role]] = {
        "violation": "constraint",
        "sketches": "diagnostic",
        "eta1": "diagnostic",
        "eta2": "diagnostic",
        "delta": "diagnostic",
    }

    @property
    def task(self) -> Constrained:
        """The problem."""
        return cast(Constrained, self.setting.task)

    def start(self) -> dict[str, Any]:
        """The task's start point and multipliers."""
        row, values = self.task.split("train"), self.setting.constants
        size = row["x"].shape[1] + row["y"].shape[1]
        if values["block"] > size:
            raise ValueError(f"block must be at most n + m = {size}, but got {values['block']}.")
        return {
            "x": row["x"][0].clone(),
            "multipliers": row["y"][0].clone(),
            "eta1": values["eta1"],
            "eta2": values["eta2"],
            "delta": values["delta"],
            "k": 0,
            "z": None,
            "generator": torch.Generator().manual_seed(self.setting.seed).get_state(),
        }

    def iterate(self, state: Mapping[str, Any]) -> tuple[dict[str, Any], Progress]:
        """One outer iteration."""
        state, values = dict(state), self.setting.constants
        x, multipliers = state["x"], state["multipliers"]
        at = _derivatives(self.task, x, multipliers)
        value = self.task.objective(x)
        if not bool(value.isfinite() and at.residual.isfinite().all() and at.H.isfinite().all()):
            return state, self._said(state, math.nan, 0, RunStatus.DIVERGED)
        size = float(at.residual.norm())
        if size <= values["tol"]:
            return state, self._said(state, size, 0, RunStatus.CONVERGED)
        if state["k"] >= values["max_outer"]:
            return state, self._said(state, size, 0, RunStatus.MAX_ITER)
        smallest = float(torch.linalg.eigvalsh(at.G @ at.G.T)[0])
        if smallest < values["singular"]:
            return state, self._said(state, size, 0, RunStatus.SINGULAR)

        state["k"] += 1
        B = self._regularized(at)
        m = len(at.c)
        matrix = torch.cat([torch.cat([B, at.G.T], 1), torch.cat([at.G, at.G.new_zeros(m, m)], 1)])
        psi = _psi(B, smallest, values["floor"]) * values["psi_scale"]
        upsilon = max(float(at.G.norm()), float(at.H.norm()), 1.0)
        state["delta"] = self._accuracy(state, state["delta"], psi, upsilon)
        sketch = Sketch(matrix, -at.residual, values["sketch"], values["block"])
        z, spent = torch.zeros_like(at.residual) if state["z"] is None else state["z"], 0
        generator = torch.Generator()
        generator.set_state(state["generator"])
        theta = {"constant": 1.0, "1/k": 1 / state["k"], "1/k^2": state["k"] ** -2}
        while True:
            goal = theta[values["schedule"]] * state["delta"] * size / (float(matrix.norm()) * psi)
            z, used = sketch.refine(z, goal, values["max_inner"] - spent, generator)
            spent += used
            slope = float(merit_gradient(at, state["eta1"], state["eta2"]) @ z)
            escape = state["eta1"] > 1e8 or state["eta2"] < 1e-8
            if slope <= -state["eta2"] / 2 * size**2 or escape or spent >= values["max_inner"]:
                break
            state["eta1"] *= values["factor"] ** 2
            state["eta2"] /= values["factor"]
            state["delta"] = self._accuracy(
                state, state["delta"] / values["factor"] ** 4, psi, upsilon
            )
        state["generator"] = generator.get_state()
        if slope >= 0:
            # Behind an escape no step along z can be trusted; after a spent budget the next
            # iteration goes on sketching from z.
            state["z"] = z
            status = RunStatus.LINESEARCH if escape else RunStatus.RUNNING
            return state, self._said(state, size, spent, status)
        state["z"] = None
        return self._step(state, z, slope, size, spent)

    def _step(
        self, state: dict[str, Any], z: Tensor, slope: float, size: float, spent: int
    ) -> tuple[dict[str, Any], Progress]:
        """Halve the step until the merit function falls by a share of the predicted decrease."""
        x, multipliers = state["x"], state["multipliers"]
        n, weights = len(x), (state["eta1"], state["eta2"])
        before = float(merit(self.task, x, multipliers, *weights))
        alpha = 1.0
        for _ in range(HALVINGS):
            ahead = (x + alpha * z[:n], multipliers + alpha * z[n:])
            after = float(merit(self.task, *ahead, *weights))
            # Near the solution the decrease drowns in rounding errors of M.
            slack = 1e-14 * max(1.0, abs(before))
            if after <= before + alpha * self.setting.constants["armijo"] * slope + slack:
                state["x"], state["multipliers"] = ahead
                return state, self._said(state, size, spent, RunStatus.RUNNING)
            alpha /= 2
        return state, self._said(state, size, spent, RunStatus.LINESEARCH)

    def measure(self, state: Mapping[str, Any], split: str) -> Mapping[str, float]:
        """f, ‖c‖ and the KKT residual ‖R‖ of the current pair; the same on every split."""
        at = _derivatives(self.task, state["x"], state["multipliers"])
        found = self.task.measure(state["x"][None], {})
        return {
            "loss": float(found["loss"]),
            "violation": float(found["violation"]),
            "residual": float(at.residual.norm()),
        }

    def _regularized(self, at: _Point) -> Tensor:
        n, m = len(at.g), len(at.c)
        if m < n:
            basis = torch.linalg.qr(at.G.T, mode="complete").Q[:, m:]
            if float(torch.linalg.eigvalsh(basis.T @ at.H @ basis)[0]) < 1e-6:
                shift = self.setting.constants["floor"] + float(at.H.norm())
                lifted: Tensor = at.H + shift * torch.eye(n, dtype=at.H.dtype, device=at.H.device)
                return lifted
        return at.H

    def _accuracy(
        self, state: Mapping[str, Any], delta: float, psi: float, upsilon: float
    ) -> float:
        eta1, eta2 = state["eta1"], state["eta2"]
        room = (0.5 - self.setting.constants["armijo"]) * eta2
        trial = room / ((1 + eta1 + eta2) * upsilon**2 * psi**2)
        return float(max(min(delta, trial), FLOOR))

    def _said(
        self, state: Mapping[str, Any], size: float, sketches: int, status: RunStatus
    ) -> Progress:
        return Progress(
            {
                "loss": float(self.task.objective(state["x"])),
                "violation": float(self.task.constraints(state["x"]).norm()),
                "residual": size,
                "sketches": float(sketches),
                **{name: float(state[name]) for name in ("eta1", "eta2", "delta")},
            },
            status,
        )


def merit(task: Constrained, x: Tensor, multipliers: Tensor, eta1: float, eta2: float) -> Tensor:
    """Return M(x, λ) = f + cᵀλ + (η₁/2)‖c‖² + (η₂/2)‖∇ₓL‖²."""
    c = task.constraints(x)
    g = torch.func.grad(_lagrangian(task, multipliers))(x)
    penalties: Tensor = eta1 / 2 * c.square().sum() + eta2 / 2 * g.square().sum()
    return task.objective(x) + c @ multipliers + penalties


def merit_gradient(at: _Point, eta1: float, eta2: float) -> Tensor:
    """Return ∇M in (x, λ), shape (n + m,)."""
    in_x = at.g + eta2 * at.H @ at.g + eta1 * at.G.T @ at.c
    return torch.cat([in_x, at.c + eta2 * at.G @ at.g])


def sensitivity(
    residual: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, multipliers: Tensor, p: Tensor
) -> Tensor:
    """Return d(x, λ)/dp at a solution, shape (n + m, *p.shape), by the implicit function theorem.

    Args:
        residual: ``(x, λ, p) -> R``, shape (n + m,): ∇ₓL stacked over c.
        x: solution at p.
        multipliers: its multipliers.
        p: data of the problem.

    Raises:
        ValueError: the KKT matrix is singular, so that the solution has no derivative.
    """
    n = len(x)
    A = torch.func.jacrev(lambda v: residual(v[:n], v[n:], p))(torch.cat([x, multipliers]))
    right = torch.func.jacrev(lambda q: residual(x, multipliers, q))(p)
    try:
        solved: Tensor = torch.linalg.solve(A, -right.reshape(len(A), -1))
    except RuntimeError as error:
        raise ValueError("the KKT matrix is singular: the solution has no derivative.") from error
    return solved.reshape(right.shape)


def _lagrangian(task: Constrained, multipliers: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: task.objective(x) + task.constraints(x) @ multipliers


def _derivatives(task: Constrained, x: Tensor, multipliers: Tensor) -> _Point:
    lagrangian = _lagrangian(task, multipliers)
    return _Point(
        task.constraints(x),
        torch.func.grad(lagrangian)(x),
        torch.func.jacrev(task.constraints)(x),
        torch.func.hessian(lagrangian)(x),
    )


def _psi(B: Tensor, smallest: float, floor: float) -> float:
    return 20 * max(float(B.norm()) ** 2, 1.0) / (min(smallest, 1.0) * min(floor, 1.0))
