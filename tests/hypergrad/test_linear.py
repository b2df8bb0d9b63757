"""Linear solvers on systems whose solution, spectrum or failure is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad import CG, GMRES, MINRES, Direct, Identity, LinearSolver, Neumann, Nystrom, Status


def matrix(eigenvalues: list[float], seed: int = 0) -> Tensor:
    """A symmetric matrix with given eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    d = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T


def counted(a: Tensor) -> tuple[Callable[[Tensor], Tensor], list[int]]:
    """The product with `a`, and a counter of its uses."""
    count = [0]

    def product(v: Tensor) -> Tensor:
        count[0] += 1
        return a @ v

    return product, count


def vector(d: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d, generator=generator, dtype=torch.float64)


SOLVERS: list[LinearSolver] = [
    CG(rtol=1e-12),
    CG(rtol=1e-12, preconditioner=Nystrom(rank=3, chunk=1)),
    MINRES(rtol=1e-12),
    GMRES(rtol=1e-12),
    Neumann(terms=4000, rtol=1e-12),
    Neumann(terms=4000, step=0.1, rtol=1e-12),
    Direct(chunk=1),  # one by one, so that the products can be counted
]


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
class TestEverySolver:
    @settings(max_examples=15, deadline=None)
    @given(
        eigenvalues=st.lists(st.floats(0.2, 10), min_size=1, max_size=8),
        seed=st.integers(0, 1000),
    )
    def test_solves_and_counts(
        self, solver: LinearSolver, eigenvalues: list[float], seed: int
    ) -> None:
        a, b = matrix(eigenvalues, seed), vector(len(eigenvalues), seed + 1)
        product, count = counted(a)
        found = solver.solve(product, b)
        assert torch.allclose(found.x, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-10)
        assert found.status in (Status.CONVERGED, Status.EXACT)
        assert found.n_matvec == count[0]
        assert found.residual == pytest.approx(
            float((a @ found.x - b).norm() / b.norm()), abs=1e-12
        )

    def test_an_eigenvalue_that_the_right_hand_side_hides(self, solver: LinearSolver) -> None:
        """b is orthogonal to the largest eigenvector up to 1e-6, or up to rounding."""
        a = torch.diag(torch.tensor([0.3, 0.3, 10.0], dtype=torch.float64))
        for hidden in (1e-6, 1e-14):
            b = torch.tensor([1.0, 2.0, hidden], dtype=torch.float64)
            found = solver.solve(lambda v: a @ v, b)
            assert found.status.ok
            assert torch.allclose(a @ found.x, b, atol=1e-9)

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_any_size_of_the_right_hand_side(self, solver: LinearSolver, scale: float) -> None:
        """Squared in float32, either leaves its range."""
        a, b = matrix([1.0, 5.0, 7.0]).float(), vector(3).float()
        found = replace(solver, **({"rtol": 1e-4} if hasattr(solver, "rtol") else {})).solve(
            lambda v: a @ v, scale * b, 0.9 * scale * torch.linalg.solve(a, b)
        )
        assert found.status.ok
        assert torch.allclose(found.x / scale, torch.linalg.solve(a, b), rtol=1e-3)

    def test_zero_right_hand_side(self, solver: LinearSolver) -> None:
        product, count = counted(matrix([1.0, 2.0]))
        found = solver.solve(product, torch.zeros(2, dtype=torch.float64))
        assert found.x.tolist() == [0.0, 0.0]
        assert (found.residual, found.status, count[0]) == (0.0, Status.CONVERGED, 0)

    def test_singular_is_reported(self, solver: LinearSolver) -> None:
        a = matrix([0.0, 1.0, 3.0])
        found = solver.solve(lambda v: a @ v, vector(3))
        assert not found.status.ok
        assert found.residual is not None
        assert found.residual > 1e-3

    @settings(max_examples=10, deadline=None)
    @given(seed=st.integers(0, 1000), nullity=st.integers(1, 2), rank=st.integers(1, 6))
    def test_singular_never_explodes_nor_lies(
        self, solver: LinearSolver, seed: int, nullity: int, rank: int
    ) -> None:
        """Rounding makes a zero eigenvalue 1e-17: inverted, it gives an x of size 1e16."""
        a = matrix([0.0] * nullity + [1.0 + 2 * k for k in range(rank)], seed)
        b = vector(nullity + rank, seed + 1)
        found = solver.solve(lambda v: a @ v, b)
        assert not found.status.ok
        assert float(found.x.norm()) < 1e5
        assert found.residual == pytest.approx(float((a @ found.x - b).norm() / b.norm()))


