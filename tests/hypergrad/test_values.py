"""Hyperparameters of an optimizer: lookup, broadcasting to the flat vector, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hypergrad import SGD, Adam, Hyper
from hypergrad.optimizers.values import constants, tuned
from hypergrad.tree import Leaves, trainable_leaves

# Flat order is that of the tree: a (2), b.c (3), b.d (1); "frozen" is a constant.
PARAMS = {
    "a": torch.zeros(2, requires_grad=True),
    "b": {"c": torch.zeros(1, 3, requires_grad=True), "d": torch.zeros((), requires_grad=True)},
    "frozen": torch.zeros(4),
}


def leaves() -> Leaves:
    return trainable_leaves(PARAMS)


def hyper(value: Any) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).requires_grad_()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.tensor([1.0, 2.0, 3.0]), [1, 1, 2, 2, 2, 3]),
        (torch.arange(6.0), [0, 1, 2, 3, 4, 5]),
        ({"a": 1.0, "b": 2.0, "frozen": 9.0}, [1, 1, 2, 2, 2, 2]),
        ({"a": 1.0, "b": {"c": 2.0, "d": 3}, "frozen": 9.0}, [1, 1, 2, 2, 2, 3]),
        (
            {
                "a": torch.tensor([1.0, 2.0]),
                "b": {"c": torch.tensor([[3.0, 4.0, 5.0]]), "d": torch.tensor(6.0)},
                "frozen": 0.0,
            },
            [1, 2, 3, 4, 5, 6],
        ),
        ({"a": Hyper("x"), "b": 2.0, "frozen": 0.0}, [7, 7, 2, 2, 2, 2]),
    ],
)
def test_broadcast(value: Any, expected: list[float]) -> None:
    values = SGD(0.1, weight_decay=value).resolve({"x": hyper(7.0)}, leaves())
    decay = values["weight_decay"]
    assert isinstance(decay, Tensor)
    torch.testing.assert_close(decay.detach().float(), torch.tensor(expected, dtype=torch.float32))


def test_lookup_transforms_and_stays_differentiable() -> None:
    h = {"log_lr": hyper(-2.0), "wd": {"a": hyper(1.0), "b": hyper(2.0), "frozen": hyper(3.0)}}
    rule = SGD(Hyper("log_lr", torch.exp), weight_decay=Hyper("wd", torch.square))
    values = rule.resolve(h, leaves())
    assert set(tuned(values)) == {"lr", "weight_decay"}
    lr, decay = values["lr"], values["weight_decay"]
    assert isinstance(lr, Tensor)
    assert isinstance(decay, Tensor)
    assert lr.dtype == torch.float64
    inputs = [h["log_lr"], h["wd"]["a"], h["wd"]["b"]]
    found = torch.autograd.grad(lr + decay.sum(), inputs)
    expected = [torch.tensor(-2.0).exp(), torch.tensor(2.0 * 2), torch.tensor(4.0 * 4)]
    torch.testing.assert_close(list(found), expected)
    assert constants(values)["lr"] == pytest.approx(0.1353352832)


def test_tied_tensor_takes_one_value() -> None:
    w = torch.zeros(2, requires_grad=True)
    tied = trainable_leaves({"x": w, "y": w})
    values = SGD(0.1, weight_decay={"x": 1.0, "y": 1.0}).resolve({}, tied)
    assert values["weight_decay"].shape == (2,)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (SGD(Hyper("typo")), r"Hyper\('typo'\) is not an entry of hparams, which has \['x'\]"),
        (SGD(-0.1), r"SGD lr must be in \[0.0, inf\), but got -0.1"),
        (SGD(float("nan")), r"SGD lr must be in \[0.0, inf\), but got nan"),
        (SGD(0.1, -0.5), r"SGD momentum must be in"),
        (Adam(0.1, (0.9, 1.0)), r"Adam beta2 must be in \[0.0, 1.0\), but got 1.0"),
        (Adam(0.1, (torch.tensor(1.5), 0.9)), r"Adam beta1 must be in .* but got 1.5"),
        (SGD(torch.zeros(5)), r"optimizer lr has shape \(5,\); expected a scalar, one entry per"),
        (SGD({"a": 0.1}), r"optimizer lr must be a scalar or a tree like params"),
        (
            SGD({"a": torch.ones(3), "b": 0.1, "frozen": 0.1}),
            r"optimizer lr has shape \(3,\) for params\['a'\], which has shape \(2,\)",
        ),
        (SGD(torch.tensor(0.1, requires_grad=True)), r"lr is a tensor that requires grad, but"),
    ],
)
def test_bad_values_name_argument_and_value(rule: SGD, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rule.resolve({"x": hyper(1.0)}, leaves())


@pytest.mark.parametrize("value", [True, "0.1", None])
def test_values_that_are_no_numbers(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="optimizer lr must be a"):
        SGD(value).resolve({}, leaves())


def test_betas_are_a_pair() -> None:
    with pytest.raises(
        ValueError, match=r"Adam betas must be a pair \(beta1, beta2\), but got 0.9"
    ):
        Adam(0.1, 0.9)  # type: ignore[arg-type]
