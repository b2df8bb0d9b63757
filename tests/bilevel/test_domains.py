"""Domains: what is refused at construction, defaults, and what is accepted as a value."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Choice, Domain, Fixed, Float, Grad, Int, Switch
from tests.bilevel.strategies import choices, floats, grads, ints

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"init": 0.5, "low": 1.0, "high": 0.0}, ValueError, "low must be less than high.*low=1.0"),
        ({"init": 1.0, "low": 1.0, "high": 1.0}, ValueError, "low must be less.*use Fixed"),
        ({"init": 0.0, "low": 0.0}, ValueError, r"init must be in \(0.0, inf\), but got 0.0"),
        ({"init": 1.0, "high": 1.0}, ValueError, r"init must be in \(-inf, 1.0\), but got 1.0"),
        ({"init": 3.0, "low": 0.0, "high": 1.0}, ValueError, r"init must be in \(0.0, 1.0\).*3.0"),
        ({"init": -1.0, "scale": "log"}, ValueError, r"init must be in \(0.0, inf\), but got -1.0"),
        ({"init": 0.1, "low": 0.0, "scale": "log"}, ValueError, "low must be positive on a log"),
        ({"init": 0.1, "high": -1.0, "scale": "log"}, ValueError, "high must be positive on a log"),
        ({"init": 0.5, "low": NAN}, ValueError, "low must be finite, but got nan"),
        ({"init": 0.5, "high": INF}, ValueError, "high must be finite, but got inf"),
        ({"init": 0.5, "low": -1.5e308, "high": 1.5e308}, ValueError, "high - low must be finite"),
        ({"init": NAN}, ValueError, "init must be finite, but got nan"),
        ({"init": [1.0, INF], "shape": (2,)}, ValueError, r"init\[1\] must be finite.*inf"),
        ({"init": True}, TypeError, "init must be a number, but got True"),
        ({"init": "0.1"}, TypeError, "init must be a number, but got '0.1'"),
        ({"init": [True, False], "shape": (2,)}, TypeError, "init must hold numbers"),
        ({"init": 0.5, "low": True}, TypeError, "low must be a number, but got True"),
        ({"init": 0.5, "scale": "ln"}, ValueError, "unknown scale 'ln'.*linear, log, simplex"),
        ({"init": 0.5, "scale": "logg"}, ValueError, "did you mean 'log'"),
        ({"init": 0.5, "shape": 3}, TypeError, "shape must be a tuple of integers, but got 3"),
        ({"init": 0.5, "shape": (0,)}, ValueError, "shape must be at least 1, but got 0"),
        ({"init": 0.5, "shape": (2.0,)}, TypeError, "shape must be an integer, but got 2.0"),
        ({"init": torch.ones(3), "shape": (2,)}, ValueError, r"init .*shape \(2,\).* \(3,\)"),
        ({"init": [[1.0], [2.0, 3.0]], "shape": (2, 2)}, ValueError, "rectangular array"),
        ({"init": 0.5, "schedule": 1}, ValueError, "schedule must be at least 2, but got 1"),
        ({"init": 0.5, "schedule": True}, TypeError, "schedule must be an integer, but got True"),
        (
            {"init": 0.5, "scale": "simplex"},
            ValueError,
            "shape must end in a dimension of at least",
        ),
        ({"init": 1.0, "scale": "simplex", "shape": (1,)}, ValueError, "dimension of at least 2"),
        ({"init": 0.5, "scale": "simplex", "shape": (3,)}, ValueError, "sum of .*init.* 1.5"),
        ({"init": [0.0, 1.0], "scale": "simplex", "shape": (2,)}, ValueError, r"init\[0\] must be"),
        (
            {"init": 0.5, "scale": "simplex", "shape": (2,), "low": 0.0},
            ValueError,
            "a simplex has no low and high",
        ),
        ({"init": 0.5, "doc": 3}, TypeError, "doc must be a string, but got 3"),
        ({"init": 0.5, "when": "arch"}, TypeError, "when must map names to values"),
        ({"init": 0.5, "when": {"arch": ()}}, ValueError, r"when\['arch'\] needs at least one"),
        ({"init": 0.5, "when": {"arch": {1}}}, TypeError, r"when\['arch'\] must be None, a bool"),
    ],
)
def test_bad_grad(kwargs: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Grad(**kwargs)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Float(1.0, 0.0), ValueError, "Float: low must be less than high"),
        (lambda: Float(1.0, 1.0), ValueError, "use Fixed for a constant"),
        (lambda: Float(0.0, 1.0, log=True), ValueError, "low must be positive on a log scale"),
        (lambda: Float(NAN, 1.0), ValueError, "Float: low must be finite, but got nan"),
        (lambda: Float(0.0, INF), ValueError, "Float: high must be finite, but got inf"),
        (lambda: Float(0.0, 1.0, default=2.0), ValueError, "default must be in .* default=2.0"),
        (lambda: Float(False, 1.0), TypeError, "Float: low must be a number, but got False"),
        (lambda: Float(0.0, 1.0, log=1), TypeError, "log must be True or False, but got 1"),
        (lambda: Int(5, 2), ValueError, "Int: low must be less than high"),
        (lambda: Int(1, 2.0), TypeError, "Int: high must be an integer, but got 2.0"),
        (lambda: Int(0, 8, log=True), ValueError, "low must be positive on a log scale"),
        (lambda: Int(1, 9, log=True, step=2), ValueError, "step must be 1 on a log scale"),
        (lambda: Int(0, 10, step=4), ValueError, "step must divide .* last value in reach is 8"),
        (lambda: Int(0, 10, step=0), ValueError, "step must be at least 1, but got 0"),
        (lambda: Int(0, 8, step=4, default=3), ValueError, "default must be in 0..8 in steps of 4"),
        (lambda: Choice(), ValueError, "at least one option"),
        (lambda: Choice(["a", "b"]), TypeError, r"write Choice\(\*\['a', 'b'\]\)"),
        (lambda: Choice("a", "b", "a"), ValueError, "got 'a' and 'a'"),
        (lambda: Choice(1, True), ValueError, "got 1 and True"),
        (lambda: Choice(1, "1"), ValueError, "got 1 and '1'"),
        (lambda: Choice("a", "b", default="c"), ValueError, r"default must be one of \['a', 'b'\]"),
        (lambda: Choice(1, 2, default=True), ValueError, "default must be one of"),
        (lambda: Choice(NAN), ValueError, "option must be finite"),
        (lambda: Choice(torch.ones(2)), TypeError, "option must be None, a bool, a number or"),
        (lambda: Switch(1), TypeError, "default must be True or False, but got 1"),
        (lambda: Fixed(torch.ones(2)), TypeError, "value must be None, a bool"),
        (lambda: Fixed([1, INF]), ValueError, r"value\[1\] must be finite"),
    ],
)
def test_bad_sampled_domains(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("domain", "default"),
    [
        (Float(0.0, 3.0), 1.5),
        (Float(1e-4, 1.0, log=True), 1e-2),
        (Float(-1.7e308 / 2, 1.7e308 / 2), 0.0),
        (Int(0, 9), 4),
        (Int(0, 20, step=5), 10),
        (Int(1, 10_000, log=True), 100),
        (Choice("a", "b"), "a"),
        (Choice("a", None, default=None), None),
        (Switch(), False),
        (Fixed([1, ["a", None]]), (1, ("a", None))),
    ],
)
def test_defaults(domain: Domain, default: Any) -> None:
    assert (
        domain.default_value == pytest.approx(default, rel=1e-14)
        if isinstance(default, float)
        else domain.default_value == default
    )


@pytest.mark.parametrize(
    ("domain", "value", "error", "message"),
    [
        (Float(0.0, 1.0), 1.5, ValueError, r"h must be in \[0.0, 1.0\], but got 1.5"),
        (Float(0.0, 1.0), True, TypeError, "h must be a number, but got True"),
        (Float(0.0, 1.0), NAN, ValueError, "h must be finite"),
        (Int(0, 8, step=4), 3, ValueError, "h must be in 0..8 in steps of 4, but got 3"),
        (Int(0, 8), 3.0, TypeError, "h must be an integer, but got 3.0"),
        (Choice(0, 1), False, ValueError, r"h must be one of \[0, 1\], but got False"),
        (Choice("a", "b"), ["a"], TypeError, "h must be None, a bool, a number or a string"),
        (Switch(), 0, TypeError, "h must be True or False, but got 0"),
        (Grad(0.5, 0, 1, shape=(2,)), torch.ones(3), ValueError, r"shape \(2,\), but got \(3,\)"),
        (
            Grad(0.5, 0, 1, shape=(2, 2)),
            torch.tensor([[0.5, 0.5], [0.5, 2.0]]),
            ValueError,
            r"\[1, 1\]",
        ),
        (Grad(0.5, 0, 1), torch.tensor(1), TypeError, "floating tensor, but got dtype torch.int64"),
    ],
)
def test_bad_values(domain: Domain, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        domain.check("h", value)


def test_values_become_plain_types() -> None:
    assert type(Float(0, 1).check("h", np.float32(0.5))) is float
    assert type(Float(0, 1).check("h", torch.tensor(0.5, requires_grad=True))) is float
    assert type(Int(0, 9).check("h", np.int64(3))) is int
    assert type(Choice("a", "b").check("h", np.str_("b"))) is str
    assert Choice(1, 2).check("h", np.int32(2)) == 2
    assert Switch().check("h", np.bool_(True)) is True
    half = Grad(0.5, 0, 1, shape=(2,)).check("h", torch.full((2,), 0.25, dtype=torch.bfloat16))
    assert half.dtype == torch.float32


def test_grad_stores_init_as_plain_numbers() -> None:
    rows = [[0.1, 0.2], [0.3, 0.4]]
    for init in (rows, np.array(rows), torch.tensor(rows, dtype=torch.float64)):
        assert Grad(init, shape=(2, 2)) == Grad(rows, shape=(2, 2))
    assert Grad(torch.tensor(0.5)) == Grad(0.5)
    per_knot = Grad([1.0, 2.0], shape=(2,), schedule=3)
    assert per_knot.check("h", per_knot.init).tolist() == [[1.0, 2.0]] * 3


@given(st.one_of(grads(), floats(), ints(), choices()))
@settings(deadline=None, max_examples=100)
def test_default_is_valid_and_domains_are_values(domain: Domain) -> None:
    domain.check("h", domain.default_value)
    again = pickle.loads(pickle.dumps(domain))
    assert again == domain
    assert hash(again) == hash(domain)
    names = {c.__name__: c for c in (Grad, Float, Int, Choice)}
    assert eval(repr(domain), {}, names) == domain


def test_repr_shows_what_was_given() -> None:
    assert repr(Float(0, 1, when={"arch": "mlp"})) == (
        "Float(when={'arch': 'mlp'}, low=0.0, high=1.0, default=0.5)"
    )
    assert repr(Choice("a", "b", default="b", doc="x")) == "Choice('a', 'b', default='b', doc='x')"


@pytest.mark.parametrize("field", ["low", "init"])
def test_domains_are_frozen(field: str) -> None:
    with pytest.raises(AttributeError, match="cannot assign to field"):
        setattr(Grad(0.5), field, 0.1)