class TestCG:
    def test_ends_in_as_many_steps_as_distinct_eigenvalues(self) -> None:
        a = matrix([1.0, 1.0, 1.0, 4.0, 4.0, 9.0])
        found = CG(rtol=1e-10).solve(lambda v: a @ v, vector(6))
        assert found.n_matvec == 3 + 1  # and the check of the final residual

    def test_direction_uses_the_new_residual(self) -> None:
        """With β from the old residual the iterates are wrong from the second one on."""
        a, b = matrix([1.0, 2.0, 5.0, 9.0]), vector(4)
        krylov = torch.stack([b, a @ b], 1)
        best = krylov @ torch.linalg.solve(krylov.T @ a @ krylov, krylov.T @ b)
        found = CG(rtol=0.0, max_iter=2).solve(lambda v: a @ v, b)
        assert torch.allclose(found.x, best, rtol=1e-12)
        assert found.status is Status.MAX_ITER

    def test_indefinite_stops_with_the_best_iterate(self) -> None:
        a, b = matrix([-1.0, 2.0, 3.0]), vector(3)
        found = CG().solve(lambda v: a @ v, b)
        assert found.status is Status.NEGATIVE_CURVATURE
        assert found.residual is not None
        assert found.residual == pytest.approx(float((a @ found.x - b).norm() / b.norm()))
        assert found.residual <= 1.0

    def test_damping_is_added_to_the_diagonal(self) -> None:
        a, b = matrix([-0.5, 2.0]), vector(2)
        found = CG(rtol=1e-12, damping=1.0).solve(lambda v: a @ v, b)
        exact = torch.linalg.solve(a + torch.eye(2, dtype=a.dtype), b)
        assert torch.allclose(found.x, exact, rtol=1e-10)

    def test_warm_start_at_the_solution_needs_one_product(self) -> None:
        a, b = matrix([1.0, 5.0, 7.0]), vector(3)
        found = CG(rtol=1e-8).solve(lambda v: a @ v, b, torch.linalg.solve(a, b))
        assert (found.n_matvec, found.status) == (1, Status.CONVERGED)

    def test_warm_start_worse_than_zero_is_not_used(self) -> None:
        a, b = matrix([1.0, 5.0, 7.0]), vector(3)
        bad = CG(rtol=0.0, max_iter=2).solve(lambda v: a @ v, b, 1e6 * b)
        cold = CG(rtol=0.0, max_iter=2).solve(lambda v: a @ v, b)
        assert torch.equal(bad.x, cold.x)

    @pytest.mark.parametrize("rtol", [0.0, 1e-9])
    @pytest.mark.parametrize("max_iter", [60, 500])
    def test_unreachable_tolerance_in_float32_is_not_claimed(
        self, rtol: float, max_iter: int
    ) -> None:
        """The recursive residual goes on to 1e-24; the true one stays near 1e-6."""
        a = matrix([10.0 ** (-k / 10) for k in range(40)]).float()
        b = vector(40).float()
        found = CG(rtol=rtol, max_iter=max_iter).solve(lambda v: a @ v, b)
        true = float((a.double() @ found.x.double() - b.double()).norm() / b.double().norm())
        assert found.status in (Status.STALLED, Status.MAX_ITER)
        assert found.residual == pytest.approx(true, rel=0.3)

    def test_product_that_is_not_finite(self) -> None:
        with pytest.raises(FloatingPointError, match="curvature"):
            CG().solve(lambda v: v * torch.nan, vector(3))

    def test_tolerance_is_met_by_the_true_residual(self) -> None:
        a = matrix([10.0 ** (-k / 2) for k in range(12)])
        b = vector(12)
        found = CG(rtol=1e-7, max_iter=400).solve(lambda v: a @ v, b)
        assert found.status is Status.CONVERGED
        assert float((a @ found.x - b).norm()) <= 1e-7 * float(b.norm())

    def test_absolute_tolerance_is_in_the_units_of_the_system(self) -> None:
        a, b = matrix([1.0 + k for k in range(20)]), 1e3 * vector(20)
        found = CG(rtol=0.0, atol=1.0).solve(lambda v: a @ v, b)
        error = float((a @ found.x - b).norm())
        assert found.status is Status.CONVERGED
        assert 1e-3 < error <= 1.0

    def test_agrees_with_scipy(self) -> None:
        """The same iterates: six steps of both."""
        a, b = matrix([1.0 + 3 * k for k in range(30)]), vector(30)
        found = CG(rtol=0.0, max_iter=6).solve(lambda v: a @ v, b)
        theirs, _ = scipy.sparse.linalg.cg(a.numpy(), b.numpy(), rtol=0.0, maxiter=6)
        assert np.allclose(found.x.numpy(), theirs, rtol=1e-10)

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 1000), skew=st.floats(0.1, 5), d=st.integers(2, 8))
    def test_map_without_symmetry_is_detected(self, seed: int, skew: float, d: int) -> None:
        a = matrix([1.0 + k for k in range(d)], seed)
        root = vector(d * d, seed + 2).view(d, d)
        a = a + skew * (root - root.T) / root.norm()
        found = CG().solve(lambda v: a @ v, vector(d, seed + 1))
        assert found.status is Status.NOT_SYMMETRIC
        assert "GMRES" in str(found.status)
        assert found.residual <= 1.0

    def test_rotation_is_not_taken_for_a_singular_map(self) -> None:
        """vᵀAv = 0 for every v."""
        a = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        assert CG().solve(lambda v: a @ v, vector(2)).status is Status.NOT_SYMMETRIC

    def test_products_in_few_digits_are_not_taken_for_asymmetry(self) -> None:
        a, b = matrix([1.0 + k for k in range(20)]).bfloat16(), vector(20).float()
        found = CG(max_iter=10).solve(lambda v: (a @ v.bfloat16()).float(), b)
        assert found.status is not Status.NOT_SYMMETRIC
        assert found.residual < 0.05


