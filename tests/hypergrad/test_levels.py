"""More than two levels: nested solvers against closed forms, and derivatives of every order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import CG, GGN, Direct, Hyper, Implicit, Solver, Unrolled

G = torch.Generator().manual_seed(0)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def _spd(n: int, low: float, high: float) -> Tensor:
    q, _ = torch.linalg.qr(_normal(n, n))
    return q @ torch.diag(torch.linspace(low, high, n).double()) @ q.T


A, C = _spd(3, 1, 1.5), _spd(3, 1, 1.5)
B, OFFSET, T1, T2, T3 = 0.3 * _normal(3, 2), _normal(3), _normal(3), _normal(3), _normal(2)
LOG_DECAY = 0.1 * _normal(2)


def bottom(w: Tensor, batch: Any, u: Tensor) -> Tensor:
    """w*(u) = A⁻¹(Bu + b)."""
    return 0.5 * w @ A @ w - (B @ u + OFFSET) @ w


def middle(w: Tensor, u: Tensor, a: Tensor) -> Tensor:
    return 0.5 * (w - T1) @ C @ (w - T1) + 0.5 * (a.exp() * u.square()).sum()


def top(w: Tensor, u: Tensor) -> Tensor:
    return (w - T2).square().sum() + (u - T3).square().sum()


def closed_form(a: Tensor) -> Tensor:
    """F(w*(u*(a)), u*(a)), with u*(a) = (MᵀCM + diag eᵃ)⁻¹ MᵀC(t − A⁻¹b) and M = A⁻¹B."""
    m, shift = torch.linalg.solve(A, B), torch.linalg.solve(A, OFFSET)
    u = torch.linalg.solve(m.T @ C @ m + torch.diag(a.exp()), m.T @ C @ (T1 - shift))
    return top(m @ u + shift, u)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64, requires_grad=True)


UNROLLED = {"method": Unrolled(steps=15)}
REPLAYED = {"method": Unrolled(steps=15, memory="replay")}
IMPLICIT = {"method": Implicit(CG(rtol=1e-13)), "steps": 200, "grad_norm": 1e-12}
DENSE = {"method": Implicit(Direct(chunk=1)), "steps": 200, "grad_norm": 1e-12}
PAIRS = {
    "unrolled in unrolled": (UNROLLED, UNROLLED),
    "unrolled in replayed": (UNROLLED, REPLAYED),
    "implicit in implicit": (IMPLICIT, IMPLICIT),
    "dense in dense": (DENSE, DENSE),
    "dense in unrolled": (DENSE, UNROLLED),
    "unrolled in implicit": (UNROLLED, IMPLICIT),
    "implicit in unrolled": (IMPLICIT, UNROLLED),
}


def three_levels(low: dict[str, Any], high: dict[str, Any], a: Tensor) -> Tensor:
    solve_w = Solver(zeros(3), bottom, torch.optim.SGD, lr=0.8, **low)

    def middle_loss(u: Tensor, batch: Any, a: Tensor) -> Tensor:
        return middle(solve_w(None, u), u, a)

    solve_u = Solver(zeros(2), middle_loss, torch.optim.SGD, lr=0.8, **high)
    u = solve_u(None, a)
    return top(solve_w(None, u), u)


@pytest.mark.parametrize("pair", PAIRS)
def test_three_levels_have_the_closed_form(pair: str) -> None:
    a = LOG_DECAY.clone().requires_grad_()
    expected = torch.autograd.grad(closed_form(a), a)[0]
    value = three_levels(*PAIRS[pair], a)
    value.backward()
    assert abs(value - closed_form(a)) < 1e-8
    torch.testing.assert_close(a.grad, expected, rtol=1e-8, atol=1e-8)


X = _normal(6, 3)


def log_cosh(w: Tensor, batch: Tensor, h: Any) -> Tensor:
    h = h["h"] if isinstance(h, dict) else h
    return (batch @ w).cosh().log().mean() + (h.exp() * w.square()).sum() - h @ w


METHODS = {
    "graph": Unrolled(steps=4),
    "replay": Unrolled(steps=4, memory="replay"),
    "segments": Unrolled(steps=4, memory="segments"),
}


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_of_an_unrolled_solution(method: str) -> None:
    """The solution is a function of (w₀, h) like any other for torch's own checks."""
    w0, h = _normal(3).requires_grad_(), _normal(3).requires_grad_()

    def fitted(w0: Tensor, h: Tensor) -> Tensor:
        rule = {"lr": 0.3, "momentum": 0.3}
        return Solver(w0, log_cosh, torch.optim.SGD, method=METHODS[method], **rule)(X, h)

    assert torch.autograd.gradcheck(fitted, (w0, h))
    assert torch.autograd.gradgradcheck(fitted, (w0, h))


