"""Plain training: the numbers of a torch.optim loop, exact continuation, named failures."""

from __future__ import annotations

import io
from typing import Any

import optree
import pytest
import torch
import torchopt
from torch import nn
from torch.nn import functional as F  # noqa: N812

from hypergrad import SGD, Adam, AdamW, Hyper, Problem, from_torch, module_problem, train
from tests.hypergrad.naive import vector
from tests.hypergrad.problems import CASES


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.3), nn.ReLU(), nn.Linear(9, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3, foreach=False),
        lambda p: torch.optim.Adam(p, 0.01, foreach=False),
        lambda p: torch.optim.AdamW(p, 0.01, foreach=False),
    ],
)
def test_is_the_ordinary_loop_bit_for_bit(make: Any, dtype: torch.dtype) -> None:
    """Module with dropout, one batch per step, against zero_grad / backward / step."""
    x, y = torch.randn(40, 6, dtype=dtype), torch.randint(0, 3, (40,))
    batches = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 40, 8)]

    def loss(net: nn.Module, hparams: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    net = network().to(dtype)
    problem, params = module_problem(net, loss, loss)
    rule = from_torch(make(net.parameters()), params)
    torch.manual_seed(1)
    ours = train(problem, params, {}, rule, lambda t: batches[t % 5], 25)

    optimizer, losses = make(net.parameters()), []
    torch.manual_seed(1)
    for t in range(25):
        optimizer.zero_grad()
        value = loss(net, {}, batches[t % 5])
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(value.detach())
    for name, p in net.named_parameters():
        assert torch.equal(ours.params[name], p)
    assert torch.equal(ours.losses, torch.stack(losses))


@pytest.mark.parametrize(
    "rule",
    [SGD(0.1, 0.9), Adam(0.05), AdamW(0.05, amsgrad=True), torchopt.adam(0.05)],
    ids=["sgd", "adam", "adamw", "torchopt"],
)
def test_continues_exactly_after_storing(rule: Any) -> None:
    case = CASES["mlp"]()
    whole = train(case.problem, case.params, case.hparams, rule, case.inner, 9)
    first = train(case.problem, case.params, case.hparams, rule, case.inner, 4)
    file = io.BytesIO()
    torch.save((first.params, first.optimizer_state), file)
    file.seek(0)
    params, state = torch.load(file, weights_only=True)
    rest = train(case.problem, params, case.hparams, rule, case.inner, 5, state)
    assert torch.equal(vector(rest.params), vector(whole.params))
    assert torch.equal(torch.cat([first.losses, rest.losses]), whole.losses)


def test_marks_constants_and_shared_tensors() -> None:
    w = torch.ones(3, requires_grad=True)
    params = {"a": w, "b": w, "c": torch.full((3,), 2.0), "d": torch.ones(1, requires_grad=True)}
    problem = Problem(
        lambda p, h, b: (p["a"] * p["b"] * p["c"]).sum(),  # the gradient of d is zero
        lambda p, h, b: p["a"].sum(),
    )
    found = train(problem, params, {}, SGD(0.1, weight_decay=0.5), None, 1).params
    # ∇ₐ(2a²) = 4a, plus decay a/2
    torch.testing.assert_close(found["a"], torch.full((3,), 1 - 0.1 * 4.5), check_stride=False)
    assert found["b"] is found["a"]
    assert torch.equal(found["c"], params["c"])
    assert found["d"].item() == pytest.approx(0.95)
    assert optree.tree_map(lambda t: t.requires_grad, found) == {
        "a": True,
        "b": True,
        "c": False,
        "d": True,
    }
    assert torch.equal(w, torch.ones(3))


def test_hyperparameters_in_the_loss_and_in_the_optimizer() -> None:
    case = CASES["ridge"]()
    hparams = {**case.hparams, "log_lr": torch.tensor(-2.0)}
    rule = SGD(Hyper("log_lr", torch.exp))
    found = train(case.problem, case.params, hparams, rule, case.inner, 3)
    same = train(
        case.problem, case.params, case.hparams, SGD(torch.tensor(-2.0).exp()), case.inner, 3
    )
    assert torch.equal(vector(found.params), vector(same.params))
    assert found.losses.shape == (3,)
    assert not found.losses.requires_grad


def test_bad_input() -> None:
    case = CASES["ridge"]()

    def call(**changes: Any) -> Any:
        given = {
            "problem": case.problem,
            "params": case.params,
            "hparams": case.hparams,
            "optimizer": SGD(0.1),
            "batch": case.inner,
            "steps": 2,
        }
        return train(**{**given, **changes})

    with pytest.raises(ValueError, match="steps must be at least 1, but got 0"):
        call(steps=0)
    with pytest.raises(ValueError, match="no tensor requires grad"):
        call(params={"w": torch.ones(6)})
    with pytest.raises(ValueError, match="optimizer state has entries"):
        call(optimizer_state={"step": 3})
    with pytest.raises(TypeError, match="optimizer must be a hypergrad optimizer"):
        call(optimizer="adam")
    with pytest.raises(FloatingPointError, match=r"inner_loss is (inf|nan) at step 1"):
        call(optimizer=SGD(1e200))
    with pytest.raises(FloatingPointError, match=r"the update at step 0 .* in params\['w'\]"):
        call(optimizer=SGD(1e308, weight_decay=1e308))
