"""Compiled estimators against eager ones, by interpreted graphs: what inductor is given.

Tests of inductor's own work, which takes seconds for each graph, are in `test_compile_inductor`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import optree
import pytest
import torch
from torch import Tensor, fx, nn

from hypergrad import (
    CG,
    GGN,
    SGD,
    Adam,
    AdamW,
    CompileReport,
    Direct,
    Hyper,
    Hypergradient,
    Implicit,
    Neumann,
    Problem,
    Status,
    TwoViewLoss,
    Unrolled,
    module_problem,
)
from hypergrad.compiled import graph, implicit
from hypergrad.compiled.cache import PROGRAMS, Cache
from hypergrad.compiled.guards import Guards
from tests.hypergrad.naive import error, vector, with_optimizer_hparams
from tests.hypergrad.problems import CASES, SOLVED, Case, trained


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def interpret(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        return lambda given: module(*given)

    monkeypatch.setattr(graph, "_inductor", interpret)
    monkeypatch.setattr(implicit, "BLOCK", 2)  # tracing takes most of the time of these tests
    # A log of every fake tensor, which pytest would keep.
    monkeypatch.setattr(logging.root.manager, "disable", logging.DEBUG)
    PROGRAMS.clear()
    yield
    PROGRAMS.clear()


def call(case: Case, estimator: Any, state: Any = None) -> tuple[Hypergradient, Any]:
    state = state or estimator.init(case.problem, case.params, case.hparams)
    result: tuple[Hypergradient, Any] = estimator(
        case.problem, case.params, case.hparams, case.inner, case.outer, state
    )
    return result


def report(found: Hypergradient) -> CompileReport:
    assert found.compiled is not None
    return found.compiled


def agree(case: Case, estimator: Any, tol: float = 1e-10) -> Hypergradient:
    """Check a compiled estimator against eager, twice; returns the second result."""
    expected, _ = call(case, replace(estimator, compile="off"))
    assert expected.compiled is None
    for cached in (False, True):
        found, _ = call(case, estimator)
        assert report(found).reason is None
        assert report(found).cached is cached
        assert (report(found).seconds == 0.0) is cached
        assert error(found.grad, expected.grad) < tol
        assert error(found.params, expected.params) < tol
        assert found.value.item() == pytest.approx(expected.value.item(), rel=tol)
        assert found.status is expected.status
        assert optree.tree_structure(found.grad) == optree.tree_structure(expected.grad)
    return found


def reason(case: Case, estimator: Any) -> str:
    """Check that a call is eager, and return why."""
    random = torch.get_rng_state()
    expected, _ = call(case, replace(estimator, compile="off"))
    torch.set_rng_state(random)
    found, _ = call(case, estimator)
    assert torch.equal(vector(found.grad), vector(expected.grad))
    assert not report(found).used
    return str(report(found).reason)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


RULES: dict[str, tuple[Any, dict[str, float]]] = {
    "sgd": (SGD(0.1), {}),
    "momentum": (
        SGD(Hyper("lr"), Hyper("momentum"), weight_decay=Hyper("wd")),
        {"lr": 0.1, "momentum": 0.8, "wd": 0.05},
    ),
    "dampening": (
        SGD(Hyper("lr"), 0.8, Hyper("dampening")),
        {"lr": 0.1, "dampening": 0.2},
    ),
    "adam": (
        Adam(Hyper("lr"), (Hyper("beta1"), Hyper("beta2")), Hyper("eps"), Hyper("wd")),
        {"lr": 0.05, "beta1": 0.8, "beta2": 0.95, "eps": 1e-2, "wd": 0.05},
    ),
    "adamw": (AdamW(Hyper("lr"), eps=1e-2, amsgrad=True), {"lr": 0.05}),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("sgd", "step"),
        ("momentum", "chunk"),
        ("dampening", "step"),
        ("adam", "chunk"),
        ("adamw", "step"),
    ],
)
def test_unrolled_agrees_with_eager(name: str, mode: Any) -> None:
    rule, numbers = RULES[name]
    case = SOLVED["softmax_ridge"]()
    case = with_optimizer_hparams(case, **{k: number(v) for k, v in numbers.items()})
    found = agree(case, Unrolled(rule, 10, compile=mode))
    # Dampened momentum starts without a buffer, so its first step is eager.
    assert report(found).eager_steps == (name == "dampening")
    assert found.n_hvp == 10
    assert found.n_grad == 11


def test_memory_and_truncation() -> None:
    """Chunks of 7 steps in 23, of 5 steps in the last 11: the steps beside them are eager."""
    case = SOLVED["softmax_ridge"]()
    for truncation, eager_steps in ((None, 2), (11, 3)):
        for memory in ("graph", "replay", "segments", "auto"):
            rule: Any = SGD(0.1, 0.8)
            estimator = Unrolled(
                rule,
                23,
                truncation=truncation,
                memory=memory,
                compile="chunk",  # type: ignore[arg-type]
            )
            found, _ = call(case, estimator)
            expected, _ = call(case, replace(estimator, compile="off"))
            assert report(found).reason is None
            assert report(found).eager_steps == eager_steps
            assert error(found.grad, expected.grad) < 1e-12
            assert error(found.params, expected.params) < 1e-14
            assert found.status is expected.status
            assert found.n_hvp == (truncation or 23)
            assert (found.n_grad > 24) is (memory in ("replay", "segments"))


def test_per_parameter_decay_at_new_values_is_a_cache_hit() -> None:
    case = SOLVED["softmax_ridge"]()
    decay = optree.tree_map(lambda p: torch.rand_like(p).requires_grad_(), case.params)
    case = with_optimizer_hparams(case, decay=decay, lr=number(0.1))
    estimator = Unrolled(SGD(Hyper("lr"), 0.9, weight_decay=Hyper("decay")), 10, compile="step")
    agree(case, estimator)
    moved = trained(optree.tree_map(lambda t: 0.7 * t, case.hparams))
    case = replace(case, hparams=moved)
    found, _ = call(case, estimator)
    assert report(found).cached
    expected, _ = call(case, replace(estimator, compile="off"))
    assert error(found.grad, expected.grad) < 1e-12


def test_counters_of_adam_are_inputs() -> None:
    """The graph of steps 1 to 10 serves steps 11 to 20, where bias corrections are others."""
    case = SOLVED["softmax_ridge"]()
    estimator = Unrolled(Adam(0.05, eps=1e-2), 10, compile="chunk")
    states: list[Any] = [None, None]
    for _ in range(3):
        (found, states[0]), (expected, states[1]) = (
            call(case, e, s)
            for e, s in zip((estimator, replace(estimator, compile="off")), states, strict=True)
        )
        assert report(found).reason is None
        assert error(found.grad, expected.grad) < 1e-12
        assert states[0]["optimizer"]["step"] == states[1]["optimizer"]["step"]
        case = replace(case, params=found.params)
    assert states[0]["optimizer"]["step"] == 30
    assert report(found).cached


def test_batches_of_several_shapes() -> None:
    """Every fourth batch is smaller: a program for each in steps; no chunk of one shape."""
    case = SOLVED["softmax_ridge"]()
    x, y = case.inner["x"], case.inner["y"]

    def batch(t: int) -> Any:
        n = 11 if t % 4 == 3 else 16
        return {"x": x.roll(t, 1)[:n], "y": y.roll(t)[:n]}

    case = replace(case, inner=batch)
    found = agree(case, Unrolled(SGD(0.1), 8, compile="step"))
    assert report(found).eager_steps == 0
    assert "batches of one shape" in reason(case, Unrolled(SGD(0.1), 8, compile="chunk"))
    # Two of three chunks have one shape.
    mixed = replace(case, inner=lambda t: batch(3 if t == 7 else 0))
    assert report(agree(mixed, Unrolled(SGD(0.1), 15, compile="chunk"))).eager_steps == 5


def test_a_batch_that_changes_when_recomputed() -> None:
    case = SOLVED["softmax_ridge"]()
    calls = iter(range(1000))

    def drift(t: int) -> Any:
        return {**case.inner, "x": case.inner["x"] + 1e-3 * next(calls)}

    drifting = replace(case, inner=drift)
    with pytest.raises(RuntimeError, match="inner_loss at step"):
        call(drifting, Unrolled(SGD(0.1), 12, memory="replay", compile="chunk"))


def test_what_is_not_finite_is_named() -> None:
    case = SOLVED["ridge"]()
    estimator = Unrolled(SGD(0.1), 10, compile="chunk")
    agree(case, estimator)
    for t in (0, 7):

        def batch(i: int, t: int = t) -> Any:
            return {**case.inner, "x": case.inner["x"] * (torch.nan if i == t else 1.0)}

        with pytest.raises(FloatingPointError, match=f"inner_loss is nan at step {t}"):
            call(replace(case, inner=batch), estimator)
    with pytest.raises(FloatingPointError, match="at step"):
        call(case, Unrolled(SGD(1e200), 10, compile="step"))


def test_reasons_of_unrolled() -> None:
    estimator = Unrolled(SGD(0.1), 4, compile="step")
    case = SOLVED["ridge"]()
    inner = case.problem.inner_loss

    def with_loss(loss: Any) -> Case:
        return replace(case, problem=Problem(loss, case.problem.outer_loss))

    def branches(w: Any, h: Any, b: Any) -> Tensor:
        value = inner(w, h, b)
        return value if value > 0 else -value

    def reads(w: Any, h: Any, b: Any) -> Tensor:
        return inner(w, h, b) * (1 + 0 * w["w"].sum().item())

    def leaves(w: Any, h: Any, b: Any) -> Tensor:
        return inner(w, h, b) + float(np.sum(b["x"].numpy())) * 0

    count = torch.zeros(())

    def counts(w: Any, h: Any, b: Any) -> Tensor:
        count.add_(1)
        return inner(w, h, b)

    def draws(w: Any, h: Any, b: Any) -> Tensor:
        return inner(w, h, b) * (1 + torch.rand(()))

    assert "data-dependent" in reason(with_loss(branches), estimator)
    assert "reads the value of a tensor" in reason(with_loss(reads), estimator)
    assert "it cannot be traced" in reason(with_loss(leaves), estimator)
    assert "changes a tensor in place" in reason(with_loss(counts), estimator)
    assert "draws random numbers" in reason(with_loss(draws), estimator)
    assert "draws random numbers" in reason(CASES["dropout"](), estimator)
    assert "holds a ndarray" in reason(
        replace(case, inner={**case.inner, "z": np.ones(1)}), estimator
    )


def test_low_precision_stays_eager() -> None:
    case = CASES["ridge"](dtype=torch.bfloat16)
    assert "torch.bfloat16" in reason(case, Unrolled(SGD(0.1), 3, compile="step"))
    assert "torch.bfloat16" in reason(case, Implicit(CG(max_iter=3), compile="solve"))


@pytest.mark.parametrize("name", ["batch_norm", "tied_and_frozen", "attention"])
def test_modules(name: str) -> None:
    case = CASES[name]()
    case = replace(case, inner={**case.inner, "seed": 0})  # nothing is drawn
    agree(case, Unrolled(SGD(0.1, 0.8), 3, compile="step"))


@pytest.mark.parametrize("name", SOLVED)
@pytest.mark.parametrize("mode", ["step", "solve"])
def test_implicit_agrees_with_eager(name: str, mode: Any) -> None:
    case = SOLVED[name]()
    assert case.minimize is not None
    assert case.hypergradient is not None
    case = replace(case, params=case.minimize(case.hparams))
    found = agree(case, Implicit(CG(rtol=1e-12), compile=mode))
    assert error(found.grad, case.hypergradient(case.hparams)) < 1e-9
    assert found.status is Status.CONVERGED
    assert found.residual is not None
    assert found.residual < 1e-12


def test_solve_keeps_the_statuses_of_cg() -> None:
    """max_iter inside of a block, damping, atol, warm starts, and the residual and products."""
    case = SOLVED["ridge"]()
    for solver in (
        CG(rtol=0.0, max_iter=3, damping=0.5),
        CG(rtol=1e-3, atol=1e-2),
        CG(rtol=0.9),
        CG(rtol=0.0, max_iter=60),
    ):
        found = agree(case, Implicit(solver, compile="solve"), 1e-8)
        expected, _ = call(case, Implicit(solver))
        assert found.residual is not None
        assert expected.residual is not None
        assert found.residual == pytest.approx(expected.residual, rel=1e-6, abs=1e-14)
        if solver.max_iter < 10 or solver.rtol == 0.9:
            assert found.n_hvp == expected.n_hvp


def test_solve_meets_curvature_that_is_not_positive() -> None:
    def problem(a: Tensor) -> Case:
        def inner(w: Any, h: Any, b: Any) -> Tensor:
            return 0.5 * w @ a @ w - h @ w

        def outer(w: Any, h: Any, b: Any) -> Tensor:
            return (w - 1).pow(2).sum() + (h**2).sum()

        start = trained(torch.linspace(-1, 0.5, 4, dtype=torch.float64))
        return Case(Problem(inner, outer), start, trained(torch.ones(4).double()), None, None)

    indefinite = torch.diag(torch.tensor([3.0, 2.0, 1.0, -5.0]).double())
    singular = torch.diag(torch.tensor([3.0, 0.0, 0.0, 0.0]).double())
    for matrix, status in (
        (indefinite, Status.NEGATIVE_CURVATURE),
        (singular, Status.BREAKDOWN),
    ):
        found = agree(problem(matrix), Implicit(CG(rtol=1e-10), compile="solve"), 1e-8)
        assert found.status is status


def test_solve_tells_what_is_not_symmetric() -> None:
    """In two directions, and where already the first has no curvature."""

    def outer(w: Any, h: Any, b: Any) -> Tensor:
        return (w - 1).pow(2).sum() + (h**2).sum()

    turned = torch.eye(4).roll(1, 0)
    for a in (torch.eye(4).double() + turned, turned - turned.T, turned - torch.eye(4)):

        def two_views(w: Any, frozen: Any, h: Any, b: Any, a: Tensor = a) -> Tensor:
            return w @ (a @ frozen - h)

        start = trained(torch.linspace(-1, 0.5, 4, dtype=a.dtype))
        problem = Problem(TwoViewLoss(two_views), outer)
        case = Case(problem, start, trained(torch.ones(4, dtype=a.dtype)), None, None)
        found, _ = call(case, Implicit(CG(rtol=1e-10), compile="solve"))
        expected, _ = call(case, Implicit(CG(rtol=1e-10)))
        assert report(found).reason is None
        assert found.status is expected.status is Status.NOT_SYMMETRIC


def test_solve_of_a_zero_system_and_a_start_that_is_worse_than_zero() -> None:
    case = SOLVED["ridge"]()
    zero = Problem(case.problem.inner_loss, lambda w, h, b: 0 * w["w"].sum() + h["log_wd"].sum())
    found, state = call(replace(case, problem=zero), Implicit(CG(), compile="solve"))
    assert report(found).reason is None
    assert found.residual == 0.0
    assert found.status is Status.CONVERGED
    assert torch.equal(found.grad["log_wd"], torch.ones(6).double())
    assert not state["adjoint"].any()

    estimator = Implicit(CG(rtol=1e-12), compile="solve")
    expected, state = call(case, estimator)
    warm, _ = call(case, estimator, state)
    assert warm.n_hvp < expected.n_hvp
    assert error(warm.grad, expected.grad) < 1e-10
    far, _ = call(case, estimator, {"adjoint": 100 * torch.ones(6).double(), "solver": None})
    assert error(far.grad, expected.grad) < 1e-10
    with pytest.raises(ValueError, match=r"has shape \(5,\)"):
        call(case, estimator, {"adjoint": torch.ones(5).double(), "solver": None})


@pytest.mark.parametrize("solver", [Neumann(terms=200), Direct(chunk=1), CG(damping=0.1)])
def test_step_serves_every_solver(solver: Any) -> None:
    agree(SOLVED["ridge"](), Implicit(solver, compile="step"))


def test_reasons_of_implicit() -> None:
    case = SOLVED["ridge"]()
    assert "Direct(chunk=1)" in reason(case, Implicit(Direct(), compile="step"))
    ggn = GGN(
        lambda w, h, b: b["x"] @ w["w"],
        lambda z, h, b: 0.5 * (z - b["y"]).pow(2).mean(),
        lambda w, h, b: 0.5 * (h["log_wd"].exp() * w["w"].pow(2)).sum(),
    )
    assert "cannot be traced" in reason(case, Implicit(CG(), ggn, compile="solve"))
    nan = replace(case, outer={**case.outer, "y": case.outer["y"] * torch.nan})
    with pytest.raises(FloatingPointError, match="outer_loss is nan"):
        call(nan, Implicit(CG(), compile="solve"))
    unused = replace(case, hparams={**case.hparams, "z": number(1.0)})
    with pytest.raises(ValueError, match=r"hparams\['z'\] enters neither"):
        call(unused, Implicit(CG(), compile="solve"))


def test_wrong_programs_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        return lambda given: [t * 1.001 if t.dim() else t for t in module(*given)]

    monkeypatch.setattr(graph, "_inductor", wrong)
    case = SOLVED["ridge"]()
    for estimator in (
        Unrolled(SGD(0.1), 10, compile="step"),
        Implicit(CG(), compile="solve"),
    ):
        for _ in range(2):
            assert "its first result was wrong" in reason(case, estimator)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        raise RuntimeError("No working C++ compiler found\nmore")

    monkeypatch.setattr(graph, "_inductor", fails)
    why = reason(SOLVED["ridge"](), Unrolled(SGD(0.1), 10, compile="chunk"))
    assert why == "inductor failed: RuntimeError: No working C++ compiler found"


def test_losses_may_read_what_changes() -> None:
    """A tensor by reference, a number and a training mode by value."""
    case = SOLVED["ridge"]()
    inner, estimator = case.problem.inner_loss, Unrolled(SGD(0.1), 6, compile="step")
    scale, factor = torch.ones((), dtype=torch.float64), 1.0
    layer = nn.BatchNorm1d(6, affine=False).double()

    def loss(w: Any, h: Any, b: Any) -> Tensor:
        return factor * scale * inner(w, h, {**b, "x": layer(b["x"])})

    problem, _ = module_problem(layer, lambda m, h, b: b, lambda m, h, b: b)
    case = replace(case, problem=Problem(loss, case.problem.outer_loss))
    layer.eval()
    agree(case, estimator)

    def cached_and_right() -> bool:
        found, _ = call(case, estimator)
        expected, _ = call(case, replace(estimator, compile="off"))
        assert error(found.grad, expected.grad) < 1e-12
        return report(found).cached

    scale.fill_(0.5)
    layer.running_mean = layer.running_mean + 0  # type: ignore[operator]
    assert not cached_and_right()
    layer.running_mean.add_(0.3)
    assert cached_and_right()
    factor = 2.0
    assert not cached_and_right()
    factor = 1.0 + 1.0
    assert cached_and_right()
    assert problem is not None


def test_guards() -> None:
    options, rate = {"a": [1, 2.0]}, 0.5

    def loss(x: float) -> Any:
        return options["a"], rate, x

    def outer(x: float) -> Any:
        return loss(x)

    guards = Guards(outer)
    assert guards.hold()
    options["a"][1] = 3.0
    assert not guards.hold()
    options["a"][1] = 2.0
    assert guards.hold()
    rate = 0.25
    assert not guards.hold()
    assert len(guards.codes) == 2


def test_programs_die_with_their_losses_and_are_bounded() -> None:
    cache = Cache(size=2, per_source=3)

    def problem() -> Problem:
        return Problem(lambda w, h, b: w, lambda w, h, b: w)

    kept = problem()
    for key in "abc":
        assert cache.get(kept, key, lambda: 1)[0].program == 1
    assert cache.get(kept, "c", lambda: 2)[0].program == 1
    with pytest.raises(Exception, match="3 programs were compiled for losses from the same source"):
        cache.get(kept, "a", lambda: 2)  # forgotten
    with pytest.raises(Exception, match="same source"):
        cache.get(problem(), "c", lambda: 2)  # functions made anew
    assert len(cache._entries) == 2
    del kept
    gc.collect()
    assert not cache._entries


def test_refused_combinations() -> None:
    with pytest.raises(ValueError, match=r"compile must be one of \('off', 'step', 'chunk'\)"):
        Unrolled(SGD(0.1), 5, compile="solve")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory is 'forward'"):
        Unrolled(SGD(0.1), 5, memory="forward", compile="step")
    with pytest.raises(ValueError, match=r"compile must be one of \('off', 'step', 'solve'\)"):
        Implicit(compile="chunk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs solver=CG"):
        Implicit(Neumann(), compile="solve")


def test_a_compiled_call_leaves_its_arguments_and_the_random_state() -> None:
    case = SOLVED["softmax_ridge"]()
    before = [t.clone() for t in optree.tree_leaves((case.params, case.hparams))]
    random = torch.get_rng_state()
    found, _ = call(case, Unrolled(SGD(0.1), 10, compile="chunk"))
    assert report(found).used
    call(case, Implicit(CG(max_iter=3), compile="solve"))
    after = optree.tree_leaves((case.params, case.hparams))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(t.requires_grad and t.grad is None for t in after)
    assert torch.equal(random, torch.get_rng_state())