@pytest.mark.parametrize("rule", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_derivatives_in_the_numbers_of_an_optimizer(rule: type[torch.optim.Optimizer]) -> None:
    w0 = _normal(3).requires_grad_()
    h, lr, decay = _normal(3), torch.tensor(0.1).double(), torch.tensor([0.1, 0.2, 0.3]).double()
    inputs = [t.requires_grad_() for t in (w0, h, lr, decay)]

    def fitted(w0: Tensor, h: Tensor, lr: Tensor, decay: Tensor) -> Tensor:
        options = {"lr": Hyper("lr"), "weight_decay": Hyper("decay"), "eps": 1e-2}
        solve = Solver(w0, log_cosh, rule, method=Unrolled(steps=3), **options)
        return solve(X, {"h": h, "lr": lr, "decay": decay})

    assert torch.autograd.gradcheck(fitted, inputs)
    assert torch.autograd.gradgradcheck(fitted, inputs)


@pytest.mark.parametrize("solver", [CG(rtol=1e-13), Direct(chunk=1)], ids=["CG", "Direct"])
def test_derivatives_of_an_implicit_solution(solver: Any) -> None:
    h = _normal(3).requires_grad_()
    method = Implicit(solver, warm_start=False)
    rule = {"lr": 0.3, "momentum": 0.3, "steps": 500, "grad_norm": 1e-12}
    solve = Solver(zeros(3), log_cosh, torch.optim.SGD, method=method, **rule)
    assert torch.autograd.gradcheck(lambda h: solve(X, h), h)
    assert torch.autograd.gradgradcheck(lambda h: solve(X, h), h)
    third = torch.autograd.functional.hessian(
        lambda h: torch.autograd.grad(solve(X, h).prod(), h, create_graph=True)[0].prod(), h
    )
    torch.testing.assert_close(third, third.T)


def test_truncation_counts_earlier_steps_as_the_identity_in_every_order() -> None:
    """A derivative taken with create_graph is the one taken without."""
    w0, h = _normal(3).requires_grad_(), _normal(3).requires_grad_()
    solve = Solver(w0, log_cosh, torch.optim.SGD, lr=0.3, method=Unrolled(steps=5, truncation=2))
    plain = torch.autograd.grad(solve(X, h).prod(), (w0, h))
    graph = torch.autograd.grad(solve(X, h).prod(), (w0, h), create_graph=True)
    w3 = Solver(w0, log_cosh, torch.optim.SGD, lr=0.3, method=Unrolled(steps=3))(X, h)
    w3 = w3.detach().requires_grad_()
    last = Solver(w3, log_cosh, torch.optim.SGD, lr=0.3, method=Unrolled(steps=2))
    expected = torch.autograd.grad(last(X, h).prod(), (w3, h))
    for found in (plain, graph):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_dropout_masks_are_those_of_the_forward_pass_in_every_order() -> None:
    def loss(w: Tensor, batch: Tensor, h: Tensor) -> Tensor:
        return log_cosh(w, torch.dropout(batch, 0.5, True), h)

    w0, h = _normal(3).requires_grad_(), _normal(3).requires_grad_()
    for method, training in ((Unrolled(steps=3), {}), (Implicit(CG(rtol=1e-12)), {"steps": 3})):
        solve = Solver(w0, loss, torch.optim.SGD, lr=0.1, method=method, **training)
        found = []
        for create_graph in (False, True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                w = solve(X, h)
                before = torch.get_rng_state()
                found += torch.autograd.grad(w.prod(), h, create_graph=create_graph)
                assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_a_derivative_of_a_gauss_newton_hypergradient_is_refused() -> None:
    def outputs(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        return batch @ w

    def criterion(z: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        return z.square().mean()

    def loss(w: Tensor, batch: Tensor, h: Tensor) -> Tensor:
        return (batch @ w).square().mean() + h @ w

    def penalty(w: Tensor, h: Tensor, batch: Tensor) -> Tensor:
        return h @ w

    method = Implicit(operator=GGN(outputs, criterion, penalty))
    solve = Solver(zeros(3), loss, torch.optim.SGD, lr=0.1, method=method, steps=10)
    h = _normal(3).requires_grad_()
    w = solve(X, h)
    with pytest.raises(ValueError, match=r"needs operator=Hessian\(\), but got GGN"):
        torch.autograd.grad(w.sum(), h, create_graph=True)