class TestNystrom:
    def test_few_large_eigenvalues_cost_no_iterations(self) -> None:
        a = matrix([1000.0 / (k + 1) for k in range(8)] + [1.0 + 0.01 * k for k in range(40)])
        plain = CG(rtol=1e-8, max_iter=500).solve(lambda v: a @ v, vector(48))
        helped = CG(rtol=1e-8, preconditioner=Nystrom(rank=12)).solve(lambda v: a @ v, vector(48))
        assert helped.status is plain.status is Status.CONVERGED
        assert helped.n_matvec - 12 <= 0.6 * plain.n_matvec
        assert torch.allclose(helped.x, torch.linalg.solve(a, vector(48)), rtol=1e-6)

    def test_full_rank_is_the_inverse(self) -> None:
        a, b = matrix([0.5, 1.0, 2.0, 7.0]), vector(4)
        found = CG(rtol=1e-8, max_iter=2, preconditioner=Nystrom(rank=9)).solve(lambda v: a @ v, b)
        assert found.n_matvec == 4 + 1 + 1  # the sketch, one step, its check
        assert found.status is Status.CONVERGED

    def test_is_the_nystrom_approximation(self) -> None:
        """U Λ Uᵀ = A Ω (Ωᵀ A Ω)⁻¹ (A Ω)ᵀ with the Ω of its seed."""
        a = matrix([float(k + 1) for k in range(10)])
        memory = (
            CG(preconditioner=Nystrom(rank=4, seed=5)).solve(lambda v: a @ v, vector(10)).memory
        )
        draw = torch.randn(10, 4, generator=torch.Generator().manual_seed(5), dtype=a.dtype)
        y = a @ draw
        exact = y @ torch.linalg.solve(draw.T @ y, y.T)
        u, values = memory["vectors"], memory["values"]
        assert torch.allclose(u @ torch.diag(values) @ u.T, exact, atol=1e-8)

    def test_kept_for_nearby_systems_then_made_anew(self) -> None:
        a = matrix([100.0, 50.0, 20.0] + [1.0 + 0.1 * k for k in range(20)])
        solver, memory, products = CG(preconditioner=Nystrom(rank=5, every=2)), None, []
        for k in range(4):
            shifted = a + 0.01 * k * torch.eye(23, dtype=a.dtype)
            found = solver.solve(lambda v, m=shifted: m @ v, vector(23, k), memory=memory)
            memory = found.memory
            products.append(found.n_matvec)
        assert found.status is Status.CONVERGED
        assert (memory["sketch"], memory["uses"]) == (2, 2)
        assert products[0] >= products[1] + 4
        assert products[2] >= products[3] + 4

    def test_seed_decides(self) -> None:
        a = matrix([float(k + 1) for k in range(10)])

        def vectors(seed: int) -> Tensor:
            solver = CG(preconditioner=Nystrom(rank=3, seed=seed))
            return solver.solve(lambda v: a @ v, vector(10)).memory["vectors"]

        assert torch.equal(vectors(0), vectors(0))
        assert not torch.allclose(vectors(0), vectors(1))

    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 1000), low=st.floats(-2, 0))
    def test_indefinite_matrix_has_a_definite_preconditioner(self, seed: int, low: float) -> None:
        a = matrix([low, 0.1, 1.0, 5.0, 9.0], seed)
        solver = CG(preconditioner=Nystrom(rank=4))
        memory = solver.solve(lambda v: a @ v, vector(5, seed)).memory
        inverse = Nystrom.inverse(memory, 0.0)
        dense = torch.stack([inverse(e) for e in torch.eye(5, dtype=a.dtype)])
        assert float(torch.linalg.eigvalsh(dense).min()) > 0

    def test_memory_of_another_system_is_refused(self) -> None:
        solver, a = CG(preconditioner=Nystrom(rank=2)), matrix([1.0, 2.0, 3.0])
        memory = solver.solve(lambda v: a @ v, vector(3)).memory
        with pytest.raises(ValueError, match="another system than this one of 4 unknowns"):
            solver.solve(lambda v: v, vector(4), memory=memory)


