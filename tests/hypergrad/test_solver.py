"""The solver: derivatives against the estimators, modules of every kind, state, bad input."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, prune

from hypergrad import (
    CG,
    SGD,
    FiniteDifference,
    FixedPoint,
    Hyper,
    Identity,
    Implicit,
    Lion,
    Solver,
    Status,
    TwoViewLoss,
    Unrolled,
    module_problem,
)
from tests.hypergrad.naive import error
from tests.hypergrad.problems import Attention, Tied

X = torch.randn(12, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
XV = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(2))
TRAIN, VAL = (X, Y), (XV, Y)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.cell(x.view(-1, 3, 2))[0][:, -1])
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))


def pruned() -> nn.Module:
    net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    prune.random_unstructured(net[0], "weight", 0.3)
    net(torch.zeros(1, 6))
    return net


class Noisy(nn.Module):
    """Draws from a generator of its own, the same numbers each time."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(6, 3), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.generator.manual_seed(1), dtype=x.dtype)
        out: Tensor = self.layer(x + 0.1 * noise)
        return out


def frozen() -> nn.Module:
    net = mlp()
    net[0].requires_grad_(False)
    return net


MODULES = [mlp, batch_norm, parametrized, pruned, frozen, Tied, Attention, Recurrent, Noisy]


