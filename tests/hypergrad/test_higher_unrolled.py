"""HigherUnrolled: agreement with Unrolled and with `higher` itself, module state, refusals."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import optree
import pytest
import torch
import torchopt
from torch import Tensor, nn

from hypergrad import SGD, Adam, AdamW, HigherUnrolled, Hyper, Unrolled, module_problem
from hypergrad.attention import math_attention
from tests.hypergrad.naive import error, vector
from tests.hypergrad.problems import CASES, Case

MODULES = ["batch_norm", "dropout", "tied_and_frozen", "attention"]


def run(case: Case, estimator: Any, state: Any = None) -> Any:
    start = state or estimator.init(case.problem, case.params, case.hparams)
    return estimator(case.problem, case.params, case.hparams, case.inner, case.outer, start)


def tuned(case: Case, **numbers: float) -> Case:
    """Add hyperparameters of the optimizer to a module problem."""
    hparams = {
        k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in numbers.items()
    }
    return Case(case.problem, case.params, {**case.hparams, **hparams}, case.inner, case.outer)


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        (SGD(Hyper("lr")), {"lr": 0.1}),
        (SGD(0.1, Hyper("momentum"), nesterov=True), {"momentum": 0.8}),
        (
            Adam(Hyper("lr"), (Hyper("beta1"), 0.99), 1e-3),
            {"lr": 0.05, "beta1": 0.8},
        ),
        (AdamW(0.05, eps=1e-3, weight_decay=Hyper("decay")), {"decay": 0.1}),
        (torchopt.rmsprop(0.01, eps=1e-3), {}),
    ],
    ids=["sgd", "nesterov", "adam", "adamw", "torchopt"],
)
@pytest.mark.parametrize("name", MODULES)
def test_agrees_with_unrolled(name: str, rule: Any, numbers: dict[str, float]) -> None:
    case = tuned(CASES[name](), **numbers)
    (ours, a), (reference, b) = run(case, HigherUnrolled(rule, 7)), run(case, Unrolled(rule, 7))
    assert error(ours.grad, reference.grad) < 1e-10
    assert error(ours.params, reference.params) < 1e-13
    assert ours.value.item() == pytest.approx(reference.value.item(), rel=1e-13)
    for key, value in b["optimizer"].items():
        torch.testing.assert_close(a["optimizer"][key], value)
        assert not (isinstance(value, Tensor) and a["optimizer"][key].requires_grad)


def by_higher(case: Case, make: Callable[..., torch.optim.Optimizer], steps: int) -> Any:
    """The hypergradient as a user of `higher` computes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import higher
    problem: Any = case.problem
    hparams = optree.tree_map(lambda t: t.detach().requires_grad_(), case.hparams)
    optimizer = make(problem.module.parameters())
    with math_attention(), higher.innerloop_ctx(problem.module, optimizer) as (net, stepper):
        for _ in range(steps):
            stepper.step(problem.module_inner_loss(net, hparams, case.inner))
        value = problem.module_outer_loss(net, hparams, case.outer)
    flat, spec = optree.tree_flatten(hparams)
    return optree.tree_unflatten(spec, list(torch.autograd.grad(value, flat)))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("rule", "make"),
    [
        (SGD(0.1, weight_decay=0.1), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)),
        (SGD(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (
            SGD(0.1, 0.9, nesterov=True),
            lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        ),
    ],
    ids=["sgd", "momentum", "nesterov"],
)
def test_agrees_with_higher_itself(name: str, rule: Any, make: Any) -> None:
    case = CASES[name]()
    expected = by_higher(case, make, 7)
    for estimator in (HigherUnrolled(rule, 7), Unrolled(rule, 7)):
        assert error(run(case, estimator)[0].grad, expected) < 1e-10


def test_adam_of_higher_is_wrong_and_stays_as_it_is() -> None:
    """Its eps lacks the bias correction; ours is right, and its registry keeps its own class."""
    case, eps = CASES["tied_and_frozen"](), 1e-2
    right = run(case, Unrolled(Adam(0.05, eps=eps), 7))[0].grad
    assert error(run(case, HigherUnrolled(Adam(0.05, eps=eps), 7))[0].grad, right) < 1e-10
    wrong = by_higher(case, lambda p: torch.optim.Adam(p, 0.05, eps=eps), 7)
    assert error(wrong, right) > 0.02