class TestMINRES:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 1000), low=st.floats(-5, -0.2), d=st.integers(2, 8))
    def test_solves_indefinite_systems(self, seed: int, low: float, d: int) -> None:
        a = matrix([low] + [1.0 + k for k in range(d - 1)], seed)
        b = vector(d, seed + 1)
        found = MINRES(rtol=1e-11).solve(lambda v: a @ v, b)
        assert found.status is Status.CONVERGED
        assert torch.allclose(found.x, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-9)

    def test_agrees_with_scipy(self) -> None:
        a, b = matrix([k - 7.3 for k in range(30)]), vector(30)
        found = MINRES(rtol=0.0, max_iter=8).solve(lambda v: a @ v, b)
        theirs, _ = scipy.sparse.linalg.minres(a.numpy(), b.numpy(), rtol=0.0, maxiter=8)
        assert np.allclose(found.x.numpy(), theirs, rtol=1e-8)
        assert found.status is Status.MAX_ITER

    def test_residual_is_the_smallest_of_the_krylov_space(self) -> None:
        a, b = matrix([-3.0, -1.0, 2.0, 5.0, 6.0]), vector(5)
        krylov = torch.stack([b, a @ b, a @ a @ b], 1)
        best = torch.linalg.lstsq(a @ krylov, b[:, None]).solution
        found = MINRES(rtol=0.0, max_iter=3).solve(lambda v: a @ v, b)
        assert torch.allclose(found.x, (krylov @ best)[:, 0], rtol=1e-9)

    def test_singular_gives_a_least_squares_solution(self) -> None:
        a, b = matrix([0.0, -1.0, 3.0]), vector(3)
        found = MINRES(rtol=1e-12).solve(lambda v: a @ v, b)
        assert found.status is Status.BREAKDOWN
        least = float((a @ (torch.linalg.pinv(a, rtol=1e-12) @ b) - b).norm() / b.norm())
        assert found.residual == pytest.approx(least, rel=1e-8)

    def test_singular_but_consistent_converges(self) -> None:
        a = matrix([0.0, 1.0, 3.0])
        found = MINRES(rtol=1e-10).solve(lambda v: a @ v, a @ vector(3))
        assert found.status is Status.CONVERGED

    def test_damping_and_warm_start(self) -> None:
        a, b = matrix([-0.5, 2.0, 4.0]), vector(3)
        exact = torch.linalg.solve(a + torch.eye(3, dtype=a.dtype), b)
        assert torch.allclose(MINRES(damping=1.0).solve(lambda v: a @ v, b).x, exact, rtol=1e-5)
        found = MINRES(damping=1.0).solve(lambda v: a @ v, b, exact)
        assert (found.n_matvec, found.status) == (1, Status.CONVERGED)

    def test_map_without_symmetry_is_detected(self) -> None:
        a = torch.tensor([[2.0, 1.0, 0.0], [-1.0, 3.0, 1.0], [0.0, 0.0, 1.0]]).double()
        assert MINRES().solve(lambda v: a @ v, vector(3)).status is Status.NOT_SYMMETRIC

    def test_unreachable_tolerance_in_float32_is_not_claimed(self) -> None:
        a = matrix([(-1) ** k * 10.0 ** (-k / 10) for k in range(40)]).float()
        b = vector(40).float()
        found = MINRES(rtol=1e-9, max_iter=500).solve(lambda v: a @ v, b)
        true = float((a.double() @ found.x.double() - b.double()).norm() / b.double().norm())
        assert not found.status.ok
        assert found.residual == pytest.approx(true, rel=0.3)