def build(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().double()


def task(model: nn.Module, batch: Any, hparams: Any = None) -> Tensor:
    return F.cross_entropy(model(batch[0])[:, :3], batch[1])


def decayed(model: nn.Module, batch: Any, decay: Any) -> Tensor:
    penalty = sum((decay[k] * p.square()).sum() for k, p in model.named_parameters() if k in decay)
    return task(model, batch) + penalty


def decays(model: nn.Module, value: float = 1e-2) -> dict[str, Tensor]:
    return {
        k: torch.full_like(p, value).requires_grad_()
        for k, p in model.named_parameters()
        if p.requires_grad
    }


def by_estimator(model: nn.Module, estimator: Any, hparams: Any, steps: int = 0) -> Any:
    """dF/dh through a `Problem`, at the parameters after plain steps of torch."""
    problem, params = module_problem(
        model, lambda m, h, b: decayed(m, b, h), lambda m, h, b: task(m, b)
    )
    if steps:
        params = plain(params, problem, hparams, steps)
    return estimator(
        problem, params, hparams, TRAIN, VAL, estimator.init(problem, params, hparams)
    )[0]


def plain(params: Any, problem: Any, hparams: Any, steps: int) -> Any:
    trained = {k: p.detach().clone().requires_grad_(p.requires_grad) for k, p in params.items()}
    rule = torch.optim.SGD([p for p in trained.values() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        rule.zero_grad()
        problem.inner_loss(trained, hparams, TRAIN).backward(inputs=rule.param_groups[0]["params"])
        rule.step()
    return trained


@pytest.mark.parametrize("make", MODULES)
def test_unrolled_hypergradient_of_a_module(make: Callable[[], nn.Module]) -> None:
    model = build(make)
    hparams = decays(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    solve = Solver(model, decayed, torch.optim.SGD, lr=0.1, momentum=0.9, method=Unrolled(steps=4))
    fitted = solve(TRAIN, hparams)
    loss = task(fitted, VAL)
    loss.backward()

    expected = by_estimator(model, Unrolled(SGD(lr=0.1, momentum=0.9), 4), hparams)
    assert loss.item() == pytest.approx(expected.value.item(), rel=1e-13)
    assert error({k: h.grad for k, h in hparams.items()}, expected.grad) < 1e-12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(fitted, type(model))
    assert fitted.state_dict().keys() == before.keys()
    assert solve.report is not None
    assert solve.report.status is Status.EXACT


@pytest.mark.parametrize("make", [mlp, Tied, frozen])
def test_implicit_hypergradient_of_a_module(make: Callable[[], nn.Module]) -> None:
    model = build(make)
    hparams = decays(model, 1.0)
    solver = CG(rtol=1e-10, max_iter=500)
    solve = Solver(
        model, decayed, torch.optim.SGD, lr=0.1, momentum=0.9, method=Implicit(solver), steps=50
    )
    task(solve(TRAIN, hparams), VAL).backward()
    expected = by_estimator(model, Implicit(solver), hparams, steps=50)
    assert error({k: h.grad for k, h in hparams.items()}, expected.grad) < 1e-9
    assert all(p.grad is None for p in model.parameters())
    assert solve.report is not None
    assert solve.report.status is Status.CONVERGED
    assert solve.report.residual is not None
    assert solve.report.residual < 1e-10


def test_meta_gradient_of_the_initialization() -> None:
    """MAML: the gradient in w₀ by central differences, summed over two tasks."""
    model = build(mlp)
    solve = Solver(model, task, torch.optim.Adam, lr=0.05, eps=1e-3, method=Unrolled(steps=3))
    tasks = [(TRAIN, VAL), (VAL, TRAIN)]
    for support, query in tasks:
        task(solve(support), query).backward()
    weight = model[0].weight
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5)).double()

    def at(step: float) -> float:
        with torch.no_grad():
            weight.add_(direction, alpha=step)
            found = sum(task(solve(support), query).item() for support, query in tasks)
            weight.sub_(direction, alpha=step)
        return found

    difference = (8 * (at(2e-5) - at(-2e-5)) - (at(4e-5) - at(-4e-5))) / 24e-5
    assert (weight.grad * direction).sum().item() == pytest.approx(difference, rel=1e-8)


class Weighting(nn.Module):
    """A network that weights samples, with buffers and a frozen part."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.scale = nn.Parameter(torch.tensor(2.0), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * torch.sigmoid(self.net(x)).squeeze(1)


def weighted(model: nn.Module, batch: Any, weights: Any) -> Tensor:
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (losses * (weights(batch[0]) if callable(weights) else weights)).mean()


def test_hyperparameters_may_be_a_module() -> None:
    model, weighting = build(mlp), build(Weighting)
    before = {k: v.clone() for k, v in weighting.state_dict().items()}
    solve = Solver(model, weighted, torch.optim.SGD, lr=0.5, method=Unrolled(steps=3))
    task(solve(TRAIN, weighting), VAL).backward()
    assert all(torch.equal(v, before[k]) for k, v in weighting.state_dict().items())
    assert weighting.scale.grad is None

    # The same through a tensor that the module computed: nothing in it depends on w.
    direct = torch.autograd.grad(
        task(solve(TRAIN, weighting(X)), VAL), list(weighting.net.parameters())
    )
    assert error([p.grad for p in weighting.net.parameters()], list(direct)) < 1e-12


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: t.requires_grad_(),
        nn.Parameter,
        lambda t: {"a": {"b": nn.Parameter(t)}},
        lambda t: [nn.Parameter(t)],
        lambda t: nn.ParameterDict({"a": nn.Parameter(t)}),
        lambda t: nn.ParameterList([nn.Parameter(t)]),
    ],
    ids=["tensor", "parameter", "nested", "list", "ParameterDict", "ParameterList"],
)
def test_hyperparameters_may_be_any_tree(wrap: Callable[[Tensor], Any]) -> None:
    def read(h: Any) -> Tensor:
        while not isinstance(h, Tensor):
            h = next(iter(h.values() if isinstance(h, dict | nn.ParameterDict) else h))
        return h

    model, h = build(mlp), wrap(torch.ones(12, dtype=torch.float64))
    solve = Solver(
        model, lambda m, b, h: weighted(m, b, read(h)), torch.optim.SGD, lr=0.5,
        method=Unrolled(steps=2),
    )  # fmt: skip
    task(solve(TRAIN, h), VAL).backward()
    plain = torch.ones(12, dtype=torch.float64, requires_grad=True)
    solve = Solver(model, weighted, torch.optim.SGD, lr=0.5, method=Unrolled(steps=2))
    task(solve(TRAIN, plain), VAL).backward()
    torch.testing.assert_close(read(h).grad, plain.grad, rtol=0, atol=0)


def test_optimizer_numbers_are_hyperparameters() -> None:
    model = build(mlp)
    hparams = {"lr": torch.tensor(0.1).double(), "decay": decays(model)}
    hparams["lr"].requires_grad_()
    rule = {"lr": Hyper("lr"), "weight_decay": Hyper("decay"), "momentum": 0.9}
    solve = Solver(model, task, torch.optim.SGD, **rule, method=Unrolled(steps=4))
    task(solve(TRAIN, hparams), VAL).backward()
    problem, params = module_problem(model, lambda m, h, b: task(m, b), lambda m, h, b: task(m, b))
    estimator = Unrolled(SGD(**rule), 4)
    expected, _ = estimator(problem, params, hparams, TRAIN, VAL, {"optimizer": None})
    assert error(hparams["lr"].grad, expected.grad["lr"]) < 1e-12
    found = {k: h.grad for k, h in hparams["decay"].items()}
    assert error(found, expected.grad["decay"]) < 1e-12


@pytest.mark.parametrize("memory", ["graph", "replay", "segments", "auto", "forward"])
def test_gradients_accumulate_and_a_graph_can_be_kept(memory: Any) -> None:
    model = build(mlp)
    h = torch.ones(12, dtype=torch.float64, requires_grad=True)
    method = Unrolled(steps=5, memory=memory)
    solve = Solver(model, weighted, torch.optim.SGD, lr=0.5, method=method)
    fitted = solve(TRAIN, h)
    loss, other = task(fitted, VAL), fitted[2].weight.square().sum()
    loss.backward(retain_graph=True)
    once = h.grad.clone()
    loss.backward(retain_graph=True)
    torch.testing.assert_close(h.grad, 2 * once, rtol=1e-14, atol=0)
    other.backward()
    both = torch.autograd.grad(
        (lambda m: 2 * task(m, VAL) + m[2].weight.square().sum())(solve(TRAIN, h)), h
    )[0]
    torch.testing.assert_close(h.grad, both, rtol=1e-12, atol=1e-15)
    with pytest.raises(RuntimeError, match="second time"):
        other.backward()


def test_without_gradients_it_is_plain_training() -> None:
    model = build(mlp)
    hparams = decays(model)
    training = {"lr": 0.1, "momentum": 0.9}
    problem, params = module_problem(model, lambda m, h, b: decayed(m, b, h), task)
    expected = plain(params, problem, hparams, 6)
    implicit = Solver(model, decayed, torch.optim.SGD, **training, method=Implicit(), steps=6)
    unrolled = Solver(model, decayed, torch.optim.SGD, **training, method=Unrolled(steps=6))
    frozen = {k: h.detach() for k, h in hparams.items()}
    with torch.no_grad(), pytest.raises(TypeError, match=r"hparams\['lr'\] must be a tensor"):
        implicit(TRAIN, {"lr": 0.1})
    for solve in (implicit, unrolled):
        with torch.no_grad():
            fitted = solve(TRAIN, frozen)
        assert not any(p.requires_grad for p in fitted.parameters())
        graph = solve(TRAIN, hparams)
        for model in (fitted, graph):
            assert all(torch.equal(p, expected[k]) for k, p in model.named_parameters())


def test_forward_mode_carries_tangents_of_the_hyperparameters() -> None:
    model = build(mlp)
    found = []
    for memory in ("forward", "graph"):
        hparams = {"lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)}
        method = Unrolled(steps=5, memory=memory)  # type: ignore[arg-type]
        rule = {"lr": Hyper("lr"), "momentum": 0.9, "method": method}
        loss = task(Solver(model, task, torch.optim.SGD, **rule)(TRAIN, hparams), VAL)
        first = torch.autograd.grad(loss, hparams["lr"], create_graph=True)[0]
        second = torch.autograd.grad(first, hparams["lr"])[0]
        model.zero_grad()
        loss = task(Solver(model, task, torch.optim.SGD, **rule)(TRAIN, hparams), VAL)
        loss.backward()
        found.append([loss.detach(), hparams["lr"].grad, first.detach(), second])
        assert (model[0].weight.grad is None) == (memory == "forward")
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)


def test_a_batch_for_each_step() -> None:
    model = build(mlp)
    hparams = decays(model)
    solve = Solver(model, decayed, torch.optim.SGD, lr=0.1, method=Unrolled(steps=4))
    task(solve(lambda t: (X[t::4], Y[t::4]), hparams), VAL).backward()
    problem, params = module_problem(
        model, lambda m, h, b: decayed(m, b, h), lambda m, h, b: task(m, b)
    )
    found, _ = Unrolled(SGD(lr=0.1), 4)(
        problem, params, hparams, lambda t: (X[t::4], Y[t::4]), VAL, {"optimizer": None}
    )
    assert error({k: h.grad for k, h in hparams.items()}, found.grad) < 1e-12


def test_warm_start_goes_on_as_one_long_training() -> None:
    model = build(mlp)
    hparams = decays(model)
    warm = Solver(
        model, decayed, torch.optim.Adam, lr=0.1, method=Unrolled(steps=3), warm_start=True
    )
    once = Solver(model, decayed, torch.optim.Adam, lr=0.1, method=Unrolled(steps=6))
    first = warm(TRAIN, hparams)
    task(first, VAL).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    second = warm(TRAIN, hparams)
    task(second, VAL).backward()
    assert all(p.grad is None for p in model.parameters())  # it no longer starts there
    for a, b in zip(second.parameters(), once(TRAIN, hparams).parameters(), strict=True):
        assert torch.equal(a, b)
    warm.reset()
    for a, b in zip(warm(TRAIN, hparams).parameters(), first.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "method",
    [
        (Unrolled(steps=3), {}),
        (Implicit(CG(max_iter=4)), {"steps": 3}),
    ],
    ids=["unrolled", "implicit"],
)
def test_state_is_storable_and_goes_on_bit_for_bit(method: Any, tmp_path: Path) -> None:
    def make() -> tuple[Any, dict[str, Tensor]]:
        model = build(mlp)
        options = {"lr": 0.1, "method": method[0], "warm_start": True, **method[1]}
        return Solver(model, decayed, torch.optim.Adam, **options), decays(model, 1.0)

    def outer_step(solve: Any, hparams: dict[str, Tensor]) -> list[Tensor]:
        loss = task(solve(TRAIN, hparams), VAL)
        return [*torch.autograd.grad(loss, list(hparams.values()))]

    solve, hparams = make()
    outer_step(solve, hparams)
    torch.save(solve.state_dict(), tmp_path / "state.pt")
    expected = outer_step(solve, hparams)
    resumed, hparams = make()
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(outer_step(resumed, hparams), expected, strict=True):
        assert torch.equal(a, b)
    if isinstance(method[0], Implicit):
        assert solve.state["implicit"]["adjoint"] is not None


def test_training_to_a_tolerance() -> None:
    w = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    h = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64, requires_grad=True)

    def loss(w: Tensor, batch: Any, h: Tensor) -> Tensor:
        return (w - h.square()).square().sum()

    solve = Solver(w, loss, SGD(lr=0.3), method=Implicit(), steps=100, grad_norm=1e-9)
    solve(None, h).sum().backward()
    torch.testing.assert_close(h.grad, 2 * h)
    assert solve.report is not None
    assert solve.report.steps < 100
    assert solve.report.grad_norm is not None
    assert solve.report.grad_norm <= 1e-9
    short = Solver(w, loss, SGD(lr=0.3), method=Implicit(), steps=3, grad_norm=1e-9)
    with pytest.warns(RuntimeWarning, match=r"took all 3 steps .* above grad_norm=1.0e-09"):
        short(None, h)


def test_a_solve_on_negative_curvature_warns() -> None:
    w = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    h = torch.ones(2, dtype=torch.float64, requires_grad=True)
    solve = Solver(
        w, lambda w, b, h: (h * w).sum() - w.square().sum(), SGD(lr=0.1), method=Implicit(), steps=1
    )
    with pytest.warns(RuntimeWarning, match="not positive definite"):
        solve(None, h).sum().backward()
    assert solve.report is not None
    assert solve.report.status is Status.NEGATIVE_CURVATURE


def test_identity_is_t1_t2() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    h = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    method = Implicit(Identity(scale=0.1))
    solve = Solver(w, lambda w, b, h: (h * w.square()).sum(), SGD(lr=0.1), method=method, steps=1)
    fitted = solve(None, h)
    fitted.sum().backward()
    torch.testing.assert_close(h.grad, -0.1 * 2 * fitted.detach())


def test_trees_of_tensors_keep_their_constants() -> None:
    tree = {"w": torch.ones(2, requires_grad=True), "fixed": torch.full((2,), 3.0)}
    solve = Solver(
        tree, lambda t, b: ((t["w"] - t["fixed"]) ** 2).sum(), SGD(lr=0.5), method=Unrolled(steps=1)
    )
    fitted = solve(None)
    assert torch.equal(fitted["fixed"], tree["fixed"])
    torch.testing.assert_close(fitted["w"].detach(), tree["fixed"])


def test_a_solver_keeps_no_graph() -> None:
    model = build(mlp)
    hparams = decays(model)
    solve = Solver(model, decayed, torch.optim.SGD, lr=0.1, method=Unrolled(steps=3))
    fitted = solve(TRAIN, hparams)
    node = weakref.ref(fitted[0].weight.grad_fn)
    run = weakref.ref(node().run)  # type: ignore[union-attr]
    gc.disable()
    try:
        del fitted
        assert run() is None
    finally:
        gc.enable()


@pytest.mark.slow
def test_compiled_implicit_pullbacks() -> None:
    model = build(mlp)
    found = []
    for mode in ("off", "solve"):
        hparams = decays(model, 1.0)
        method = Implicit(CG(rtol=1e-10), compile=mode)  # type: ignore[arg-type]
        training = {"lr": 0.1, "momentum": 0.9, "method": method, "steps": 50}
        solve = Solver(model, decayed, torch.optim.SGD, **training)
        for _ in range(2):
            task(solve(TRAIN, hparams), VAL).backward()
        found.append([h.grad for h in hparams.values()])
        assert solve.report is not None
        if mode == "solve":
            assert solve.report.compiled is not None
            assert solve.report.compiled.reason is None
            assert solve.report.compiled.cached
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("with_hparams", [True, False])
def test_compiled_unrolled_pullbacks(with_hparams: bool) -> None:
    model = build(mlp)
    found = []
    for mode in ("off", "step"):
        hparams = {"lr": torch.tensor(0.1, dtype=torch.float64, requires_grad=True)}
        rule: dict[str, Any] = {"lr": Hyper("lr") if with_hparams else 0.1, "momentum": 0.9}
        method = Unrolled(steps=4, compile=mode)  # type: ignore[arg-type]
        solve = Solver(model, task, torch.optim.SGD, **rule, method=method)
        model.zero_grad()
        for _ in range(2):
            fitted = solve(TRAIN, hparams) if with_hparams else solve(TRAIN)
            task(fitted, VAL).backward()
        leaves = [*model.parameters(), *(hparams.values() if with_hparams else [])]
        found.append([leaf.grad for leaf in leaves])
        assert solve.report is not None
        if mode == "step":
            assert solve.report.compiled is not None
            assert solve.report.compiled.reason is None
            assert solve.report.compiled.cached
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-14)


FIXED = FixedPoint(lambda params, hparams, batch: params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": 3}, "loss must be a function"),
        ({"loss": TwoViewLoss(lambda *a: a[0])}, "is a TwoViewLoss"),
        ({"optimizer": torch.optim.LBFGS}, r"must be one of torch.optim.SGD, .*but got LBFGS"),
        ({"optimizer": "sgd"}, "must be a hypergrad optimizer"),
        ({"optimizer": SGD(), "lr": 0.1}, "options go with a class"),
        ({"learning_rate": 0.1}, "learning_rate"),
        ({"model": mlp().requires_grad_(False)}, "nothing to train"),
        ({"method": FiniteDifference()}, r"method must be Unrolled\(...\) or Implicit\(...\)"),
        ({"method": Unrolled(SGD(), steps=3)}, "optimizer is given twice"),
        ({"steps": 3}, r"without steps=3"),
        ({"method": Implicit(operator=FIXED), "steps": 3}, "FixedPoint is not what an optimizer"),
        ({"method": Implicit()}, "say how long to train"),
        ({"method": Implicit(), "steps": 0}, "at least 1, but got 0"),
        ({"method": Implicit(), "steps": 3, "grad_norm": -1.0}, "must be positive, but got -1.0"),
        ({"method": Implicit(), "steps": 3, "lr": Hyper("lr")}, "lr of the optimizer is a Hyper"),
        ({"method": Implicit(), "steps": 3, "weight_decay": 0.1}, "add the penalty to the loss"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict[str, Any], message: str) -> None:
    arguments = {
        "model": mlp(), "loss": task, "optimizer": torch.optim.SGD, "method": Unrolled(steps=2)
    }  # fmt: skip
    with pytest.raises((TypeError, ValueError), match=message):
        Solver(**{**arguments, **change})


def test_no_steps() -> None:
    with pytest.raises(ValueError, match="at least 1, but got 0"):
        Unrolled(steps=0)


@pytest.mark.parametrize(
    ("hparams", "kind", "message"),
    [
        (torch.ones(12), ValueError, "hparams does not require grad"),
        ({"a": torch.ones(12)}, ValueError, r"hparams\['a'\] does not require grad"),
        (torch.ones(12, dtype=torch.long), TypeError, "torch.int64"),
        ([0.5], TypeError, r"hparams\[0\] must be a tensor, but got float"),
        ({}, ValueError, "at least one tensor"),
        (mlp().requires_grad_(False), ValueError, "at least one tensor"),
    ],
)
def test_bad_hyperparameters(hparams: Any, kind: type[Exception], message: str) -> None:
    solve = Solver(mlp(), weighted, torch.optim.SGD, lr=0.1, method=Unrolled(steps=2))
    with pytest.raises(kind, match=message):
        solve((X.float(), Y), hparams)


def test_bad_calls() -> None:
    h = torch.ones(12, requires_grad=True)
    batch = (X.float(), Y)
    implicit = Solver(mlp(), weighted, torch.optim.SGD, lr=0.1, method=Implicit(), steps=2)
    with pytest.raises(ValueError, match="batch is a function of the step"):
        implicit(lambda t: batch, h)
    warm = Solver(mlp(), task, torch.optim.SGD, method=Unrolled(steps=2), warm_start=True)
    forward = Solver(mlp(), task, torch.optim.SGD, method=Unrolled(steps=2, memory="forward"))
    reasons = {warm: "starts elsewhere", implicit: "where training started", forward: "forward"}
    for solve, reason in reasons.items():
        with pytest.raises(ValueError, match=f"without hparams only the start .*{reason}"):
            solve(batch)
    with pytest.raises(ValueError, match="state must have the entries"):
        warm.load_state_dict({})  # type: ignore[typeddict-item]
    warm(batch, h)
    other = Solver(Tied(), task, torch.optim.SGD, method=Unrolled(steps=2), warm_start=True)
    other.load_state_dict(warm.state_dict())
    with pytest.raises(ValueError, match=r"state\['params'\] has shapes .* call reset"):
        other(batch, h)

    def square(model: nn.Linear, batch: Any) -> Tensor:
        return model.weight.square().sum()

    far = Solver(nn.Linear(6, 3), square, torch.optim.SGD, lr=1e30, method=Unrolled(steps=9))
    with pytest.raises(FloatingPointError, match="at step"):
        far(batch)


def test_rules_without_a_torch_class() -> None:
    model = build(mlp)
    solve = Solver(model, task, Lion, lr=0.01, method=Unrolled(steps=2))
    assert solve.optimizer == Lion(lr=0.01)
    instance = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.5)
    solve = Solver(model, task, instance, method=Unrolled(steps=2))
    assert solve.optimizer == SGD(lr=0.3, momentum=0.5)
