"""Spaces: declaration, owners, values, conditions."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bilevel import Choice, Fixed, Float, Grad, Int, Space, Switch
from tests.bilevel.strategies import owned, spaces


def example() -> Space:
    return Space(
        wd=Grad(1e-2, 1e-6, 1e2, "log", shape=(3,)),
        lr=Grad(0.1, 1e-4, 1.0, "log"),
        arch=Choice("mlp", "cnn"),
        width=Int(16, 256, log=True, when={"arch": "mlp"}),
        beta=Float(0.0, 0.99, default=0.9),
        norm=Switch(),
        momentum=Grad(0.9, 0.0, 1.0, when={"norm": True, "arch": ("mlp", "cnn")}),
        epochs=Fixed(20),
    )


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    def same(x: Any, y: Any) -> bool:
        return torch.equal(x, y) if isinstance(x, torch.Tensor) else type(x) is type(y) and x == y

    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def test_space_is_an_ordered_mapping() -> None:
    space = example()
    assert list(space) == [
        "wd", "lr", "arch", "width", "beta", "norm", "momentum", "epochs",
    ]  # fmt: skip
    assert space["epochs"] == Fixed(20)
    assert "depth" not in space
    assert Space(dict(space)) == space
    assert (space.grad, space.fixed) == (("wd", "lr", "momentum"), ("epochs",))
    assert space.sampled == ("arch", "width", "beta", "norm")
    assert pickle.loads(pickle.dumps(space)) == space


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Space({"a b": Switch()}), ValueError, "identifier, but got 'a b'"),
        (lambda: Space({"a@b": Switch()}), ValueError, "identifier, but got 'a@b'"),
        (lambda: Space(a=0.1), TypeError, "a must be a domain .* but got 0.1"),
        (lambda: Space({"a": Switch()}, a=Switch()), ValueError, "got 'a' twice"),
        (
            lambda: Space(arch=Choice("a"), n=Int(1, 2, when={"arhc": "a"})),
            ValueError,
            r"n: when\['arhc'\] refers to an unknown name; did you mean 'arch'",
        ),
        (
            lambda: Space(arch=Choice("a"), n=Int(1, 2, when={"arch": "b"})),
            ValueError,
            r"when\['arch'\] must be one of \['a'\], but got 'b'",
        ),
        (lambda: Space(s=Switch(), n=Int(1, 2, when={"s": 1})), TypeError, "True or False.*got 1"),
        (lambda: Space(i=Int(0, 4, step=2), n=Int(1, 2, when={"i": 3})), ValueError, "steps of 2"),
        (lambda: Space(f=Fixed("a"), n=Int(1, 2, when={"f": "b"})), ValueError, "must be 'a'"),
        (lambda: Space(f=Float(0, 1), n=Int(1, 2, when={"f": 0.5})), TypeError, "f is a Float"),
        (lambda: Space(n=Int(1, 2, when={"n": 1})), ValueError, "cycle, but got n -> n"),
        (
            lambda: Space(a=Switch(when={"b": True}), b=Switch(when={"a": True})),
            ValueError,
            "must not form a cycle, but got",
        ),
    ],
)
def test_bad_declarations(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_names_may_depend_on_later_ones() -> None:
    space = Space(
        n=Int(1, 3, when={"b": True}), b=Switch(True, when={"a": "x"}), a=Choice("x", "y")
    )
    assert space.order == ("a", "b", "n")
    assert list(space.defaults()) == ["n", "b", "a"]
    assert list(space.validate({"a": "y"})) == ["a"]


@given(owned())
@settings(deadline=None, max_examples=60)
def test_own_is_reversible(space: Space) -> None:
    first = Space(dict(space))
    assert space.own(**{name: first.owner(name) for name in space}) == first


def test_an_owner_changes_the_kind_of_value_only() -> None:
    space = example()
    other = space.own(lr="sampler", beta="grad", wd="shared", arch="fixed")
    assert other.owner("wd") == "shared"
    assert other.sampled == ("wd", "lr", "width", "norm")
    assert dict(other) == dict(space)
    values = other.defaults(dtype=torch.float64)
    assert values["lr"] == 0.1
    assert isinstance(values["beta"], torch.Tensor)
    assert values["wd"].tolist() == [1e-2] * 3
    assert other.constants == {"epochs": 20, "arch": "mlp"}


@pytest.mark.parametrize(
    ("owners", "message"),
    [
        ({"lrr": "grad"}, "own: unknown name 'lrr'; did you mean 'lr'"),
        ({"lr": "gradient"}, "owner of lr must be one of 'grad', 'sampler', 'shared', 'fixed'"),
        ({"arch": "grad"}, "arch cannot be owned by 'grad': Choice has no derivative"),
        ({"width": "grad"}, "width cannot be owned by 'grad': Int has no derivative"),
        ({"norm": "grad"}, "Switch has no derivative"),
        ({"epochs": "sampler"}, "declared as a constant, without a range"),
        ({"lr": "shared"}, "it is a number; use 'sampler'"),
        ({"beta": "shared"}, "use 'sampler'"),
        ({"free": "sampler"}, "needs both bounds, but low=0.0 and high=None"),
        ({"big": "sampler"}, "65 elements and a sampler takes at most 64.*use 'shared'"),
        ({"mix": "shared"}, "a simplex needs different ones"),
        ({"edge": "grad"}, "default 0.0 is on a bound"),
    ],
)
def test_owners_that_cannot_be(owners: dict[str, str], message: str) -> None:
    space = example() | Space(
        free=Grad(1.0, low=0.0),
        big=Grad(0.5, 0.0, 1.0, shape=(65,)),
        mix=Grad([0.5, 0.5], scale="simplex", shape=(2,)),
        edge=Float(0.0, 1.0, default=0.0),
    )
    with pytest.raises(ValueError, match=message):
        space.own(**owners)


def test_fix() -> None:
    space = example().fix(lr=0.5, wd=[0.1, 0.2, 0.3], epochs=30, arch="cnn")
    assert space.fixed == ("wd", "lr", "arch", "epochs")
    values = space.defaults(dtype=torch.float64)
    assert values["lr"] == 0.5
    assert values["wd"].tolist() == [0.1, 0.2, 0.3]
    assert values["epochs"] == 30
    assert "width" not in values  # its condition arch=mlp can no longer hold
    assert space.own(lr="fixed").constants["lr"] == 0.5
    with pytest.raises(ValueError, match=r"lr is fixed at 0.5, but got 0.1; use fix\(lr=...\)"):
        space.validate({"lr": 0.1})
    with pytest.raises(ValueError, match=r"lr must be in \[0.0001, 1.0\], but got 2.0"):
        space.fix(lr=2.0)


def test_union_selection_and_shape() -> None:
    space = example().own(lr="sampler")
    both = space | {"depth": Int(1, 8, when={"arch": "cnn"})}
    assert (both.owner("lr"), both.owner("depth")) == ("sampler", "sampler")
    assert both.without("depth") == space
    assert both.select("lr", "wd").grad == ("wd",)
    with pytest.raises(ValueError, match="'lr' is in both spaces"):
        space | Space(lr=Fixed(1))
    with pytest.raises(ValueError, match=r"width: when\['arch'\] refers to an unknown name"):
        space.without("arch")
    assert space.reshape(wd=(5, 2)).defaults()["wd"].shape == (5, 2)
    with pytest.raises(TypeError, match="reshape: beta must be a Grad, but is a Float"):
        space.reshape(beta=(2,))


def test_validate_fills_up_and_converts() -> None:
    values = example().validate({"norm": True, "wd": [0.1, 0.2, 0.3], "width": 32})
    assert list(values) == list(example())
    assert values["wd"].dtype == values["momentum"].dtype == torch.get_default_dtype()
    assert values["width"] == 32
    assert values["beta"] == 0.9
    given_tensor = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64, requires_grad=True)
    assert example().validate({"wd": given_tensor})["wd"] is given_tensor


def test_a_number_stands_for_all_elements_in_memory_of_its_own() -> None:
    wd = example().validate({"wd": 0.5}, dtype=torch.float64)["wd"]
    wd[0] = 0.1
    assert wd.tolist() == pytest.approx([0.1, 0.5, 0.5])


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"lrr": 0.1}, ValueError, "validate: unknown name 'lrr'; did you mean 'lr'"),
        ({"lr": 1.0}, ValueError, r"lr must be in \(0.0001, 1.0\), but got 1.0"),
        ({"lr": "0.1"}, TypeError, "lr must be a number"),
        ({"wd": [0.1, 0.2, 200.0]}, ValueError, r"wd\[2\] must be in .* but got 200.0"),
        ({"wd": [0.1, 0.2]}, ValueError, r"wd must have shape \(3,\), but got \(2,\)"),
        ({"wd": [0.1, 0.2, float("nan")]}, ValueError, r"wd\[2\] must be finite"),
        (
            {"arch": "cnn", "width": 32},
            ValueError,
            "width is active only when arch='mlp', but arch",
        ),
        ({"momentum": 0.5}, ValueError, "active only when norm=True, arch='mlp' or 'cnn', but"),
        ({"epochs": 21}, ValueError, "epochs is fixed at 20, but got 21"),
        ({"epochs": 20.0}, ValueError, "epochs is fixed at 20, but got 20.0"),
    ],
)
def test_bad_values(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        example().validate(values)


def test_complete_and_shared() -> None:
    with pytest.raises(ValueError, match="wd is missing; got values for lr"):
        example().validate({"lr": 0.1}, complete=True)
    with pytest.raises(ValueError, match="wd is shared: all elements must be equal"):
        example().own(wd="shared").validate({"wd": [0.1, 0.1, 0.2]})
    uneven = Space(a=Grad([0.01, 1.0], 1e-3, 10.0, "log", shape=(2,))).own(a="shared")
    assert uneven.defaults()["a"].tolist() == pytest.approx([0.1, 0.1])


def test_a_value_on_a_bound_is_fine_for_a_sampler() -> None:
    space = example().own(lr="sampler")
    assert space.validate({"lr": 1.0})["lr"] == 1.0
    with pytest.raises(ValueError, match="lr must be in"):
        space.validate({"lr": 1.0 + 1e-15 * 4})


@given(owned(), st.integers(0, 2**31), st.sampled_from([torch.float32, torch.float64]))
@settings(deadline=None, max_examples=80)
def test_samples_are_valid_and_validation_is_idempotent(
    space: Space, seed: int, dtype: torch.dtype
) -> None:
    sample = space.sample(torch.Generator().manual_seed(seed))
    again = space.sample(torch.Generator().manual_seed(seed))
    assert equal(sample, again)
    assert equal(space.validate(sample, complete=True), sample)
    cast = space.validate(sample, dtype=dtype)
    assert equal(space.validate(cast, complete=True, dtype=dtype), cast)


@given(spaces(), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_gradient_owned_values_survive_coordinates(space: Space, seed: int) -> None:
    values = space.defaults(dtype=torch.float64)
    z = space.coordinates(values)
    assert set(z) == {name for name in space.grad if name in values}
    generator = torch.Generator().manual_seed(seed)
    moved = {n: t + torch.randn(t.shape, generator=generator, dtype=t.dtype) for n, t in z.items()}
    constrained = space.constrain(moved)
    assert equal(space.validate({**values, **constrained}), {**values, **constrained})
