"""Linear solvers on systems whose solution, spectrum or failure is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hypergrad.linear.solution import _run as run
from hypergrad import CG, Direct, Identity, LinearSolver, Neumann, Status


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

    @settings(max_examples=25, deadline=None)
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
        a = matrix([0.1, 1.0, 30.0])
        [(step, used)] = run([Neumann(power_iterations=30)._step(vector(3))], lambda v: a @ v, True)
        assert 0.5 / 30 < step < 2 / 30
        assert used < 30


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
        (lambda: Direct(chunk=0), "chunk must be at least 1, but got 0"),
        (lambda: Identity(scale=0.0), "scale must be positive and finite, but got 0.0"),
    ],
)
def test_bad_settings(make: Callable[[], LinearSolver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