def momentum_map(h: Tensor, lr: float, beta: float) -> Tensor:
    """I − ∂T/∂(w, v) of the heavy-ball step T(w, v) = (w − lr v', v'), v' = βv + Hw."""
    one = torch.eye(len(h), dtype=h.dtype)
    step = torch.cat(
        [torch.cat([one - lr * h, -lr * beta * one], 1), torch.cat([h, beta * one], 1)]
    )
    return torch.eye(2 * len(h), dtype=h.dtype) - step


class TestGMRES:
    @settings(max_examples=25, deadline=None)
    @given(seed=st.integers(0, 1000), d=st.integers(1, 8))
    def test_solves_systems_without_symmetry(self, seed: int, d: int) -> None:
        a = vector(d * d, seed).view(d, d) + 3 * torch.eye(d, dtype=torch.float64)
        b = vector(d, seed + 1)
        found = GMRES(rtol=1e-11).solve(lambda v: a @ v, b)
        assert found.status is Status.CONVERGED
        assert torch.allclose(found.x, torch.linalg.solve(a, b), rtol=1e-6, atol=1e-7)

    def test_agrees_with_scipy(self) -> None:
        a, b = vector(900).view(30, 30) + 8 * torch.eye(30, dtype=torch.float64), vector(30)
        found = GMRES(rtol=0.0, max_iter=12, restart=6).solve(lambda v: a @ v, b)
        theirs, _ = scipy.sparse.linalg.gmres(a.numpy(), b.numpy(), rtol=0.0, restart=6, maxiter=2)
        assert np.allclose(found.x.numpy(), theirs, rtol=1e-9)
        assert (found.status, found.n_matvec) == (Status.MAX_ITER, 12 + 2)

    def test_momentum_map(self) -> None:
        """Where CG goes wrong by a factor (and says that it cannot), GMRES is exact."""
        a, b = momentum_map(matrix([0.5, 1.0, 4.0]), 0.2, 0.9), vector(6)
        assert CG().solve(lambda v: a @ v, b).status is Status.NOT_SYMMETRIC
        found = GMRES(rtol=1e-12).solve(lambda v: a @ v, b)
        assert torch.allclose(found.x, torch.linalg.solve(a, b), rtol=1e-9)

    def test_stagnation_is_reported(self) -> None:
        """On a cyclic shift no Krylov space smaller than all of it reduces the residual."""
        shift = torch.eye(6, dtype=torch.float64).roll(1, 0)
        b = torch.eye(6, dtype=torch.float64)[0]
        stuck = GMRES(restart=5).solve(lambda v: shift @ v, b)
        assert (stuck.status, stuck.residual) == (Status.STALLED, 1.0)
        whole = GMRES(restart=6).solve(lambda v: shift @ v, b)
        assert whole.status is Status.CONVERGED
        assert torch.allclose(whole.x, shift.T @ b)

    def test_singular_without_symmetry(self) -> None:
        a = torch.tensor([[1.0, 3.0], [2.0, 6.0]]).double()
        found = GMRES().solve(lambda v: a @ v, vector(2))
        least = float((a @ (torch.linalg.pinv(a) @ vector(2)) - vector(2)).norm())
        assert found.status is Status.BREAKDOWN
        assert found.residual == pytest.approx(least / float(vector(2).norm()))
        assert float(found.x.norm()) < 10

    def test_float32_residual_is_the_true_one(self) -> None:
        a = matrix([10.0 ** (-k / 10) for k in range(40)]).float()
        a[0, 1] += 0.5
        b = vector(40).float()
        found = GMRES(rtol=1e-9, max_iter=400).solve(lambda v: a @ v, b)
        true = float((a.double() @ found.x.double() - b.double()).norm() / b.double().norm())
        assert not found.status.ok
        assert found.residual == pytest.approx(true, rel=0.6)


