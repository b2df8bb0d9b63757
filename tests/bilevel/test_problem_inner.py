"""ProblemInner: an Inner made of a bare Problem."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from torch import Tensor, nn

from bilevel import Budget, Descent, Grad, Inner, ProblemInner, Space, tune
from hypergrad import SGD, HigherUnrolled, Implicit, Problem, TorchOpt, Unrolled, module_problem
from hypergrad.optimizers import as_optimizer
from tests.bilevel.problems import RIDGE, RULE, TEST, TRAIN, VAL, ridge_options


def ridge(**changes: Any) -> ProblemInner:
    options = ridge_options(**changes)
    return ProblemInner(RIDGE, options.pop("params"), **options)


def test_it_is_an_inner_level() -> None:
    assert isinstance(ridge(), Inner)


def test_steps_are_those_of_torch_optim() -> None:
    inner = ridge()
    w = torch.zeros(8, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.3, momentum=0.2, foreach=False)
    for _ in range(5):
        optimizer.zero_grad()
        loss = RIDGE.inner_loss({"w": w}, {"penalty": torch.tensor(1.0)}, TRAIN)
        loss.backward()
        optimizer.step()
        assert inner.step()["loss"] == pytest.approx(loss.item(), rel=1e-14)
    assert torch.allclose(inner.params["w"], w, rtol=1e-13)


def test_the_given_weights_are_copied() -> None:
    params = {"w": torch.zeros(8, dtype=torch.float64, requires_grad=True)}
    inner = ridge(params=params)
    inner.step()
    assert not params["w"].any()
    assert inner.params["w"].requires_grad
    assert not inner.params["w"].is_leaf or inner.params["w"].grad is None


def test_splits() -> None:
    inner = ridge()
    for name, batch in (("val", VAL), ("test", TEST)):
        loss = RIDGE.outer_loss(inner.params, {}, batch)
        assert inner.evaluate(name)["loss"] == loss.item()
    assert inner.splits == ("train", "val", "test")
    streamed = ridge(outer_batch=lambda t: VAL, test_batch=None)
    assert streamed.splits == ("train",)
    with pytest.raises(ValueError, match=r"split must be one of \['train'\].* but got 'val'"):
        streamed.evaluate("val")
    assert ridge(outer_batch=lambda t: VAL, val_batch=TEST).splits == ("train", "val", "test")


def test_streams_advance_one_by_one() -> None:
    inner = ridge(inner_batch=lambda t: t, outer_batch=lambda t: -t)
    assert inner.inner_batches(3) == [0, 1, 2]
    assert [inner.outer_batch(), inner.outer_batch()] == [0, -1]
    saved = inner.state_dict()
    assert (inner.inner_batches(1), inner.outer_batch()) == ([3], -2)
    inner.load_state_dict(saved)
    assert (inner.inner_batches(1), inner.outer_batch()) == ([3], -2)


def test_state_goes_on_exactly() -> None:
    inner, other = ridge(), ridge(hparams={"penalty": 0.3})
    for _ in range(3):
        inner.step()
    other.load_state_dict(inner.state_dict())
    assert [inner.step()["loss"] for _ in range(3)] == [other.step()["loss"] for _ in range(3)]


def test_a_state_of_other_shapes_is_refused() -> None:
    saved = ridge().state_dict()
    smaller = {"w": torch.zeros(7, dtype=torch.float64, requires_grad=True)}
    with pytest.raises(ValueError, match=r"shape \(8,\).*\(7,\)"):
        ridge(params=smaller).load_state_dict(saved)
    pair = {"w": torch.zeros(8, requires_grad=True), "v": torch.zeros(1)}
    with pytest.raises(ValueError, match="2 tensors, but the saved state 1"):
        ridge(params=pair).load_state_dict(saved)
    with pytest.raises(ValueError, match="hparams"):
        ridge().set_hparams({"penalty": torch.zeros(3)})
    with pytest.raises(ValueError, match="hparams"):
        ridge().set_hparams({"other": torch.zeros(())})


def test_tied_weights_stay_tied() -> None:
    w = torch.ones(2, requires_grad=True)

    def loss(params: Any, hparams: Any, batch: Any) -> Tensor:
        return ((params["a"] + params["b"] - hparams["c"]) ** 2).sum()

    hparams = {"c": torch.tensor(1.0)}
    inner = ProblemInner(Problem(loss, loss), {"a": w, "b": w}, hparams=hparams,
                         optimizer=SGD(lr=0.1))  # fmt: skip
    inner.load_state_dict(inner.state_dict())
    for _ in range(40):
        inner.step()
    assert inner.params["a"] is inner.params["b"]
    assert torch.allclose(inner.params["a"], torch.full((2,), 0.5))


def _pull(params: Any, hparams: Any, batch: Any) -> Tensor:
    """Minimal at w = the sum of all hyperparameters of the given, nested tree."""
    (first, second), rest = hparams["pair"], hparams["layer.0"]
    return (params["w"] - first - second.sum() - rest["x"]).square().sum()


TREE = {
    "pair": (torch.zeros((), dtype=torch.float64), torch.zeros(2, dtype=torch.float64)),
    "layer.0": {"x": torch.zeros(3, dtype=torch.float64)},
}


def test_a_plain_tree_moves_without_bounds() -> None:
    def outer(params: Any, hparams: Any, batch: Any) -> Tensor:
        return (params["w"] - 3).square().sum()

    found = tune(
        Problem(_pull, outer),
        Descent(Implicit(), torch.optim.SGD, lr=0.05, inner_steps=20),
        Budget(outer_steps=40),
        params={"w": torch.zeros(3, dtype=torch.float64, requires_grad=True)},
        hparams=TREE,
        optimizer=SGD(lr=0.3),
    )
    assert set(found.hparams) == {"pair__0", "pair__1", "layer_0__x"}
    total = found.hparams["pair__0"] + found.hparams["pair__1"].sum() + found.hparams["layer_0__x"]
    assert torch.allclose(total, torch.full((3,), 3.0, dtype=torch.float64), atol=1e-6)


def test_names_of_a_tree() -> None:
    def names(tree: Any) -> list[str]:
        params = {"w": torch.zeros(3, requires_grad=True)}
        return list(ProblemInner(RIDGE, params, hparams=tree, optimizer=RULE).hparams)

    x = torch.zeros(())
    assert names(x) == ["hparams"]
    assert names([x, x]) == ["_0", "_1"]
    assert names({"conv1.weight": x}) == ["conv1_weight"]
    with pytest.raises(ValueError, match="two tensors share a name"):
        names({"a.b": x, "a_b": x})
    with pytest.raises(TypeError, match=r"hparams\['a'\] has dtype torch.int64"):
        names({"a": torch.tensor(1)})
    with pytest.raises(TypeError, match="must be a tensor, but got float"):
        names({"a": 1.0})


def test_other_owners_are_refused() -> None:
    space = Space(penalty=Grad(1.0, low=0.1, high=2.0), other=Grad(1.0, low=0.1, high=2.0))
    with pytest.raises(ValueError, match=r"\['other'\] are not owned by the gradient"):
        ridge(space=space.own(other="sampler"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_hyperparameters_are_as_precise_as_the_weights(dtype: torch.dtype) -> None:
    inner = ridge(params={"w": torch.zeros(8, dtype=dtype, requires_grad=True)})
    expected = torch.float32 if dtype == torch.bfloat16 else dtype
    assert inner.hparams["penalty"].dtype == expected


@pytest.mark.parametrize("rule", [torchopt.sgd(0.3, momentum=0.2), TorchOpt(torchopt.adam(0.1))])
def test_torchopt_rules_resume_exactly(rule: Any) -> None:
    options = ridge_options(optimizer=rule)
    algorithm = Descent(Unrolled(steps=2))
    whole = tune(RIDGE, algorithm, 12, **options)
    half = tune(RIDGE, algorithm, 6, **options)
    assert torch.equal(half.resume(12).params["w"], whole.params["w"])
    assert as_optimizer(rule).init(torch.zeros(1)) is not None


def test_a_module_with_state_resumes_exactly(tmp_path: Path) -> None:
    """BatchNorm's running statistics are in the estimator's state."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double()

    def outer(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
        x, y = batch
        return (model(x)[:, 0] - y).square().mean()

    def inner(model: nn.Module, hparams: Any, batch: Any) -> Tensor:
        decay = sum(p.square().sum() for p in model.parameters())
        return outer(model, hparams, batch) + hparams["penalty"] * decay

    problem, params = module_problem(module, inner, outer)
    options = ridge_options(params=params, optimizer=SGD(lr=0.05))
    algorithm, path = Descent(HigherUnrolled(steps=3)), tmp_path / "run.pt"
    whole = tune(problem, algorithm, 30, **options)
    tune(problem, algorithm, 15, checkpoint=path, **options)
    resumed = tune(problem, algorithm, 30, resume=path, **options)
    assert len(whole.trace) == 10
    assert [r["outer_loss"] for r in resumed.trace] == [r["outer_loss"] for r in whole.trace]