class Counter(nn.Module):
    """A layer whose buffer, the running mean of its input, shifts its output in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.mean: Tensor
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.mean(0), 0.5)
            return self.linear(x)
        return self.linear(x - self.mean)


def test_buffers_live_through_the_inner_loop_and_the_next_call() -> None:
    torch.manual_seed(0)
    net = Counter()
    x = torch.tensor([[1.0, 3.0]])

    def inner(net: nn.Module, h: Any, batch: Any) -> Tensor:
        return (net.train()(batch) * h["s"]).sum()

    def outer(net: nn.Module, h: Any, batch: Any) -> Tensor:
        return net.eval()(batch).pow(2).sum()

    problem, params = module_problem(net, inner, outer)
    case = Case(problem, params, {"s": torch.ones((), requires_grad=True)}, x, x)
    estimator = HigherUnrolled(SGD(0.01), 3)
    first, state = run(case, estimator)
    torch.testing.assert_close(state["buffers"]["mean"], x[0] * (1 - 0.5**3))
    last = {k: v.detach() for k, v in first.params.items()}
    seen = (x - state["buffers"]["mean"]) @ last["linear.weight"].T + last["linear.bias"]
    torch.testing.assert_close(first.value, seen.pow(2).sum())
    _, state = run(case, estimator, state)
    torch.testing.assert_close(state["buffers"]["mean"], x[0] * (1 - 0.5**6))
    assert torch.equal(net.mean, torch.zeros(2))
    assert net.training


def test_nothing_of_the_module_changes() -> None:
    case = CASES["batch_norm"]()
    net: nn.Module = case.problem.module  # type: ignore[attr-defined]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    run(case, HigherUnrolled(SGD(0.1, 0.9), 4))
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.grad is None for p in net.parameters())


def test_starts_from_the_params_given() -> None:
    case = CASES["tied_and_frozen"]()
    moved = optree.tree_map(
        lambda t: (t.detach() + 0.1).requires_grad_(t.requires_grad), case.params
    )
    other = Case(case.problem, moved, case.hparams, case.inner, case.outer)
    a, b = (run(other, e(SGD(0.1), 2))[0] for e in (HigherUnrolled, Unrolled))
    assert error(a.params, b.params) < 1e-14
    assert not torch.equal(
        vector(a.params), vector(run(case, HigherUnrolled(SGD(0.1), 2))[0].params)
    )


def test_bad_input() -> None:
    trees, modules = CASES["ridge"](), CASES["batch_norm"]()
    with pytest.raises(TypeError, match=r"HigherUnrolled needs the problem of module_problem"):
        run(trees, HigherUnrolled(SGD(0.1), 2))
    wrong = Case(
        modules.problem, {"w": torch.ones(1, requires_grad=True)}, modules.hparams, *[None] * 2
    )
    with pytest.raises(ValueError, match=r"params must be a dict of the module's parameters \['0"):
        run(wrong, HigherUnrolled(SGD(0.1), 2))
    with pytest.raises(ValueError, match="optimizer=None"):
        run(modules, HigherUnrolled(None, 2))
    with pytest.raises(ValueError, match=r"hparams\['spare'\] enters neither"):
        run(tuned(modules, spare=1.0), HigherUnrolled(SGD(0.1), 2))
    with pytest.raises(FloatingPointError, match=r"(inner_loss|update) .*at step \d"):
        run(modules, HigherUnrolled(SGD(1e300), 5))
    net = nn.Linear(1, 1)
    detached, params = module_problem(
        net, lambda m, h, b: m.weight.sum() * h["s"], lambda m, h, b: h["s"] * 2
    )
    case = Case(detached, params, {"s": torch.ones((), requires_grad=True)}, None, None)
    with pytest.raises(ValueError, match="outer_loss depends on none of the parameters"):
        run(case, HigherUnrolled(SGD(0.1), 2))