class TestNeumann:
    def test_is_the_truncated_series(self) -> None:
        a, b, step = matrix([0.5, 1.0, 3.0]), vector(3), 0.2
        rest = torch.eye(3, dtype=a.dtype) - step * a
        series = step * sum(torch.linalg.matrix_power(rest, i) @ b for i in range(7))
        found = Neumann(terms=7, step=step).solve(lambda v: a @ v, b)
        assert torch.allclose(found.x, series, rtol=1e-12)
        assert (found.n_matvec, found.status) == (7, Status.MAX_ITER)

    def test_too_large_a_step_diverges_and_says_so(self) -> None:
        a, b = matrix([1.0, 10.0]), vector(2)
        found = Neumann(terms=30, step=0.5).solve(lambda v: a @ v, b)
        assert found.status is Status.DIVERGED
        assert found.residual is not None
        assert found.residual <= 1.0

    def test_float32_residual_is_the_true_one(self) -> None:
        """The series of residuals goes to zero; b − Ax does not."""
        a, b = matrix([1e-2, 1.0, 10.0]).float(), vector(3).float()
        found = Neumann(terms=20_000, rtol=1e-9).solve(lambda v: a @ v, b)
        true = float((a.double() @ found.x.double() - b.double()).norm() / b.double().norm())
        assert found.status is Status.MAX_ITER
        assert found.residual == pytest.approx(true, rel=0.5)

    def test_automatic_step_is_safe(self) -> None:
        """The first iterate is η b, after the power iterations."""
        a, b = matrix([0.1, 1.0, 30.0]), vector(3)
        found = Neumann(terms=1, power_iterations=30).solve(lambda v: a @ v, b)
        step = float(torch.dot(found.x, b) / torch.dot(b, b))
        assert 0.5 / 30 < step < 2 / 30
        assert found.n_matvec < 31


class TestDirect:
    def test_refuses_large_problems(self) -> None:
        with pytest.raises(ValueError, match="max_dim=2"):
            Direct(max_dim=2).solve(lambda v: v, vector(3))

    def test_indefinite_is_solved_and_reported(self) -> None:
        a, b = matrix([-1.0, 2.0]), vector(2)
        found = Direct().solve(lambda v: a @ v, b)
        assert torch.allclose(found.x, torch.linalg.solve(a, b))
        assert found.status is Status.NEGATIVE_CURVATURE

    def test_products_together_are_the_products_one_by_one(self) -> None:
        a, b = matrix([1.0, 2.0, 5.0, 6.0, 9.0]), vector(5)
        together = Direct(chunk=2).solve(lambda v: a @ v, b)
        assert torch.allclose(together.x, Direct(chunk=1).solve(lambda v: a @ v, b).x, rtol=1e-14)
        assert together.n_matvec == 5

    def test_a_matrix_without_symmetry_is_not_symmetrized(self) -> None:
        a, b = torch.tensor([[2.0, 3.0], [0.0, 4.0]]).double(), vector(2)
        found = Direct().solve(lambda v: a @ v, b)
        assert torch.allclose(found.x, torch.linalg.solve(a, b), rtol=1e-12)
        assert found.status is Status.EXACT

    def test_singular_without_symmetry(self) -> None:
        a, b = torch.tensor([[1.0, 3.0], [2.0, 6.0]]).double(), vector(2)
        found = Direct().solve(lambda v: a @ v, b)
        assert torch.allclose(found.x, torch.linalg.pinv(a) @ b, rtol=1e-10)
        assert found.status is Status.BREAKDOWN


MANY: list[LinearSolver] = [
    CG(rtol=1e-11),
    CG(rtol=1e-11, preconditioner=Nystrom(rank=3)),
    MINRES(rtol=1e-11),
    GMRES(rtol=1e-11),
    Neumann(terms=3000, rtol=1e-11),
    Direct(),
]


@pytest.mark.parametrize("solver", MANY, ids=repr)
class TestSeveralRightHandSides:
    A = matrix([1.0, 2.0, 3.0, 5.0, 8.0])

    def test_each_is_solved_as_alone(self, solver: LinearSolver) -> None:
        b = [vector(5, k) for k in range(3)]
        found = solver.solve_many(lambda v: self.A @ v, b)
        for one, rhs in zip(found, b, strict=True):
            assert torch.allclose(one.x, torch.linalg.solve(self.A, rhs), rtol=1e-8)
            assert one.status.ok
        assert torch.allclose(found[1].x, solver.solve(lambda v: self.A @ v, b[1]).x, rtol=1e-7)

    def test_products_are_shared_and_counted(self, solver: LinearSolver) -> None:
        """One call of the map for a round of all systems, and vectorize=False gives the same."""
        product, count = counted(self.A)
        b = [vector(5, k) for k in range(3)]
        together = solver.solve_many(product, b)
        calls = count[0]
        assert calls < sum(found.n_matvec for found in together) or isinstance(solver, Direct)
        product, count = counted(self.A)
        apart = solver.solve_many(product, b, vectorize=False)
        assert count[0] == sum(found.n_matvec for found in apart) > calls
        for one, other in zip(together, apart, strict=True):
            assert torch.allclose(one.x, other.x, rtol=1e-8)
            assert one.status is other.status

    def test_zero_and_solved_systems_among_them(self, solver: LinearSolver) -> None:
        b = [torch.zeros(5, dtype=torch.float64), vector(5), vector(5, 3)]
        exact = torch.linalg.solve(self.A, b[1])
        found = solver.solve_many(lambda v: self.A @ v, b, [None, exact, None])
        assert found[0].x.tolist() == [0.0] * 5
        assert all(one.status.ok for one in found)
        assert torch.allclose(found[1].x, exact, rtol=1e-8)

    def test_one_bad_system_does_not_hide(self, solver: LinearSolver) -> None:
        a = matrix([0.0, 1.0, 3.0])
        found = solver.solve_many(lambda v: a @ v, [a @ a @ vector(3), vector(3)])
        assert not found[1].status.ok
        if not isinstance(solver, Direct | Neumann):
            assert found[0].status.ok

    def test_lengths_must_agree(self, solver: LinearSolver) -> None:
        with pytest.raises(ValueError, match=r"one length, but got \[3, 4\]"):
            solver.solve_many(lambda v: v, [vector(3), vector(4)])
        with pytest.raises(ValueError, match="x0 has 1 vectors, but b has 2"):
            solver.solve_many(lambda v: v, [vector(3), vector(3)], [None])


def test_identity_makes_no_product() -> None:
    product, count = counted(matrix([1.0, 2.0]))
    found = Identity(scale=0.5).solve(product, vector(2))
    assert torch.equal(found.x, 0.5 * vector(2))
    assert (count[0], found.residual, found.status) == (0, None, Status.APPROXIMATE)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CG(rtol=-1.0), "rtol must be finite and not negative, but got -1.0"),
        (lambda: CG(max_iter=0), "max_iter"),
        (lambda: CG(damping=-0.1), "damping must be finite and not negative, but got -0.1"),
        (lambda: Neumann(terms=0), "at least 1, but got 0"),
        (lambda: Neumann(step=-1.0), "step must be positive or 'auto', but got -1.0"),
        (lambda: Neumann(power_iterations=0), "power_iterations"),
        (lambda: GMRES(restart=0), "restart must be at least 1, but got 0"),
        (lambda: MINRES(atol=-1.0), "atol must be finite and not negative"),
        (lambda: MINRES(damping=float("inf")), "damping must be finite, but got inf"),
        (lambda: CG(preconditioner=Nystrom(rank=0)), "rank must be at least 1, but got 0"),
        (lambda: CG(preconditioner=Nystrom(every=0)), "every must be at least 1, but got 0"),
        (lambda: Direct(chunk=0), "chunk must be at least 1, but got 0"),
        (lambda: Identity(scale=0.0), "scale must be positive and finite, but got 0.0"),
    ],
)
def test_bad_settings(make: Callable[[], LinearSolver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
